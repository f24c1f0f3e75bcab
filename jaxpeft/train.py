"""The training program, read top to bottom.

Command: ``python -m jaxpeft.train CONFIG [--section.key value ...]``
"""

from jaxpeft import cli

if __name__ == "__main__":  # before anything heavy is imported: it starts the program anew
    cli.enable_huge_pages()

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxpeft import config as run_config
from jaxpeft import data, report, sharding
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.config import RunConfig
from jaxpeft.errors import DivergedError, InterruptedRunError, ResourceError, UserError
from jaxpeft.metrics_log import MetricsLog
from jaxpeft.models.load import load_config, load_model, load_tokenizer
from jaxpeft.progress import Progress
from jaxpeft.run import Rows, Run, export_path
from jaxpeft.run_lock import RunLock
from jaxpeft.signals import StopRequest
from jaxpeft.track import make_trackers

MAX_SKIPPED_IN_A_ROW = 5


def main(argv: list[str]) -> None:
    """Trains as a config file says."""
    parser = cli.make_parser("train", "Trains an adapter as a config says.", run_config.SCHEMA)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in output_dir")
    parser.add_argument("--print_config", action="store_true", help="print all keys and stop")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these steps (XProf)")
    args, overrides = cli.parse_arguments(parser, argv, run_config.SCHEMA)
    config = run_config.load_config(args.config, overrides)
    if args.print_config:
        print(run_config.to_yaml(config), end="")
        return
    profile = parse_range(args.profile)
    train(config, resume=args.resume == "auto", overwrite=args.overwrite, profile=profile)


def train(
    config: RunConfig,
    *,
    resume: bool = True,
    overwrite: bool = False,
    profile: range = range(0),
) -> None:
    """Does a whole run, or what is left of it.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint of the same run in ``output_dir``.
        overwrite: Discard the run that is there.
        profile: Steps to trace into ``output_dir/profile``.

    Raises:
        UserError: Bad input (then nothing was written), divergence, a full disk, or an
            interruption after saving; ``exit_code`` tells them apart.
    """
    output = pathlib.Path(config.output_dir)
    check_output(config, resume, overwrite)
    rows = read_data(config)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    make_room(output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunLock(output))
        stop = stack.enter_context(StopRequest())
        if overwrite:
            discard(output)
        checkpoints = stack.enter_context(
            Checkpoints(output / "checkpoints", keep=config.checkpoint.keep)
        )
        latest = checkpoints.latest()
        if latest == rows.steps and export_path(config).exists():
            print(f"{output}: already finished, {export_path(config)} is ready.")
            return
        base = load_model(
            config.model.path,
            revision=config.model.revision,
            dtype=config.model.dtype,
            compute_dtype=config.model.compute_dtype,
            mesh=mesh,
        )
        run = Run(config, base, rows, mesh)
        del base
        if latest is not None:
            run.restore(checkpoints, latest)
        (output / "config.yaml").write_text(run_config.to_yaml(config))
        report.print_run_table(*run.describe())
        loop(run, checkpoints, stop, profile)
        print(f"{output}: finished, {run.export(checkpoints)} is ready.")


def read_data(config: RunConfig) -> Rows:
    """Reads and checks the data files; needs the tokenizer, not the weights."""
    section, batch_size = config.data, config.train.batch_size
    model = load_config(config.model.path, config.model.revision)
    encode = functools.partial(
        data.encode_file,
        tokenizer=load_tokenizer(config.model.path, config.model.revision),
        max_length=section.max_length,
        vocab_size=model.vocab_size,
        on_long=section.on_long,
        on_bad_row=section.on_bad_row,
    )
    examples, held_out, held_out_rows = encode(section.train), None, []
    if section.eval:
        held_out = encode(section.eval).first(config.evaluation.max_rows)
        values = {row.line: row.value for row in data.read_rows(section.eval)}
        held_out_rows = [values[line] for line in held_out.lines]
    plan = data.Plan(
        examples,
        batch_size=batch_size,
        max_length=section.max_length,
        packing=section.packing,
        seed=config.train.seed,
        pad_id=model.pad_token_id,
    )
    steps = config.train.steps
    if steps is None:
        steps = max(1, round((config.train.epochs or 1) * plan.num_sequences / batch_size))
    if config.optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps: {config.optim.warmup_steps} are more than the {steps} steps "
            f"that {config.train.epochs} epochs make; lower it."
        )
    return Rows(
        plan,
        steps,
        held_out,
        held_out_rows,
        train_rows=len(examples),
        dropped=sum(examples.dropped.values()),
        truncated=examples.truncated,
    )


