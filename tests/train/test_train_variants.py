"""Training in other ways than the plain one: what changes the losses, and what must not."""

import hashlib
import os
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_run import (
    write_config,
)
from train_runs import adapter_bytes, curve, losses, record_runs

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core import paths
from jaxpeft.mesh import layouts
from jaxpeft.pretrained.load import load_model, load_model_config
from jaxpeft.training.run import Run


def test_accumulation_gives_the_losses_of_the_whole_batch(files, plain, tmp_path):
    parts = losses(files, tmp_path / "parts", train={"microbatch_size": 2})
    np.testing.assert_allclose(parts, curve(plain), rtol=1e-5)


@pytest.mark.parametrize("name", ["dots", "none"])
def test_remat_does_not_change_the_losses(files, plain, tmp_path, name):
    other = losses(files, tmp_path / "run", train={"remat": name})
    np.testing.assert_allclose(other, curve(plain), rtol=1e-5)


def test_adafactor_lowers_the_loss(files, tmp_path):
    optim = {"name": "adafactor", "learning_rate": 0.03}
    found = losses(files, tmp_path / "run", optim=optim)
    assert found[-1] < 0.95 * found[0]


def test_dropout_changes_the_losses(files, plain, tmp_path):
    dropped = losses(files, tmp_path / "run", method={"dropout": 0.3})
    assert dropped[0] == curve(plain)[0]  # B is still zero
    assert all(a != b for a, b in zip(dropped[1:], curve(plain)[1:], strict=True))


def test_full_fine_tuning_writes_a_model(files, tmp_path):
    output = tmp_path / "run"
    found = losses(files, output, method={"name": "full"})
    assert found[-1] < 0.5 * found[0]
    assert not (output / "adapter").exists()
    trained, base = load_model(output / "model"), load_model(files.model)
    before, after = paths.flatten(base.params), paths.flatten(trained.params)
    assert before.keys() == after.keys()
    assert all((before[path] != after[path]).any() for path in before)
    assert len(trained.tokenizer) == len(base.tokenizer)


@pytest.mark.slow
def test_a_run_that_goes_on_replaces_the_model_it_wrote(files, tmp_path):
    output = tmp_path / "run"
    changes = {
        "train": {"steps": 2},
        "optim": {"trainable": ["norm/scale"]},
        "checkpoint": {"every": 1},
    }
    losses(files, output, **changes)
    weights = output / "model" / "model.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(b"of an earlier step")
    shutil.rmtree(output / "checkpoints" / "2")
    losses(files, output, **changes)
    assert weights.read_bytes() == expected


@pytest.mark.slow
def test_relabelled_norm_is_trained_and_nothing_else_of_the_base(files, tmp_path, monkeypatch):
    runs = record_runs(monkeypatch)
    output = tmp_path / "run"
    losses(files, output, optim={"trainable": ["norm/scale"], "learning_rate": 0.05})
    (run,) = runs
    base = paths.flatten(load_model(files.model).params)
    on_base = paths.flatten(run.state.trained["base"])
    assert [path for path, leaf in on_base.items() if leaf is not None] == ["norm/scale"]
    for path, leaf in paths.flatten(run.base.params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(base[path]).tobytes(), path
    moments = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.opt_state)
        if leaf.ndim and "/adapter/" not in jax.tree_util.keystr(path, simple=True, separator="/")
    ]
    assert [name.rpartition("/base/")[2] for name in moments] == ["norm/scale"] * 2
    assert {name.split("/")[-4] for name in moments} == {"mu", "nu"}, moments
    saved = paths.flatten(load_model(output / "model").params)
    assert (saved["norm/scale"] != base["norm/scale"]).any()
    for path in ("embed_tokens/embedding", "lm_head/kernel", "layers/input_layernorm/scale"):
        np.testing.assert_array_equal(saved[path], base[path])


def test_base_is_bit_identical_after_training(files, tmp_path, monkeypatch):
    runs = record_runs(monkeypatch)
    losses(files, tmp_path / "run", train={"steps": 3, "batch_size": 1})
    assert sha256(runs[0].base.params) == sha256(load_model(files.model).params)


def sha256(params: dict) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.flatten(params).items()):
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def test_step_and_evaluation_are_compiled_once(files, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)  # the context manager knows this thread only
    program.main([write_config(files, tmp_path / "run", evaluation={"every": 4})])
    jax.config.update("jax_log_compiles", False)
    texts = [record.getMessage() for record in caplog.records]
    compiled = [found[1] for text in texts if (found := re.match(r"Compiling jit\((\w+)\)", text))]
    assert {name: compiled.count(name) for name in ("step", "_batch_sums")} == {
        "step": 1,
        "_batch_sums": 1,
    }, compiled


def scripted(monkeypatch, scores: dict[int, float]) -> None:
    def evaluate(run):
        return {"eval_loss": scores[int(run.state.step)], "eval_token_accuracy": 0.5}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)


@pytest.mark.slow
def test_best_step_is_exported(files, tmp_path, monkeypatch, capsys):
    constant = {"schedule": "constant"}
    losses(files, tmp_path / "six", optim=constant, train={"steps": 6})
    scripted(monkeypatch, {0: 5.0, 3: 2.0, 6: 1.0, 9: 3.0, 12: 2.0})
    output = tmp_path / "run"
    checkpoint = {"best": "eval_loss", "every": None, "keep": 1}
    config = write_config(
        files, output, optim=constant, checkpoint=checkpoint, evaluation={"every": 3}
    )
    program.main([config])
    assert adapter_bytes(output) == adapter_bytes(tmp_path / "six")
    assert sorted(os.listdir(output / "checkpoints")) == ["12", "6"]
    assert "(step 6)" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 1), ("eval_token_accuracy", 2)])
def test_best_is_the_least_loss_or_the_largest_accuracy(files, tmp_path, metric, best):
    config = jp.load_config(write_config(files, tmp_path / "run", checkpoint={"best": metric}))
    rows = program.read_data(config, load_model_config(files.model))
    run = Run(config, load_model(files.model), rows, layouts.make_mesh())
    scores = [(0.5, 0.5), (0.7, 0.9), (0.9, 0.7)]  # at steps 1, 2, 3
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for loss, accuracy in scores:
            run.state = run.state.replace(step=run.state.step + 1)
            run.save(checkpoints, {"eval_loss": loss, "eval_token_accuracy": accuracy})
        checkpoints.wait()
        assert checkpoints.best() == best
        assert checkpoints.steps() == sorted({best, 3})
