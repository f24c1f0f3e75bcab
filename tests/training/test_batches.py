"""A loop waits for batches, but not for ever, and never without a word."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from places import HELPERS, ROOT

from jaxpeft.cli import signals
from jaxpeft.core.errors import LostWorkerError
from jaxpeft.data.batches import Plan, iterate
from jaxpeft.training import feed as module
from jaxpeft.training.feed import Batches


def never():
    return None


def test_batches_come_in_order_and_the_iterator_is_closed():
    closed = []

    def numbers():
        try:
            yield from range(3)
        finally:
            closed.append(True)

    with Batches(numbers(), tell=pytest.fail, stop=never) as batches:
        assert [batches.next(step) for step in (1, 2, 3)] == [0, 1, 2]
    assert closed == [True]


def test_what_the_iterator_raises_is_raised_where_the_loop_waits():
    def broken():
        yield 1
        raise KeyError("row")

    with Batches(broken(), tell=pytest.fail, stop=never) as batches:
        assert batches.next(1) == 1
        with pytest.raises(KeyError, match="row") as error:
            batches.next(2)
    assert error.traceback[-1].name == "broken"


def test_a_stall_is_told_again_and_again_and_names_the_wait(monkeypatch):
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.2)
    lines, go_on = [], threading.Event()

    def stalling():
        yield 1
        go_on.wait(30)
        yield 2

    def tell(text):
        lines.append(text)
        if len(lines) == 2:
            go_on.set()

    with Batches(stalling(), tell=tell, stop=never, workers=3) as batches:
        assert (batches.next(6), batches.next(7)) == (1, 2)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("warning: waiting for data for 0 s: 3 data workers should give the ")
        assert "batch of step 7" in line


def test_a_signal_ends_a_wait_but_not_a_batch_that_comes(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(signals, "_left_behind", [])
    go_on = threading.Event()

    def stalling():
        yield 1
        go_on.wait(30)

    with Batches(stalling(), tell=pytest.fail, stop=lambda: "SIGTERM") as batches:
        assert batches.next(1) == 1
        begin = time.monotonic()
        assert batches.next(2) is None
        assert time.monotonic() - begin < 5
    (left,) = signals._left_behind
    assert left.is_alive()
    go_on.set()
    left.join(10)


class Plan(Plan):
    """Stands for a plan, one of whose batches never comes."""

    def __init__(self, how: str):
        self.how = how

    def batch(self, step, rows=None):
        del rows
        if step == 2 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and self.how == "stalls":
            time.sleep(300)
        return {"step": step}


def test_a_killed_worker_is_named_with_its_exit_code():
    def read_all():
        read = iterate(Plan("killed"), 0, 9, workers=1)
        with Batches(read, tell=print, stop=never) as batches:
            for step in range(9):
                batches.next(step)

    with pytest.raises(LostWorkerError, match=r"^a data worker ended \(exit code -9\)$") as error:
        read_all()
    assert error.value.exit_code == 5


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_program_whose_data_stall_ends_as_soon_as_it_is_told(workers):
    command = [sys.executable, __file__, workers]
    paths = os.pathsep.join(map(str, (ROOT, HELPERS)))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    left = float(done.stdout)
    assert time.time() - left < 15


def end_while_data_stall(_) -> int:
    workers = int(sys.argv[1])
    module.PATIENCE_SECONDS = module._LEAVE_SECONDS = 0.5
    asked = []
    read = iterate(Plan("stalls"), 0, 9, workers=workers)
    with Batches(
        read, tell=print, stop=lambda: "SIGTERM" if asked else None, workers=workers
    ) as batches:
        for step in range(2):
            assert batches.next(step) == {"step": step}
        asked.append(True)
        assert batches.next(2) is None
        print(time.time())
    return 6


if __name__ == "__main__":
    from jaxpeft.cli import exits

    exits.run(end_while_data_stall)