def loop(run: Run, checkpoints: Checkpoints, stop: StopRequest, profile: range) -> None:
    """Trains from the state's step to the last one, with evaluations and checkpoints.

    The metrics of a step are fetched while the device computes the next one.
    """
    first, last, config = int(run.state.step), run.rows.steps, run.config
    if first == last:
        return
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(last, first)))
        log = stack.enter_context(Log(run, first, progress))
        if first:
            progress.note(f"going on after step {first}")
        elif run.rows.eval_examples is not None:
            log.evaluation(0)
        with progress.paused("compiling"):
            step_fn = run.compile_step(lambda c: stop.run_interruptible(c, "compiling"))
        batches = data.iterate(run.rows.plan, first, last, workers=config.data.workers)
        stack.enter_context(contextlib.closing(batches))
        log.start_clock()
        for step in range(first + 1, last + 1):
            batch = next(batches)
            with traced(profile, step, run.output):
                run.state, metrics = step_fn(run.state, run.base.params, run.put(batch))
                log.step(step, metrics, batch)
            evaluating = due(step, config.evaluation.every, last) and not stop.requested
            evaluating = evaluating and run.rows.eval_examples is not None
            saving = due(step, config.checkpoint.every, last) or bool(stop.requested)
            scores = None
            if evaluating or saving:
                log.flush()
            if evaluating:
                scores = log.evaluation(step)
                saving = saving or config.checkpoint.best is not None
            if log.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                stop_diverged(run, checkpoints, log)
            if saving:
                run.save(checkpoints, scores)
            if stop.requested and step < last:
                checkpoints.wait()
                raise InterruptedRunError(
                    f"interrupted by {stop.requested} at step {step}, saved; run the same "
                    "command to go on."
                )
        checkpoints.wait()


def stop_diverged(run: Run, checkpoints: Checkpoints, log: "Log") -> None:
    """Saves the last good state and gives up."""
    run.save(checkpoints)
    checkpoints.wait()
    step = log.last_step
    lines = run.rows.plan.rows_of(step - 1)
    raise DivergedError(
        f"loss or gradient was not finite {log.skipped_in_a_row} times in a row up to step "
        f"{step} (rows of the last batch: {', '.join(map(str, lines[:8]))}); the last good state "
        f"is kept in {run.output / 'checkpoints'}. Lower optim.learning_rate or look at the rows."
    )


