"""Profiles of training steps, for XProf."""

from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.core.errors import UserError
from jaxpeft.files import storage


def parse_range(text: str | None) -> range:
    """The steps in ``--profile START:STOP``, both included; an empty range for None.

    Raises:
        UserError: The text is no such range.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile: expected START:STOP, such as 3:5, got {text!r}")
    return range(int(first), int(last) + 1)


class Trace:
    """Records a profile of some steps, as far as this process makes them."""

    def __init__(self, folder: storage.StoragePath, steps: range):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        """Starts recording at the first of the steps."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Waits for the last of the steps and writes the profile."""
        if self._on and step == self._steps[-1]:
            wait()
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
