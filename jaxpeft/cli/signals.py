"""Stopping on SIGTERM and SIGINT: the first asks the run to save and stop, the second ends it.

Python runs a signal handler in the main thread, between two bytecodes, so it waits for a compile or
a device to return. Two things help. A thread reads every signal's number from a pipe that the
C-level handler writes to (`signal.set_wakeup_fd`), so the second signal ends the process even while
the main thread is inside XLA. And `StopRequest.run_interruptible` moves a long call that cannot be
stopped, such as a compile, out of the main thread.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from jaxpeft.core.errors import InterruptedRunError
from jaxpeft.core.notes import say_now

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_left_behind: list[threading.Thread] = []


class StopRequest:
    """Notes SIGTERM and SIGINT while its ``with`` block runs; the loop asks `requested`.

    The second signal exits at once with status 128 + its number; the last checkpoint is complete in
    any case. Outside of the main thread nothing is installed. Forked children get the earlier
    handlers, and leaving the block restores them.

    Attributes:
        requested: The name of the signal seen ("SIGTERM", "SIGINT"), or None.

    Example:
        >>> with StopRequest() as stop:
        ...     for step in range(3):
        ...         if stop.requested:
        ...             break
        >>> step
        2
    """

    def __init__(self):
        self.requested: str | None = None
        self._count = 0
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher = threading.Thread(target=self._watch, args=self._pipe[:1], daemon=True)
        self._watcher.start()
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._old_handlers = {n: signal.signal(n, self._handle) for n in _SIGNALS}
        os.register_at_fork(after_in_child=self._leave_to_parent)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pipe is None or self._watcher is None:
            return
        self._restore()
        os.write(self._pipe[1], b"\0")
        self._watcher.join()
        self._close()

    def note(self, step: int) -> None:
        """Is called after every step; several processes agree here to stop."""

    def run_interruptible(self, call: Callable[[], T], doing: str = "compiling") -> T:
        """Runs `call` in a thread, and stops waiting for it when a stop is requested.

        It is meant for work before there is anything to save: ``lowered.compile()``, loading. JAX's
        context managers (meshes, default precision) belong to a thread, so lower first and pass
        only the compile, or enter them inside `call`. If a stop comes first, the thread is left
        running. C++ code in it would outlive the interpreter, so if it is still busy at the end,
        the process exits without the interpreter's shutdown (after flushing output, with exit code
        6).

        Args:
            call: The work.
            doing: A name for the work, for the error.

        Returns:
            The result of `call`; its exceptions are raised here.

        Raises:
            InterruptedRunError: A stop was requested before `call` was done.
        """
        result: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                result.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and not self.requested:
            thread.join(0.05)
        if errors:
            raise errors[0]
        if result:
            return result[0]
        atexit.register(_end_without_waiting_for, thread)
        raise InterruptedRunError(
            f"interrupted by {self.requested} while {doing}: nothing new to save; run the same "
            "command to go on"
        )

    def _handle(self, number: int, _: Any) -> None:
        self.requested = self.requested or signal.Signals(number).name

    def _watch(self, read_end: int) -> None:
        while (number := os.read(read_end, 1)) != b"\0":
            if number[0] not in _SIGNALS:
                continue
            self._count += 1
            name = signal.Signals(number[0]).name
            self.requested = self.requested or name
            if self._count > 1:
                say_now(f"{name} again: stopping now; the last checkpoint is intact")
                os._exit(128 + number[0])
            say_now(f"{name}: stopping after the steps under way; a second signal stops at once")

    def _leave_to_parent(self) -> None:
        """In a forked child: restores handlers, because the child's signals are not the run's."""
        self._restore()
        self._close()

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None

    def _restore(self) -> None:
        if self._old_handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._old_handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._old_handlers = {}


def leave_behind(thread: threading.Thread) -> None:
    """Records a thread that cannot be ended; `end` waits neither for it nor for its children."""
    _left_behind.append(thread)


def end(code: Any) -> NoReturn:
    """Ends the program with an exit code, at once if a thread was left behind.

    Raises:
        SystemExit: No thread was left behind.
    """
    if any(thread.is_alive() for thread in _left_behind):
        _flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _end_without_waiting_for(thread: threading.Thread) -> None:
    if thread.is_alive():
        _flush()
        os._exit(InterruptedRunError.exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
