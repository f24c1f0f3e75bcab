"""The outputs of a running run: ``metrics.jsonl``, ``samples.jsonl``, progress, trackers."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.config.schema import to_plain
from jaxpeft.files.storage import StoragePath
from jaxpeft.mesh.processes import is_first
from jaxpeft.reports import tables
from jaxpeft.reports.metrics_log import open_log
from jaxpeft.reports.progress import Progress
from jaxpeft.reports.trackers import make_trackers
from jaxpeft.training.output.folder import METRICS, SAMPLES
from jaxpeft.training.run import Run
from jaxpeft.updates.reached import Reached

_BUG_EXIT_CODE = 70


class RunLog:
    """Writes a run's metrics and answers. Use it as a context manager.

    Args:
        run: What is trained.
        first: The number of steps that a resumed run did before; its later lines are cut off.

    Attributes:
        progress: The live line.
        last_step: The newest step whose metrics have arrived.
        skipped_in_a_row: Updates skipped in a row up to that step.
    """

    def __init__(self, run: Run, first: int):
        self.run, self.last_step = run, first
        self.skipped_in_a_row = int(run.state.skipped_in_a_row)
        self._pending: tuple[int, dict, dict] | None = None
        # All at once: computing a rate later would wait for the step that the device works on.
        self._rates = np.asarray(jax.jit(jax.vmap(run.schedule))(jnp.arange(run.rows.steps)))
        self._clock = 0.0
        self._reached = Reached(run.state, first) if is_first() else None
        with contextlib.ExitStack() as stack:
            self._files = {}
            if is_first():
                for name in (METRICS, SAMPLES):
                    self._files[name] = stack.enter_context(open_log(run.output / name))
                self._cut_back(first if first else -1)
            track = run.config.track
            self._tracker = make_trackers(
                track.tensorboard,
                track.wandb,
                run.config.output_dir,
                to_plain(run.config),
                first_step=first,
            )
            self.progress = stack.enter_context(Progress(run.rows.steps, first, enabled=is_first()))
            self._tell(first, run.notes)
            self._stack = stack.pop_all()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        code = 0 if error is None else getattr(error, "exit_code", _BUG_EXIT_CODE)
        with self._stack:
            self._tracker.close(code)

    def _cut_back(self, start: int) -> None:
        """Drops lines of steps after the checkpoint."""
        self._files[METRICS].truncate_after(start)
        evaluated = start in evaluations(self.run.output)
        self._files[SAMPLES].truncate_after(start if evaluated else start - 1)

    def warn(self, text: str) -> None:
        """Prints a warning that may concern this process alone."""
        if is_first():
            self.progress.note(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _tell(self, first: int, notes: list[str]) -> None:
        """Reports and records what changed since the run was interrupted."""
        for note in notes:
            self.progress.note(note)
        if notes:
            self._write(first, {"notes": notes})

    def start_clock(self) -> None:
        """Measures the time of the next step from now on."""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict, waited: float) -> None:
        """Takes a step's metrics, still being computed, and writes those of the step before.

        Args:
            step: The number of the step.
            metrics: The metrics that the step returned.
            waited: Seconds that the loop waited for the batch.
        """
        self.flush()
        tokens, supervised = self.run.rows.plan.counts(step - 1)
        counts = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "data_wait_seconds": waited,
        }
        self._pending = (step, metrics, counts)

    def flush(self) -> None:
        """Waits for the newest step's metrics and writes them."""
        if self._pending is None:
            return
        step, metrics, counts = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items() if name != "reached"}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        skipped, in_a_row = int(values["skipped"]), int(values["skipped_in_a_row"])
        self.last_step, self.skipped_in_a_row = step, in_a_row
        updates_before = step - skipped - (0 if in_a_row else 1)
        penalty = values["penalty"] / values["weight"] if "penalty" in values else None
        line = {
            "loss": values["loss"] - (penalty or 0.0),
            "learning_rate": float(self._rates[updates_before]),
            "grad_norm": values["grad_norm"],
            "tokens_per_second": counts["tokens"] / seconds,
            "supervised_tokens": counts["supervised_tokens"],
            "seconds": seconds,
            "data_wait_seconds": counts["data_wait_seconds"],
            "skipped_updates": skipped,
        }
        if penalty is not None:
            line["penalty"] = penalty
        self._write(step, line)
        self._tracker.log(step, line)
        if in_a_row:
            lines = self.run.rows.lines_of_step(step)
            self.progress.note(f"step {step}: not finite, update skipped; {lines}")
        else:
            self._watch(step, metrics["reached"])
        shown = ("loss", "learning_rate", "tokens_per_second")
        self.progress.update(step, **{name: line[name] for name in shown}, skipped=skipped)

    def _watch(self, step: int, flags: Any) -> None:
        """Reports once which trained arrays no gradient reached; later flags are not fetched."""
        if self._reached is None or self._reached.judged:
            return
        if note := self._reached.add(flags, last=step == self.run.rows.steps):
            self.progress.note(note)

    def keep(self) -> None:
        """Makes sure that a resumed run will find all lines; call it before a save."""
        for file in self._files.values():
            file.keep()

    def evaluation(self, step: int, call: Callable[..., Any]) -> dict[str, float]:
        """Evaluates the current model, and writes metrics and answers.

        Args:
            step: The number of steps done.
            call: ``call(work, "evaluating")`` does the work, or raises when it is interrupted.

        Returns:
            The metrics.
        """
        self.flush()
        with self.progress.paused("evaluating"):
            scores, samples = call(self.run.evaluate, "evaluating")
        for sample in samples:
            self._write(step, sample.values(), SAMPLES)
        self._write(step, scores)
        self._tracker.log(step, scores)
        self.progress.note(tables.evaluation_line(step, scores))
        if cut := sum(sample.cut for sample in samples):
            limit = self.run.config.evaluation.max_new_tokens
            self.progress.note(
                f"{cut} of {len(samples)} answers were cut inside of their thinking by "
                f"evaluation.max_new_tokens: {limit}; raise it"
            )
        self.start_clock()
        return scores

    def _write(self, step: int, values: dict, name: str = METRICS) -> None:
        if name in self._files:
            self._files[name].append({"step": step, **values})


def evaluations(output: StoragePath) -> dict[int, dict[str, Any]]:
    """The evaluations in a run's ``metrics.jsonl``, by step."""
    try:
        lines = (output / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    found = [json.loads(line) for line in lines]
    return {line["step"]: line for line in found if "eval_loss" in line}
