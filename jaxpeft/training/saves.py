"""Saving a run's state and result, with retries."""

import sys
from collections.abc import Callable

import jax

from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.cli.signals import StopRequest
from jaxpeft.core.errors import DivergedError, InterruptedRunError, LostWorkerError
from jaxpeft.files.patience import persist
from jaxpeft.files.storage import StoragePath
from jaxpeft.mesh.processes import from_first, is_first
from jaxpeft.training.log import RunLog
from jaxpeft.training.output.folder import CHECKPOINTS
from jaxpeft.training.output.result import export_path
from jaxpeft.training.run import Run


def export(run: Run, checkpoints: Checkpoints) -> StoragePath:
    """Writes the result; if the disk is full or fails, it is tried again a few times."""
    alike = jax.process_count() == 1 or export_path(run.config).name == "adapter"
    if not alike:  # the first process would retry alone
        return run.export(checkpoints)
    return persist(lambda: run.export(checkpoints), print_note)


def print_note(text: str) -> None:
    """Prints a line on standard error, in the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def save_state(
    run: Run,
    checkpoints: Checkpoints,
    log: RunLog,
    check_lock: Callable[[], None],
    scores: dict[str, float] | None = None,
    *,
    wait: bool = True,
) -> None:
    """Saves the state, after checking that the folder still belongs to this run.

    All lines of metrics are written first. If the disk is full or fails, saving is tried again a
    few times. Without `wait` the save continues in the background; an error of it is raised by the
    next save, which then saves a newer state.
    """

    def prepare() -> None:
        check_lock()
        log.keep()

    def save() -> None:
        from_first(prepare)
        run.save(checkpoints, scores)
        if wait:
            checkpoints.wait()

    log.flush()
    persist(save, log.progress.note)


def interrupted_at(run: Run, save: Callable[[], None], stop: StopRequest) -> InterruptedRunError:
    """Saves the state after a signal; returns the error to raise."""
    save()
    return InterruptedRunError(
        f"interrupted by {stop.requested} at step {int(run.state.step)}, saved; run the same "
        "command to go on."
    )


def after_lost_worker(
    run: Run, save: Callable[[], None], error: LostWorkerError
) -> LostWorkerError:
    """Saves the state if this is the only process; returns the error to raise."""
    step, saved = int(run.state.step), "run the same command to go on from the last checkpoint"
    if jax.process_count() == 1 and step:
        save()
        saved = f"step {step} is saved, run the same command to go on"
    return LostWorkerError(
        f"{error} before step {step + 1}; {saved}. If the system lacks memory (it kills such "
        "processes then), lower data.workers; with 0 there are none."
    )


def stop_diverged(
    run: Run, checkpoints: Checkpoints, log: RunLog, check_lock: Callable[[], None]
) -> None:
    """Saves the last good state and ends the run.

    Raises:
        DivergedError: Always.
    """
    step, count = log.last_step, log.skipped_in_a_row
    save_state(run, checkpoints, log, check_lock)
    raise DivergedError(
        f"loss or gradient was not finite {count} times in a row up to step {step} "
        f"({run.rows.lines_of_step(step)}); the last good state is kept in "
        f"{run.output / CHECKPOINTS}. Look at the rows, or lower "
        "optim.learning_rate and start anew with --overwrite or another output_dir."
    )
