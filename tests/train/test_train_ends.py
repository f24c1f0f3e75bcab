"""A run that ends in numbers that are not finite is no success, and says so again.

What a folder holds already, an earlier result or files of the user's, is left as it is.
"""

import shutil

import numpy as np
import pytest
from tiny_run import evaluation_lines, training_lines, write_config
from train_runs import NO_EVAL, poison

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core.errors import DivergedError, UserError
from jaxpeft.training.run import Run


def require_no_success(config, output, monkeypatch, words):
    """The command ends with 3 and exports nothing; a second call says the same at once."""
    said = []
    for _ in range(2):
        with pytest.raises(DivergedError, match=words) as error:
            program.main([config])
        said.append(str(error.value))
        assert error.value.exit_code == 3
        assert not (output / "adapter").exists()
        monkeypatch.setattr(Run, "compile_step", None)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 1


def test_a_run_shorter_than_the_limit_that_ends_in_nan_is_no_success(files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, train={"steps": 3})
    poison(monkeypatch, {3})
    words = r"the last update, step 3, was skipped because it was not finite \(lines of its rows: "
    require_no_success(config, output, monkeypatch, words)
    assert training_lines(output)[-1]["loss"] is None


def test_a_run_of_which_most_updates_were_skipped_is_no_success(files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, train={"steps": 7})
    poison(monkeypatch, {1, 2, 4, 5})
    require_no_success(config, output, monkeypatch, "4 of 7 updates were skipped")


def test_half_of_the_updates_skipped_is_exported(files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    poison(monkeypatch, {1, 2})
    program.main([write_config(files, output, **NO_EVAL, train={"steps": 4})])
    assert (output / "adapter").exists()


def test_a_last_evaluation_that_is_not_finite_is_no_success(files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    config = write_config(files, output, train={"steps": 2}, evaluation={"every": 1})

    def evaluate(run):
        return {"eval_loss": float("nan") if int(run.state.step) == 2 else 1.0}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)
    words = "the evaluation after the last step, 2, is not finite"
    require_no_success(config, output, monkeypatch, words)
    assert [line["eval_loss"] for line in evaluation_lines(output)] == [1.0, 1.0, None]


@pytest.mark.parametrize("optim", [{"learning_rate": 3e38, "clip_norm": None, "name": "sgd"}])
def test_rates_that_overflow_leave_finite_checkpoints_and_exit_3(
    files, tmp_path, monkeypatch, optim
):
    output, restored = tmp_path / "run", []
    config = write_config(
        files, output, **NO_EVAL, optim=optim, checkpoint={"every": 1, "keep": 99}
    )
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, step, leaves, **more: (
            restored.extend(np.array(x) for x in leaves.values() if x.dtype == np.float32),
            save(self, step, leaves, **more),
        )[1],
    )
    with pytest.raises(DivergedError) as error:
        program.main([config])
    assert error.value.exit_code == 3
    assert restored
    assert all(np.isfinite(leaf).all() for leaf in restored)
    assert not (output / "adapter").exists()


CONSTANT = {"learning_rate": 0.01, "schedule": "constant"}


@pytest.fixture(scope="module")
def short(files, tmp_path_factory):
    """The config and the folder of a finished run that can go on; don't change it."""
    output = tmp_path_factory.mktemp("short") / "run"
    config = write_config(files, output, **NO_EVAL, optim=CONSTANT, train={"steps": 2})
    program.main([config])
    return config, output


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_that_goes_on_and_fails_leaves_the_result_it_had(short, tmp_path, capsys):
    config, output = short[0], shutil.copytree(short[1], tmp_path / "run")
    before = contents(output / "adapter")
    changes = ["--output_dir", str(output), "--train.steps", "4", "--optim.learning_rate", "3e38"]
    for _ in range(2):  # the second finds that all steps are done
        with pytest.raises(DivergedError, match="nothing is exported"):
            program.main([config, *changes, "--accept_changes", "optim.learning_rate"])
        assert contents(output / "adapter") == before
    assert "already finished" not in capsys.readouterr().out


@pytest.mark.parametrize("how", [["--train.steps", "4"], ["--overwrite"]])
def test_a_run_removes_no_files_that_lie_beside_its_result(short, tmp_path, how):
    config, output = short[0], shutil.copytree(short[1], tmp_path / "run")
    (output / "adapter" / "notes.txt").write_text("mine")
    before = contents(output / "adapter")
    with pytest.raises(
        UserError, match=r"adapter: holds other files, which .*: notes\.txt"
    ) as error:
        program.main([config, "--output_dir", str(output), *how])
    assert error.value.exit_code == 2
    assert contents(output / "adapter") == before
    assert jp.load_config(str(output / "config.yaml")).train.steps == 2
    program.main([config, "--output_dir", str(output)])  # it is finished all the same
    assert contents(output / "adapter") == before


def test_a_model_folder_with_other_files_is_not_discarded(short, tmp_path):
    config, output = short[0], shutil.copytree(short[1], tmp_path / "run")
    (output / "model").mkdir()
    (output / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"model: exists and is no saved model"):
        program.main([config, "--output_dir", str(output), "--overwrite"])
    assert (output / "model" / "notes.txt").read_text() == "mine"
