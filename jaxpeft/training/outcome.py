"""Checks that a run ended in a usable result: all of its numbers are finite."""

import math

from jaxpeft.core.errors import DivergedError
from jaxpeft.mesh.processes import from_first
from jaxpeft.training.log import evaluations
from jaxpeft.training.output.folder import CHECKPOINTS
from jaxpeft.training.run import Run


def require_good(run: Run) -> None:
    """Checks a run after its last step, also if it made that step in an earlier process.

    Raises:
        DivergedError: The last update was skipped, or more than half of all were, or the last
            evaluation is not finite.
    """
    step = int(run.state.step)
    skipped, in_a_row = int(run.state.skipped), int(run.state.skipped_in_a_row)
    scores = from_first(lambda: evaluations(run.output).get(step))
    what = ""
    if in_a_row:
        lines = run.rows.lines_of_step(step)
        what = f"the last update, step {step}, was skipped because it was not finite ({lines})"
    elif 2 * skipped > step:
        what = f"{skipped} of {step} updates were skipped because they were not finite"
    elif scores and not is_finite(scores["eval_loss"]):
        what = f"the evaluation after the last step, {step}, is not finite"
    if what:
        raise DivergedError(
            f"{run.output}: {what}; nothing is exported, the last good state is kept in "
            f"{run.output / CHECKPOINTS}. Look at the rows, or lower optim.learning_rate and start "
            "anew with --overwrite or another output_dir."
        )


def is_finite(value: float | None) -> bool:
    """Whether a number from ``metrics.jsonl`` is finite; null stands for one that is not."""
    return value is not None and math.isfinite(value)