class Log:
    """Where numbers go: ``metrics.jsonl``, ``samples.jsonl``, the progress line, trackers."""

    def __init__(self, run: Run, first: int, progress: Progress):
        self.run, self.progress = run, progress
        self.skipped_in_a_row = self.last_step = 0
        self._stack = contextlib.ExitStack()
        self._pending: tuple[int, dict, dict] | None = None
        self._clock = 0.0
        files = [MetricsLog(run.output / name) for name in ("metrics.jsonl", "samples.jsonl")]
        self.metrics, self.samples = [self._stack.enter_context(file) for file in files]
        for file in files:
            file.truncate_after(first if first else -1)
        track = run.config.track
        self.tracker = self._stack.enter_context(
            contextlib.closing(
                make_trackers(
                    track.tensorboard,
                    track.wandb,
                    run.config.output_dir,
                    dataclasses.asdict(run.config),
                    first_step=first,
                )
            )
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def start_clock(self) -> None:
        """Counts the time of the next step from here."""
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: dict, batch: dict) -> None:
        """Takes a step's metrics, still being computed, and writes those of the step before."""
        self.flush()
        counts = {
            "tokens": int((batch["segment_ids"] > 0).sum()),
            "supervised_tokens": int((batch["weights"] > 0).sum()),
        }
        self._pending = (step, metrics, counts)

    def flush(self) -> None:
        """Waits for the newest step's metrics and writes them."""
        if self._pending is None:
            return
        step, metrics, counts = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        skipped = int(values["skipped"])
        self.skipped_in_a_row, self.last_step = int(values["skipped_in_a_row"]), step
        line = {
            "loss": values["loss"],
            "learning_rate": float(self.run.schedule(step - 1 - skipped)),
            "grad_norm": values["grad_norm"],
            "tokens_per_second": counts["tokens"] / seconds,
            "supervised_tokens": counts["supervised_tokens"],
            "seconds": seconds,
            "skipped_updates": skipped,
        }
        self.write(step, line)
        shown = ("loss", "learning_rate", "tokens_per_second")
        self.progress.update(step, **{name: line[name] for name in shown}, skipped=skipped)

    def evaluation(self, step: int) -> dict[str, float]:
        """Evaluates the model as it stands and writes metrics and answers."""
        with self.progress.paused("evaluating"):
            scores, samples = self.run.evaluate()
        self.write(step, scores)
        for sample in samples:
            self.samples.append({"step": step, **dataclasses.asdict(sample)})
        self.progress.note(report.evaluation_line(step, scores))
        self.start_clock()
        return scores

    def write(self, step: int, values: dict) -> None:
        """Appends one line of metrics and passes it on to the trackers."""
        self.metrics.append({"step": step, **values})
        self.tracker.log(step, values)


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == last or (every is not None and step % every == 0)


def check_output(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Refuses to mix runs: another config, or a run that is there but shall not be resumed."""
    output = pathlib.Path(config.output_dir)
    there = output / "config.yaml"
    if overwrite or not there.exists():
        return
    if not resume:
        raise UserError(
            f"{output}: holds a run, and --resume never was given; add --overwrite to discard "
            "it, or choose another output_dir."
        )
    old = run_config.load_config(str(there))
    if run_config.config_hash(old) == run_config.config_hash(config):
        return
    changes = [
        f"{path}: {before} -> {after}" for path, before, after in run_config.diff(old, config)
    ]
    raise UserError(
        f"{output}: holds a run with another config ({'; '.join(changes)}); choose another "
        "output_dir, or discard it with --overwrite."
    )


def make_room(output: pathlib.Path) -> None:
    """Makes the folder and proves that it can be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except NotADirectoryError:
        raise UserError(f"{output}: is no folder; choose another output_dir.") from None
    except FileExistsError:
        raise UserError(f"{output}: is a file; choose another output_dir.") from None
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written to: {error.strerror}.") from None


def discard(output: pathlib.Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in ("checkpoints", "adapter", "model", "profile", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "wandb_run_id"):
        (output / name).unlink(missing_ok=True)


def parse_range(text: str | None) -> range:
    """Steps of ``--profile START:STOP``, both included; empty without it."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile: expected START:STOP, such as 3:5, got {text!r}")
    return range(int(first), int(last) + 1)


@contextlib.contextmanager
def traced(profile: range, step: int, output: pathlib.Path) -> Iterator[None]:
    """Records a profile from the first step of `profile` to its last."""
    if profile and step == profile[0]:
        jax.profiler.start_trace(output / "profile")
    yield
    if profile and step == profile[-1]:
        jax.profiler.stop_trace()


if __name__ == "__main__":
    cli.run(main)
