import io
import itertools

import pytest

from jaxpeft.reports.progress import Progress, StepTimer, duration

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


def run(progress, clock, steps, seconds=1.0, **values):
    values = {"loss": 1.2341, "learning_rate": 2e-4, "tokens_per_second": 312.4, **values}
    for step in steps:
        clock.now += seconds
        progress.update(step, **values)


def test_piped_progress_is_about_twenty_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream, clock = io.StringIO(), Clock()
    with Progress(1999, stream=stream, clock=clock) as progress:
        run(progress, clock, range(1, 2000))
    lines = stream.getvalue().splitlines()
    assert ESCAPE not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("step 1/1999  ")
    assert lines[-1].startswith("step 1999/1999  ")


def test_line_has_loss_rate_speed_and_time_left():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(85, stream=stream, plain_every=1, clock=clock)
    run(progress, clock, range(1, 3))
    assert stream.getvalue().splitlines()[-1] == (
        "step 2/85  loss 1.234  lr 2.0e-04  312 tokens/s  ETA 1:23"
    )


def test_first_step_of_a_process_does_not_count_for_the_time_left():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(200, 100, stream=stream, plain_every=1, clock=clock)
    run(progress, clock, [101], seconds=600.0)
    assert "ETA" not in stream.getvalue()
    run(progress, clock, [102, 103, 104], seconds=2.0)
    assert stream.getvalue().rstrip().endswith(f"ETA {duration(96 * 2.0)}")


def test_time_of_an_evaluation_does_not_count_for_the_time_left():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(20, stream=stream, plain_every=1, clock=clock)
    run(progress, clock, [1, 2])
    with progress.paused("evaluating"):
        clock.now += 500
    run(progress, clock, [3])
    assert stream.getvalue().rstrip().endswith("ETA 0:17")


def test_time_left_follows_the_last_steps():
    clock = Clock()
    timer = StepTimer(clock)
    for step, seconds in enumerate(itertools.chain([9.0] * 50, [1.0] * 30)):
        clock.now += seconds
        timer.mark(step)
    assert timer.seconds_per_step() == 1.0


def test_last_line_says_how_long_it_took():
    stream, clock = io.StringIO(), Clock()
    run(Progress(3, stream=stream, clock=clock), clock, [1, 2, 3], seconds=30.0, skipped=2)
    assert stream.getvalue().rstrip().endswith("312 tokens/s  2 skipped  took 1:30")


def test_live_line_is_redrawn_at_most_four_times_a_second(terminal):
    clock = Clock()
    with Progress(1000, stream=terminal, clock=clock) as progress:
        run(progress, clock, range(1, 500), seconds=0.01)
        drawn = terminal.getvalue().count("loss")
    assert 15 <= drawn <= 21
    assert "step 499/1000" in terminal.getvalue()


def test_values_are_read_only_when_they_are_shown(terminal):
    class Pending:
        reads = 0

        def __float__(self):
            Pending.reads += 1
            return 1.0

    clock = Clock()
    with Progress(1000, stream=terminal, clock=clock) as progress:
        run(progress, clock, range(1, 26), seconds=0.01, loss=Pending())
        assert Pending.reads == 0


def test_live_line_keeps_within_a_narrow_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    clock = Clock()
    with Progress(10, stream=terminal, clock=clock) as progress:
        run(progress, clock, [1, 2, 3])
    assert "step 3/10  loss" in terminal.getvalue()
    assert "tokens" not in terminal.getvalue()


def test_notes_stand_on_lines_of_their_own(terminal):
    clock = Clock()
    with Progress(10, stream=terminal, clock=clock) as progress:
        run(progress, clock, [1])
        progress.note("saved step 1")
    assert any(line.endswith("saved step 1") for line in terminal.getvalue().split("\n"))
    piped = io.StringIO()
    Progress(10, stream=piped, clock=clock).note("saved step 1")
    assert piped.getvalue() == "saved step 1\n"


def test_terminal_is_left_tidy_after_an_error(terminal):
    clock = Clock()
    with pytest.raises(RuntimeError), Progress(10, stream=terminal, clock=clock):
        raise RuntimeError
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert terminal.getvalue().rfind(shown) > terminal.getvalue().rfind(hidden) >= 0


def test_live_line_says_what_it_waits_for(terminal):
    clock = Clock()
    with Progress(10, stream=terminal, clock=clock) as progress:
        assert "step 0/10  compiling" in terminal.getvalue()
        with progress.paused("evaluating"):
            assert "step 0/10  evaluating" in terminal.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_terminals_that_cannot_redraw_get_plain_lines(terminal, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    clock = Clock()
    with Progress(2, stream=terminal, clock=clock) as progress:
        run(progress, clock, [1, 2])
    assert ESCAPE not in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 2


def test_disabled_progress_is_silent(terminal):
    clock = Clock()
    with Progress(2, stream=terminal, enabled=False, clock=clock) as progress:
        run(progress, clock, [1, 2])
        progress.note("x")
        with progress.paused("evaluating"):
            pass
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0:00"), (83.4, "1:23"), (59.6, "1:00"), (3600.0, "1:00:00"), (93784.0, "26:03:04")],
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(float("nan"), "nan"), (1e-5, "1e-05"), (12345.6, "1.23e+04"), (0.0, "0.000")],
)
def test_odd_losses_stay_readable(loss, expected):
    stream, clock = io.StringIO(), Clock()
    run(Progress(1, stream=stream, clock=clock), clock, [1], loss=loss, tokens_per_second=1.55)
    assert f"loss {expected}  lr 2.0e-04  1.6 tokens/s" in stream.getvalue()
