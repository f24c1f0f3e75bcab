"""Runs a process of several in a child; the parent explains in one line why it was ended."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from jaxpeft.cli import host_errors
from jaxpeft.cli.find_hosts import Hosts, cannot_meet
from jaxpeft.core.errors import UserError
from jaxpeft.core.notes import say_now, write_error

LOST_EXIT_CODE = 7
LEAVING_SECONDS = 10  # how long a failed process waits for others to fail too
JOINED = b"\xff"


def run_in_child(hosts: Hosts) -> int:
    """Forks, and returns in the child process only.

    Returns:
        A file descriptor. The child writes to it what the parent must know: that it has joined, and
        its exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    hear, tell = os.pipe()
    errors, runtime = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(runtime)
        _supervise(child, hear, errors, hosts)
    os.close(hear)
    os.close(errors)
    host_errors.keep_python_apart(runtime)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with its parent
    if os.getppid() != parent:  # the parent died before that
        os._exit(128 + signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent too
    return tell


def _supervise(child: int, hear: int, errors: int, hosts: Hosts) -> NoReturn:
    """Waits for the child, passes signals on to it, and exits with its code.

    Args:
        child: Its process id.
        hear: The pipe that the child writes to, see `run_in_child`.
        errors: The pipe with what its C++ code writes on standard error.
        hosts: The processes of the run, for messages.
    """
    seen = []
    relay = host_errors.Relay(write_error, hosts.heartbeat + 60)
    reading = host_errors.follow(errors, relay)

    def hand_on(number: int, _: Any) -> None:
        seen.append(number)
        name = signal.Signals(number).name
        if len(seen) == 1:
            say_now(
                f"{name}: all processes stop after a step; a second signal stops this one at once"
            )
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reading.join(1)  # its own children may live on and hold the pipe
    relay.end(drop=status == -signal.SIGABRT)
    told = os.read(hear, 64)
    code = 128 - status if status < 0 else status
    if status == -signal.SIGABRT:
        if told[-1:] not in (b"", JOINED):
            code = told[-1]
        elif told:
            code = LOST_EXIT_CODE
            say_now(
                "error: another process of this run ended or cannot be reached; its own output "
                "says why. The same command on all of them goes on from the last checkpoint."
            )
        else:
            code = UserError.exit_code
            say_now(f"error: {cannot_meet(hosts)}")
    elif status == -signal.SIGKILL:
        say_now("error: this process was killed; the last checkpoint is intact")
    os._exit(code)


def silence() -> None:
    """Drops everything written on standard error from now on."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops everything that the block writes on standard error, C++ code included."""
    before = os.dup(2)
    silence()
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
