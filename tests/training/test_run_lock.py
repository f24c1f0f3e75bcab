"""A folder has one run at a time, and a killed run blocks nobody."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from places import ROOT

from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.training.output.lock import RunLock

HOLD = """
import sys, os, time
from jaxpeft.training.output.lock import RunLock
with RunLock(sys.argv[1]):
    if sys.argv[2] == "fork":
        born, tell = os.pipe()
        if os.fork() == 0:
            os.write(tell, b".")
            sys.stdout.close()
            time.sleep(60)
        os.read(born, 1)  # a child that has just begun may still hold the folder
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the folder; ended at the end of the test."""
    started = []

    def start(how="alone"):
        command = [sys.executable, "-c", HOLD, str(tmp_path), how]
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path, hold):
    child = hold()
    where = rf"pid {child.pid} on {socket.gethostname()}.*another output_dir"
    with pytest.raises(UserError, match=where), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_run_frees_the_folder_even_if_its_forked_children_live(tmp_path, hold, how):
    child = hold(how)
    child.kill()
    child.wait()
    notes = []
    with RunLock(tmp_path, note=notes.append):
        pass
    assert notes == [
        f"{tmp_path}: taken over from a run that ended (pid {child.pid} on {socket.gethostname()})"
    ]


def test_a_run_that_ended_well_leaves_no_trace(tmp_path):
    notes = []
    for _ in range(2):
        with RunLock(tmp_path / "new", note=notes.append) as lock:
            assert (
                lock.path.read_text()
                == f'{{"pid": {os.getpid()}, "host": "{socket.gethostname()}"}}'
            )
    assert notes == []
    assert list((tmp_path / "new").iterdir()) == []


def test_a_run_that_had_begun_leaves_an_empty_lock(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path, note=pytest.fail) as lock:
            lock.begin()
    with RunLock(tmp_path, note=pytest.fail):
        pass
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_lock_that_its_holder_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    lock, other = RunLock(tmp_path), RunLock(tmp_path)
    lock.__enter__()
    flock = fcntl.flock

    def wait_for_the_holder(file, how):
        monkeypatch.undo()
        lock.__exit__()  # between the opening and the locking of the other
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", wait_for_the_holder)
    with other:
        assert os.path.samestat(os.stat(other.path), os.fstat(other._file))
        with pytest.raises(UserError, match="another run"), RunLock(tmp_path):
            pass


def test_the_folder_is_free_after_an_error_inside(tmp_path):
    def fail():
        with RunLock(tmp_path):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with RunLock(tmp_path):
        pass


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()}"), RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file/run: cannot be written: Not a directory"):
        RunLock(tmp_path / "file/run").__enter__()


def test_garbage_in_the_lock_file_does_not_matter(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff[garbage")
    with RunLock(tmp_path):
        pass
