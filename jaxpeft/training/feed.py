"""Gives batches to a training loop; it reports stalls, and a signal ends the wait.

The batches come from an iterator that may start processes of its own
(`jaxpeft.data.batches.iterate`). A thread asks it for one batch ahead, so that the loop never
blocks in it.
"""

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxpeft.cli import signals

WATCH_SECONDS = 60.0
"""Seconds after which a wait is reported, and reported again."""
PATIENCE_SECONDS = 2.0
"""Seconds that a batch may still take after a stop was requested."""
_POLL_SECONDS = 0.05
_LEAVE_SECONDS = 5.0


class Batches:
    """Batches, read one ahead. Leaving the ``with`` block ends processes that the iterator started.

    Args:
        iterator: Gives one batch for every step.
        tell: Called with a line of text when a batch takes long.
        stop: Returns the name of the signal that requests a stop, or None.
        workers: The number of processes that the iterator reads with, for the text.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        *,
        tell: Callable[[str], None],
        stop: Callable[[], str | None],
        workers: int = 0,
    ):
        self._iterator, self._tell, self._stop, self._workers = iterator, tell, stop, workers
        self._others = set(multiprocessing.active_children())
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self._asked.put(True)

    def next(self, step: int) -> Any:
        """The batch of a step.

        Args:
            step: Its number, for the text.

        Returns:
            The batch, or None if a stop was requested and the batch did not come.

        Raises:
            Exception: The iterator's own exception.
        """
        begin = told = time.monotonic()
        requested: float | None = None
        while True:
            try:
                batch, error = self._answers.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                now = time.monotonic()
                if now - told >= WATCH_SECONDS:
                    told = now
                    self._tell(self._describe(step, now - begin))
                if requested is None and self._stop():
                    requested = now
                if requested is not None and now - requested >= PATIENCE_SECONDS:
                    return None
                continue
            if error is not None:
                raise error
            self._asked.put(True)
            return batch

    def _describe(self, step: int, seconds: float) -> str:
        count = self._workers
        whose = f"{count} data worker{'s' * (count > 1)}" if count else "a thread of this process"
        return (
            f"warning: waiting for data for {seconds:.0f} s: {whose} should give the batch of "
            f"step {step}; SIGTERM saves and stops"
        )

    def _read(self) -> None:
        while self._asked.get():
            try:
                self._answers.put((next(self._iterator), None))
            except BaseException as error:
                self._answers.put((None, error))
                return

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self._asked.put(False)
        self._thread.join(1)
        if self._thread.is_alive():
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()
            self._thread.join(_LEAVE_SECONDS)
        if self._thread.is_alive():
            signals.leave_behind(self._thread)
        elif close := getattr(self._iterator, "close", None):
            close()
