"""What a runtime writes on standard error as it ends a process: kept back, and dropped if known.

When a peer is lost JAX's runtime logs what its services met, then a stack trace of C++, and aborts
the process. What it means is said in one line by the parent (`jaxpeft.cli.hosts`); so the parent
passes on what the child's C++ code writes, but for what follows the first sign of that end.
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
    """Passes lines on, until one is a sign of the end; those from there on wait.

    Args:
        write: Takes what is passed on.
        seconds: How long lines wait: whoever lives longer than that was not about to end.
        clock: Seconds, for tests.
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
        """Takes bytes as they come; a line waits for its end."""
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
        """The process has ended: what waits is dropped, if its end is known, or passed on."""
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
    """Feeds a relay from a pipe, in a thread, until nobody has its other end."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(pipe, 1 << 16):
                relay.take(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def keep_python_apart(pipe: int) -> None:
    """Leads file descriptor 2 into a pipe, but for what Python prints on `sys.stderr`."""
    sys.stderr.flush()
    own = os.dup(2)
    sys.stderr = open_lossy(own, sys.stderr)
    os.dup2(pipe, 2)
    os.close(pipe)
