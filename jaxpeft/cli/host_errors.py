"""Holds back what JAX's runtime writes on standard error while it ends a process.

When a peer is lost, JAX's runtime logs the failures of its services, then a C++ stack trace, and
aborts the process. The parent (`jaxpeft.cli.hosts`) explains this in one line. So the parent passes
on what the child's C++ code writes, except for what follows the first sign of such an end.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable

from jaxpeft.cli.log_files import open_lossy

_SIGNS = re.compile(
    rb"^[WEF]\d{4} \S+ +\d+ (coordination_service|preemption_sync_manager|client\.h)"
    rb"|^[WEF]\d{4} .*distributed service detected fatal errors"
    rb"|^\*\*\* Check failure stack trace"
)
_MOST_BYTES = 1 << 20


class Relay:
    """Passes lines on until one is a sign of the end; that line and later ones are held back.

    Args:
        write: A function that takes the bytes to pass on.
        seconds: How long lines are held back; a process that lives longer was not about to end.
        clock: A function that gives seconds, for tests.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write, self._seconds, self._clock = write, seconds, clock
        self._begun = b""
        self._waiting: list[bytes] = []
        self._since = 0.0
        self._lock = threading.Lock()

    def take(self, data: bytes) -> None:
        """Takes bytes as they arrive; an incomplete line is held until its end."""
        with self._lock:
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                self._take_line(line + b"\n")

    def _take_line(self, line: bytes) -> None:
        late = self._waiting and self._clock() - self._since > self._seconds
        if late or sum(map(len, self._waiting)) > _MOST_BYTES:
            self._pass_on()
        if not self._waiting and not _SIGNS.search(line):
            self._write(line)
            return
        if not self._waiting:
            self._since = self._clock()
        self._waiting.append(line)

    def end(self, *, drop: bool) -> None:
        """Ends the relay after the process: drops the lines held back, or passes them on."""
        with self._lock:
            if drop and self._waiting:
                self._waiting, self._begun = [], b""
            self._waiting.append(self._begun)
            self._begun = b""
            self._pass_on()

    def _pass_on(self) -> None:
        lines, self._waiting = self._waiting, []
        if text := b"".join(lines):
            self._write(text)


def follow(pipe: int, relay: Relay) -> threading.Thread:
    """Feeds a relay from a pipe, in a thread, until the other end of the pipe is closed."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(pipe, 1 << 16):
                relay.take(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def keep_python_apart(pipe: int) -> None:
    """Redirects file descriptor 2 into a pipe, except for what Python prints on `sys.stderr`."""
    sys.stderr.flush()
    own = os.dup(2)
    sys.stderr = open_lossy(own, sys.stderr)
    os.dup2(pipe, 2)
    os.close(pipe)
