"""The first signal asks, the second ends; a call that cannot be stopped is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from places import ROOT

from jaxpeft.cli.signals import StopRequest
from jaxpeft.core.errors import InterruptedRunError


def eventually(condition, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_by_name(number, capfd):
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert eventually(lambda: stop.requested == number.name)
    assert f"{number.name}: stopping after the steps under way" in capfd.readouterr().err


def test_old_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_no_thread_or_pipe_is_left():
    files = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(3):
        with StopRequest():
            pass
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_run_interruptible_returns_and_raises_what_the_call_does():
    with StopRequest() as stop:
        assert stop.run_interruptible(lambda: 42) == 42
        with pytest.raises(ZeroDivisionError):
            stop.run_interruptible(lambda: 1 / 0)


def test_a_stop_is_noticed_while_the_call_still_runs():
    release = threading.Event()
    with StopRequest() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(InterruptedRunError, match="by SIGTERM while loading") as caught:
            stop.run_interruptible(lambda: release.wait(30), doing="loading")
        assert time.monotonic() - began < 5
    release.set()
    assert caught.value.exit_code == 6


def run_child(body: str) -> subprocess.CompletedProcess:
    code = (
        "import os, signal, sys, threading, time\nfrom jaxpeft.cli.signals import StopRequest\n"
        + body
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_second_signal_ends_the_process_even_while_its_main_thread_is_busy_in_c():
    done = run_child("""
def twice():
    for _ in range(2):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=twice, daemon=True).start()
with StopRequest():
    import ctypes
    for _ in range(20):  # usleep goes back to sleep for the rest after a signal, in C
        ctypes.CDLL(None).sleep(1)
""")
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: stopping now" in done.stderr


def test_a_process_that_gave_up_a_call_exits_6_without_waiting_for_it():
    done = run_child("""
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
print("printed")
from jaxpeft.core.errors import UserError
try:
    with StopRequest() as stop:
        stop.run_interruptible(lambda: time.sleep(60))
except UserError as error:
    sys.exit(error.exit_code)
""")
    assert (done.returncode, done.stdout) == (6, "printed\n")


def test_signals_of_a_forked_child_are_not_the_runs():
    done = run_child("""
with StopRequest() as stop:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    time.sleep(0.2)
    print(os.WTERMSIG(status), stop.requested)
""")
    assert done.stdout == f"{int(signal.SIGTERM)} None\n", done.stderr
