"""The progress of a run: one live line on a terminal, plain lines anywhere else.

    step 12/200  loss 1.234  lr 2.0e-04  312 tokens/s  ETA 1:23

The remaining time is estimated from the last steps only. The first step of a process is left out
because it compiles, and so is the time inside `Progress.paused`, such as an evaluation. The
estimate of ``rich.progress`` can leave out neither, and it prints no plain lines; so of rich only
`Live` is used.
"""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, SupportsFloat

from rich.live import Live
from rich.text import Text

from jaxpeft.reports.tables import is_live_terminal, make_console, number

REDRAW_SECONDS = 0.25
PLAIN_LINES = 20
_WINDOW = 20


class Progress:
    """Shows the progress of training; as a context manager it restores the terminal.

    Values are turned into numbers only when they are shown, so passing arrays that are still being
    computed does not make every step wait.

    Args:
        total_steps: The last step.
        first_step: The number of steps that a resumed run did before.
        stream: A text stream; standard error by default.
        plain_every: Steps between plain lines; by default a run has about twenty lines.
        enabled: False shows nothing; for all processes but the first.
        clock: A function that gives seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        stream: Any = None,
        plain_every: int | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._first = total_steps, first_step, first_step
        self._stream = stream or sys.stderr
        self._every = plain_every or max(1, math.ceil(total_steps / PLAIN_LINES))
        self._enabled, self._clock = enabled, clock
        self._timer = StepTimer(clock)
        self._latest: _Values | None = None
        self._drawn_at = -math.inf
        self._drawn_step = first_step
        self._live: Live | None = None
        if enabled and is_live_terminal(self._stream):
            # Other output is printed above the line, unless it goes to a file.
            self._live = Live(
                Text(""),
                console=make_console(self._stream),
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._draw(self._head() + ("  compiling" if first_step < total_steps else ""))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: SupportsFloat,
        learning_rate: SupportsFloat,
        tokens_per_second: SupportsFloat,
        skipped: int = 0,
    ) -> None:
        """Call it once after every step.

        Args:
            step: Steps done, counted from the start of the run.
            loss: The loss of this step.
            learning_rate: The learning rate of this step.
            tokens_per_second: Tokens that are not padding, per second.
            skipped: Updates skipped so far because they were not finite.
        """
        self._step = step
        self._timer.mark(step)
        self._latest = _Values(loss, learning_rate, tokens_per_second, skipped)
        if not self._enabled:
            return
        is_last = step >= self._total
        if self._live is not None:
            if is_last or self._clock() - self._drawn_at >= REDRAW_SECONDS:
                self._draw(self._line())
        elif is_last or step % self._every == 0 or step == self._first + 1:
            self._write(self._line())

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Shows `what` instead of training, and leaves the time of the block out of the ETA."""
        self._timer.pause()
        if self._live is not None:
            self._draw(f"{self._head()}  {what}")
        elif self._enabled and self._latest is None:  # nothing was printed yet
            self._write(f"{self._head()}  {what}")
        try:
            yield
        finally:
            self._timer.resume()
            if self._live is not None and self._latest is not None:
                self._draw(self._line())

    def note(self, text: str) -> None:
        """Prints a line above the live line."""
        if self._live is not None:
            self._live.console.print(Text(text), soft_wrap=True)
        elif self._enabled:
            self._write(text)

    def close(self) -> None:
        """Leaves the last line on the terminal; may be called twice."""
        if self._live is None:
            return
        if self._latest is None:
            self._draw(self._head())
        elif self._drawn_step != self._step:
            self._draw(self._line())
        self._live.stop()
        self._live = None
        self._enabled = False

    def _head(self) -> str:
        return f"step {self._step}/{self._total}"

    def _line(self) -> str:
        values = self._latest
        assert values is not None
        parts = [
            self._head(),
            f"loss {number(float(values.loss))}",
            f"lr {float(values.learning_rate):.1e}",
            f"{_rate(float(values.tokens_per_second))} tokens/s",
        ]
        if values.skipped:
            parts.append(f"{values.skipped} skipped")
        left, per_step = self._total - self._step, self._timer.seconds_per_step()
        if left <= 0:
            parts.append(f"took {duration(self._timer.elapsed())}")
        elif per_step is not None:
            parts.append(f"ETA {duration(left * per_step)}")
        return "  ".join(parts)

    def _draw(self, line: str) -> None:
        assert self._live is not None
        self._drawn_at, self._drawn_step = self._clock(), self._step
        self._live.update(Text(line, no_wrap=True, overflow="crop"), refresh=True)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class StepTimer:
    """Seconds per step, over the last steps, without the first one and without pauses."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._start = clock()
        self._paused = 0.0
        self._paused_at: float | None = None
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW + 1)

    def mark(self, step: int) -> None:
        """Records that `step` is done."""
        self._marks.append((self._clock() - self._paused, step))

    def pause(self) -> None:
        """Stops counting time."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Counts time again."""
        if self._paused_at is not None:
            self._paused += self._clock() - self._paused_at
            self._paused_at = None

    def seconds_per_step(self) -> float | None:
        """None until two steps are done."""
        if len(self._marks) < 2 or self._marks[-1][1] <= self._marks[0][1]:
            return None
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first)

    def elapsed(self) -> float:
        """Seconds since this process began its part of the run, pauses included."""
        return self._clock() - self._start


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: ``1:23`` or ``2:01:23``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Values(NamedTuple):
    loss: SupportsFloat
    learning_rate: SupportsFloat
    tokens_per_second: SupportsFloat
    skipped: int


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
