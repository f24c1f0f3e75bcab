"""The training command in processes of its own: stopped anywhere, it ends in the same bytes."""

import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from places import HELPERS, ROOT
from tiny_run import evaluation_lines, make_files, training_lines, write_config

COMMAND = [sys.executable, "-m", "jaxpeft.train"]
DROPOUT = {"method": {"dropout": 0.1}}
FAULTY = [sys.executable, str(HELPERS / "faulty_train.py")]


def start(command, *, quick=True) -> subprocess.Popen:
    """Starts a command as a user would, on one device; `quick` compiles in a hurry."""
    hidden = ("XLA_FLAGS", "PYTEST_VERSION", "PYTEST_CURRENT_TEST", "JAXPEFT_REEXECUTED")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    if quick:
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)


def run(*command) -> tuple[int, str]:
    """Runs a command to its end: its exit status, and what it said on standard error."""
    process = start(command)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def final(output: pathlib.Path) -> dict:
    """All that must not depend on how often a run was stopped."""
    told = ("step", "loss", "learning_rate", "grad_norm", "supervised_tokens", "skipped_updates")
    return {
        "adapter": (output / "adapter" / "adapter_model.safetensors").read_bytes(),
        "training": [{name: line[name] for name in told} for line in training_lines(output)],
        "evaluations": evaluation_lines(output),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """What a run ends with that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    code, errors = run(*COMMAND, write_config(files, output, **DROPOUT))
    assert code == 0, errors
    return final(output)


def stop(config: str, moment: str, name: str) -> str:
    """Runs the command until a moment, checks how it ended, and returns what it said."""
    code, errors = run(*FAULTY, moment, name, config)
    assert code == (-signal.SIGKILL if name == "SIGKILL" else 6), errors
    assert "Traceback" not in errors
    if name != "SIGKILL":
        assert f"error: interrupted by {name} " in errors
    return errors


def test_run_killed_in_a_step_and_while_saving_ends_byte_identical(files, tmp_path, whole):
    config = write_config(files, tmp_path / "run", **DROPOUT)
    stop(config, "step:2", "SIGKILL")
    stop(config, "save:9", "SIGKILL")
    code, errors = run(*COMMAND, config)
    assert code == 0, errors
    assert final(tmp_path / "run") == whole


@pytest.mark.slow
def test_run_stopped_in_every_way_ends_byte_identical(files, tmp_path, whole):
    config = write_config(files, tmp_path / "run", **DROPOUT)
    stop(config, "step:2", "SIGKILL")
    assert "at step 5, saved" in stop(config, "step:5", "SIGTERM")
    assert "while compiling: nothing new to save" in stop(config, "compile", "SIGINT")
    interrupt_twice(config)
    stop(config, "evaluate:6", "SIGKILL")
    stop(config, "save:9", "SIGKILL")
    stop(config, "export", "SIGKILL")
    assert not (tmp_path / "run" / "adapter").exists()
    code, errors = run(*COMMAND, config)
    assert code == 0, errors
    assert final(tmp_path / "run") == whole


def interrupt_twice(config: str) -> None:
    """Sends SIGINT into a step that takes a minute, and again: the second one ends it at once."""
    with start([*FAULTY, "slow:60", "-", config]) as process:
        wait_for("going on after step 5", process.stderr)
        process.send_signal(signal.SIGINT)
        wait_for("SIGINT: ", process.stderr)
        process.send_signal(signal.SIGINT)
        wait_for("SIGINT again: ", process.stderr)
        assert process.wait(timeout=10) == 128 + signal.SIGINT


def wait_for(words: str, lines) -> None:
    assert any(line.startswith(words) for line in lines)


def test_bad_input_is_one_line_without_a_traceback(files, tmp_path):
    config = write_config(files, tmp_path / "run", data={"train": "nowhere.jsonl"})
    code, errors = run(*COMMAND, config)
    lines = [line for line in errors.splitlines() if not line.startswith("[transformers]")]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: nowhere.jsonl: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_run_killed_at_random_times_ends_byte_identical(files, tmp_path, long_run, seed):
    expected, seconds, changes = long_run
    draw = random.Random(seed)
    config = write_config(files, tmp_path / "run", **changes)
    for _ in range(draw.randint(1, 4)):
        process = start([*FAULTY, "slow:0.03", "-", config], quick=False)
        try:
            process.communicate(timeout=draw.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            _, errors = process.communicate(timeout=60)
            assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 0, 6), errors
    code, errors = start_and_wait(config)
    assert code == 0, errors
    assert final(tmp_path / "run") == expected


def start_and_wait(config: str) -> tuple[int, str]:
    process = start([*COMMAND, config], quick=False)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.fixture(scope="module")
def long_run(files, tmp_path_factory):
    """A run of 60 steps: what it ends with, its seconds, and its config's changes."""
    import time

    changes = {
        "train": {"steps": 60},
        "method": {"dropout": 0.1},
        "evaluation": {"every": 20},
        "checkpoint": {"every": 7},
    }
    output = tmp_path_factory.mktemp("long") / "run"
    config, begin = write_config(files, output, **changes), time.monotonic()
    process = start([*FAULTY, "slow:0.03", "-", config], quick=False)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(training_lines(output)) == 60
    return final(output), time.monotonic() - begin, changes
