"""A run goes on with fewer devices, on other meshes: from the same bits, over the same rows."""

import functools

import jax
import numpy as np
import pytest
from tiny_run import STEPS, training_lines, write_config
from train_runs import NO_EVAL, curve, record_runs, stop_at

from jaxpeft import train as program
from jaxpeft.core.errors import InterruptedRunError
from jaxpeft.mesh import layouts
from jaxpeft.training.run import Run, leaves

MAKE_MESH = layouts.make_mesh

PARTS = [
    (3, {"data": 8}),
    (6, {"data": 1, "fsdp": 4}),
    (9, {"data": 1, "tensor": 2}),
    (None, {"data": 1}),
]
"""At which step a part is stopped, and on which devices it is done."""


def bits(run):
    state = run.state.replace(key=jax.random.key_data(run.state.key))
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves(state).items()}


def test_other_meshes_go_on_from_equal_bits_with_the_same_rows(files, plain, tmp_path, monkeypatch):
    put, restore = Run.put, Run.restore
    rows, restored = [], []
    monkeypatch.setattr(
        Run, "put", lambda run, batch: (rows.append(batch["tokens"]), put(run, batch))[1]
    )
    monkeypatch.setattr(
        Run,
        "restore",
        lambda run, *args: (restore(run, *args), restored.append(bits(run)))[0],
    )
    runs, saved = record_runs(monkeypatch), []
    for stop, sizes in PARTS:
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        monkeypatch.setattr(layouts, "make_mesh", functools.partial(MAKE_MESH, devices=devices))
        config = write_config(files, tmp_path / "run", **NO_EVAL, checkpoint=None, mesh=sizes)
        if stop is None:
            program.main([config])
            break
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(InterruptedRunError, match=f"at step {stop}, saved"):
                program.main([config])
        saved.append(bits(runs[-1]))
    assert [run.mesh.size for run in runs] == [8, 4, 2, 1]
    assert restored == saved
    plan = runs[0].rows.plan
    assert len(rows) == STEPS
    for step, tokens in enumerate(rows):
        np.testing.assert_array_equal(tokens, plan.batch(step)["tokens"])
    assert [line["step"] for line in training_lines(tmp_path / "run")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(curve(tmp_path / "run"), curve(plain), rtol=1e-5)
