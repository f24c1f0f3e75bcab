"""Disks, data workers and trackers that fail while a run goes on."""

import errno
import os
import signal
import threading
import time

import pytest
from tiny_run import training_lines, write_config
from train_runs import NO_EVAL, adapter_bytes, curve, steps_of

from jaxpeft import train as program
from jaxpeft.checkpoints import manifest
from jaxpeft.cli import signals
from jaxpeft.core.errors import InterruptedRunError, LostWorkerError, ResourceError
from jaxpeft.files import folders, patience
from jaxpeft.training import feed
from jaxpeft.training.run import Run

FAULTS = {"full": errno.ENOSPC, "failing": errno.EIO, "denied": errno.EACCES}


@pytest.fixture
def waits(monkeypatch):
    seconds = []
    monkeypatch.setattr(patience.time, "sleep", seconds.append)
    return seconds


def fail(monkeypatch, owner, name, number, times, first=0):
    """Lets a function fail so many times, from some call on."""
    function, calls = getattr(owner, name), []

    def failing(*args, **options):
        calls.append(args)
        if first < len(calls) <= first + times:
            raise OSError(number, os.strerror(number))
        return function(*args, **options)

    monkeypatch.setattr(owner, name, failing)


def make(files, tmp_path, **changes) -> str:
    return write_config(files, tmp_path / "run", **{**NO_EVAL, **changes})


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=pytest.mark.slow if name != "failing" else ()) for name in FAULTS],
)
def test_a_disk_that_fails_for_a_while_costs_a_run_nothing(
    files, plain, tmp_path, monkeypatch, waits, capsys, fault
):
    fail(monkeypatch, manifest, "write", FAULTS[fault], 1, first=1)
    fail(monkeypatch, folders, "_sync_tree", FAULTS[fault], 2)
    program.main([make(files, tmp_path)])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)
    assert curve(tmp_path / "run") == curve(plain)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["12", "9"]
    told = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(told) == len(waits) == 3
    assert "checkpoints/6: cannot be saved" in told[0]
    assert all(f"{tmp_path}/run/adapter: " in line for line in told[1:])


@pytest.mark.parametrize("what", ["save", "export"])
def test_a_disk_that_stays_full_ends_the_run_and_the_same_command_goes_on(
    files, plain, tmp_path, monkeypatch, waits, what
):
    config = make(files, tmp_path)
    with monkeypatch.context() as patch:
        if what == "save":
            fail(patch, manifest, "write", errno.ENOSPC, 99, first=2)
        else:
            fail(patch, folders, "_sync_tree", errno.EROFS, 99)
        with pytest.raises(ResourceError) as error:
            program.main([config])
    assert error.value.exit_code == 5
    assert waits[-len(patience.DELAYS) :] == list(patience.DELAYS)
    kept = ["3", "6"] if what == "save" else ["12", "9"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == kept
    program.main([config])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)
    assert curve(tmp_path / "run") == curve(plain)


def end_at(monkeypatch, step, act) -> None:
    """Lets something happen instead of the batch of a step."""
    iterate = program.iterate

    def ending(plan, first, last, **options):
        for number, batch in enumerate(iterate(plan, first, last, **options), first + 1):
            if number == step:
                act()
            yield batch

    monkeypatch.setattr(program, "iterate", ending)


def test_a_lost_data_worker_ends_the_run_after_saving(files, plain, tmp_path, monkeypatch):
    def die():
        raise LostWorkerError("a data worker ended (exit code -9)")

    config = make(files, tmp_path)
    with monkeypatch.context() as patch:
        end_at(patch, 6, die)
        with pytest.raises(LostWorkerError, match="before step 6; step 5 is saved, run") as error:
            program.main([config])
    assert error.value.exit_code == 5
    assert steps_of(training_lines(tmp_path / "run")) == [1, 2, 3, 4, 5]
    program.main([config])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)


def test_a_stall_is_told_and_a_signal_saves_and_leaves(files, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feed, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(feed, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(signals, "_left_behind", [])
    go_on = threading.Event()

    def stall():
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        go_on.wait(60)

    config = make(files, tmp_path)
    with monkeypatch.context() as patch:
        end_at(patch, 6, stall)
        begin = time.monotonic()
        with pytest.raises(InterruptedRunError, match="SIGTERM at step 5, saved"):
            program.main([config])
        assert time.monotonic() - begin < 30
    go_on.set()
    signals._left_behind[0].join(10)
    assert "waiting for data for 0 s: " in capsys.readouterr().err
    program.main([config])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)


def test_a_tracker_that_cannot_start_is_one_warning(files, plain, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file")
    program.main([make(files, tmp_path, track={"tensorboard": True})])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)
    assert capsys.readouterr().err.count("track.tensorboard: cannot be started") == 1


@pytest.mark.parametrize("moment", ["loading", "compiling"])
def test_a_lack_of_memory_says_what_takes_it_and_what_takes_less(
    files, tmp_path, monkeypatch, moment
):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    owner, name = {"loading": (program, "load_model"), "compiling": (Run, "compile_step")}[moment]
    monkeypatch.setattr(owner, name, exhausted)
    with pytest.raises(ResourceError) as error:
        program.main([make(files, tmp_path)])
    text = str(error.value)
    assert error.value.exit_code == 5
    assert text.startswith("out of memory: ")
    assert text.endswith("(RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.)")
    changes = text.partition("Any of these takes less: ")[2]
    for change in ("train.microbatch_size: 4", "model.quantization: nf4", "data.max_length: 16 "):
        assert change in changes
    if moment == "compiling":  # 22,176 and 1,152 numbers in float32, two moments for the latter
        assert "the base takes 0.1 MiB, the adapter with its optimizer 0.0 MiB" in text
        assert "8 rows of 32 tokens" in text
