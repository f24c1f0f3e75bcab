"""Runs that diverge or are told to stop, and go on."""

import os
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import (
    STEPS,
    evaluation_lines,
    training_lines,
    write_config,
)
from toy_model import toy_model
from train_runs import (
    NO_EVAL,
    adapter_bytes,
    curve,
    losses,
    output_of,
    poison,
    record_runs,
    steps_of,
    stop_at,
)

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.checkpoints.folder import CheckpointFolder
from jaxpeft.core.errors import DivergedError, InterruptedRunError, UserError
from jaxpeft.mesh import layouts
from jaxpeft.pretrained.load import load_model_config
from jaxpeft.reports import trackers
from jaxpeft.training.run import Run


def test_a_poisoned_batch_is_skipped_and_counted(files, plain, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {4})
    output = tmp_path / "run"
    losses(files, output)
    lines = training_lines(output)
    assert [line["skipped_updates"] for line in lines] == [0] * 3 + [1] * 9
    assert lines[3]["loss"] is None
    assert [line["loss"] for line in lines[:3]] == curve(plain)[:3]
    assert all(np.isfinite(line["loss"]) for line in lines[4:])
    rates = [line["learning_rate"] for line in lines]
    assert rates[3] == rates[4]  # the skipped update did not use its place in the schedule
    assert "step 4: not finite, update skipped; lines of its rows: " in capsys.readouterr().err
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_five_poisoned_batches_end_the_run_with_the_last_good_state(files, tmp_path, monkeypatch):
    runs, output = record_runs(monkeypatch), tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, checkpoint={"every": 1, "keep": 99})
    poison(monkeypatch, range(5, 13))
    with pytest.raises(DivergedError, match="5 times in a row up to step 9") as error:
        program.main([config])
    assert error.value.exit_code == 3
    saved = max(map(int, os.listdir(output / "checkpoints")))
    lines = training_lines(output)
    assert steps_of(lines) == list(range(1, saved + 1))
    assert lines[-1]["skipped_updates"] == saved - 4
    monkeypatch.setattr(Run, "compile_step", None)
    with pytest.raises(DivergedError, match="last good state"):
        program.main([config])
    with Checkpoints(output / "checkpoints") as checkpoints:
        runs[0].restore(checkpoints, 4)
        good = jax.device_get((runs[0].state.trained, runs[0].state.opt_state))
        runs[0].restore(checkpoints, saved)
    last = jax.device_get((runs[0].state.trained, runs[0].state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, last, good)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


def test_a_run_that_ends_in_poisoned_batches_is_not_exported(files, tmp_path, monkeypatch):
    config = write_config(files, tmp_path / "run", **NO_EVAL)
    poison(monkeypatch, range(STEPS - 4, STEPS + 1))
    for _ in range(2):
        with pytest.raises(DivergedError):
            program.main([config])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_was_not_exported_only_needs_the_export(files, plain, tmp_path, monkeypatch):
    output = pathlib.Path(shutil.copytree(plain, tmp_path / "run"))
    shutil.rmtree(output / "adapter")
    monkeypatch.setattr(Run, "compile_step", None)
    program.main([write_config(files, output, **NO_EVAL, checkpoint=None)])
    assert adapter_bytes(output) == adapter_bytes(plain)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_later(
    files, finished, tmp_path, monkeypatch
):
    config = write_config(
        files, tmp_path / "run", evaluation={"exact_match": True, "max_new_tokens": 3}
    )
    evaluate, left = Run.evaluate, [True]

    def slow(run):
        if left and int(run.state.step) == 6:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return evaluate(run)

    monkeypatch.setattr(Run, "evaluate", slow)
    begin = time.monotonic()
    with pytest.raises(InterruptedRunError, match="SIGTERM at step 6, saved") as error:
        program.main([config])
    assert error.value.exit_code == 6
    assert steps_of(evaluation_lines(tmp_path / "run")) == [0]
    assert steps_of(training_lines(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    program.main([config])
    assert time.monotonic() - begin < 60
    whole = output_of(finished)
    assert evaluation_lines(tmp_path / "run") == evaluation_lines(whole)
    for name in ("samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_never_costs_an_evaluation_that_decides_about_the_best(
    files, tmp_path, monkeypatch
):
    def evaluate(run):
        step = int(run.state.step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval_loss": {6: 1.0}.get(step, 2.0)}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)
    output = tmp_path / "run"
    config = write_config(files, output, checkpoint={"best": "eval_loss"}, evaluation={"every": 3})
    with pytest.raises(InterruptedRunError, match="at step 6, saved"):
        program.main([config])
    program.main([config])
    assert {"6", "12"} <= set(os.listdir(output / "checkpoints"))
    assert steps_of(evaluation_lines(output)) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("doing", ["loading the model", "evaluating", "compiling"])
def test_a_signal_before_the_first_step_saves_nothing(files, tmp_path, monkeypatch, doing):
    owner, name = {
        "loading the model": (program, "load_model"),
        "evaluating": (Run, "evaluate"),
        "compiling": (Run, "compile_step"),
    }[doing]
    work = getattr(owner, name)

    def slow(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return work(*args, **options)

    monkeypatch.setattr(owner, name, slow)
    changes = NO_EVAL if doing == "compiling" else {}
    with pytest.raises(InterruptedRunError, match=f"SIGINT while {doing}: nothing new to save"):
        program.main([write_config(files, tmp_path / "run", **changes)])
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("how", ["finished", "to be exported"])
def test_the_next_run_clears_away_what_a_killed_one_left_and_nothing_else(
    files, plain, tmp_path, monkeypatch, how
):
    config = write_config(files, tmp_path / "run", **NO_EVAL, checkpoint={"keep": 1})
    with monkeypatch.context() as patch:  # as if killed before old steps go
        patch.setattr(CheckpointFolder, "prune", lambda *_: None)
        program.main([config])
    output, steps = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(steps)) == ["12", "3", "6", "9"]
    found = {path.relative_to(output) for path in output.rglob("*")}
    expected = {path for path in found if path.parts[1:2] not in [("3",), ("6",), ("9",)]}
    shutil.copytree(steps / "12", steps / "12.deleting")
    shutil.copytree(steps / "12", steps / "13", ignore=lambda *_: ["manifest.json"])
    (steps / "13.unfinished").touch()
    for name in (".adapter.abcdefgh.tmp", ".adapter.zyxwvuts.tmp.old"):
        shutil.copytree(output / "adapter", output / name)
    (output / f".shared-{'0' * 32}").touch()
    mine = {pathlib.Path(".adapter.original"), pathlib.Path("notes.txt")}
    for name in mine:
        (output / name).write_text("mine")
    if how == "to be exported":
        shutil.rmtree(output / "adapter")
    program.main([config])
    assert {path.relative_to(output) for path in output.rglob("*")} == expected | mine
    assert adapter_bytes(output) == adapter_bytes(plain)


def test_a_signal_in_the_last_step_leaves_the_export_for_later(files, plain, tmp_path, monkeypatch):
    config = write_config(files, tmp_path / "run", **NO_EVAL, checkpoint=None)
    stop_at(monkeypatch, STEPS, signal.SIGINT)
    with pytest.raises(InterruptedRunError, match=f"SIGINT at step {STEPS}"):
        program.main([config])
    program.main([config])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)


def test_checkpoint_is_hardly_larger_than_adapter_and_moments(files, tmp_path, getkey):
    config = jp.load_config(
        write_config(files, tmp_path / "run"), ["--method.rank=16", "--method.targets=all-linear"]
    )
    base = toy_model(getkey(), d_model=256, d_ff=768, num_layers=6, head_dim=64)
    mesh = layouts.make_mesh()
    run = Run(config, base, program.read_data(config, load_model_config(files.model)), mesh)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(run.state.adapter.params))
    draw = np.random.default_rng(0)  # what has been trained does not compress
    trained, moments = jax.tree.map(
        lambda x: draw.standard_normal(x.shape, np.float32) if x.ndim else x,
        (run.state.trained, run.state.opt_state),
    )
    run.state = run.state.replace(trained=trained, opt_state=moments)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run.save(checkpoints)
        checkpoints.wait()
    files_ = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files_)
    assert numbers > 400_000
    assert 0.9 * 3 * 4 * numbers < size <= 1.2 * 3 * 4 * numbers + 1_000_000


@pytest.mark.slow
def test_trackers_and_profiler_go_on_with_a_resumed_run(files, tmp_path, monkeypatch):
    codes = []
    close = trackers.Tracker.close
    monkeypatch.setattr(
        trackers.Tracker,
        "close",
        lambda self, exit_code=0: (codes.append(exit_code), close(self, exit_code)),
    )
    output = tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, track={"tensorboard": True})
    stop_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        program.main([config])
    program.main([config, "--profile", "4:6"])  # step 4 was made before
    assert codes == [6, 0]
    assert len(list((output / "tensorboard").iterdir())) == 2
    assert list((output / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["6:4", "0:2", "a:b", "3"])
def test_a_range_to_profile_needs_a_first_and_a_last_step(finished, text):
    with pytest.raises(UserError, match="--profile: expected START:STOP"):
        program.main([finished, "--profile", text])
