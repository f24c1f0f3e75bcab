"""Trains an adapter as a config says. This is the program, to be read from top to bottom.

Command: ``python -m jaxpeft.train CONFIG [--section.key value ...]``
"""

from jaxpeft.cli import arguments, exits, huge_pages

if __name__ == "__main__":  # before heavy imports, because it restarts the program
    huge_pages.enable_huge_pages()

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.cli import find_hosts, hosts
from jaxpeft.cli.log_files import survive_full_disks
from jaxpeft.cli.signals import StopRequest
from jaxpeft.config import run_config
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import InterruptedRunError, LostWorkerError, UserError
from jaxpeft.data.batches import iterate
from jaxpeft.files import storage
from jaxpeft.mesh import layouts, placement
from jaxpeft.mesh.processes import from_first, is_first, require_same, together
from jaxpeft.planning.memory_errors import memory_explained
from jaxpeft.pretrained.chat_template import override_template
from jaxpeft.pretrained.load import load_model, load_model_config
from jaxpeft.pretrained.model import Model
from jaxpeft.reports import tables, trackers
from jaxpeft.training.checks import (
    check_batches,
    check_model,
    check_sources,
    check_steps_done,
    starts_dense,
)
from jaxpeft.training.feed import Batches
from jaxpeft.training.log import RunLog, evaluations
from jaxpeft.training.outcome import require_good
from jaxpeft.training.output import lock as run_lock
from jaxpeft.training.output import resume as resume_checks
from jaxpeft.training.output.folder import (
    CHECKPOINTS,
    PROFILE,
    check_folder,
    check_shared,
    clean,
    make_folder,
    remove_empty,
)
from jaxpeft.training.output.result import (
    check_results,
    end_result,
    export_path,
    is_exported,
)
from jaxpeft.training.output.taking import take_folder
from jaxpeft.training.output.template import (
    check_place,
    find_template,
    run_tokenizer,
)
from jaxpeft.training.rows import read_data
from jaxpeft.training.run import Run
from jaxpeft.training.saves import (
    after_lost_worker,
    export,
    interrupted_at,
    save_state,
    stop_diverged,
)
from jaxpeft.training.scored_on import scored_on
from jaxpeft.training.trace import Trace, parse_range

MAX_SKIPPED_IN_A_ROW = 5


def main(argv: list[str]) -> None:
    """Trains as a config file says."""
    parser = arguments.make_parser(
        "train", "Trains an adapter as a config says.", run_config.SCHEMA
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto goes on with a run that output_dir holds, never refuses to (default: auto)",
    )
    parser.add_argument("--overwrite", action="store_true", help="discard the run in output_dir")
    parser.add_argument(
        "--accept_changes",
        metavar="KEY,...",
        help="go on though these keys, or the data, have changed since the run began",
    )
    parser.add_argument("--print_config", action="store_true", help="print all keys and stop")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these steps (XProf)")
    arguments.add_compilation_cache(parser)
    find_hosts.add_flags(parser)
    args, overrides = arguments.parse_arguments(parser, argv, run_config.SCHEMA)
    config = run_config.load_config(args.config, overrides)
    if args.print_config:
        print(run_config.to_yaml(config), end="")
        return
    profile = parse_range(args.profile)
    accepted = resume_checks.parse_accepted(args.accept_changes)
    arguments.keep_compiled(args)
    with hosts.joined(find_hosts.find_hosts(args)):
        train(
            config,
            resume=args.resume == "auto",
            overwrite=args.overwrite,
            accepted=accepted,
            profile=profile,
        )


def train(
    config: RunConfig,
    *,
    resume: bool = True,
    overwrite: bool = False,
    accepted: tuple[str, ...] = (),
    profile: range = range(0),
) -> None:
    """Makes a whole run, or the rest of one.

    Args:
        config: The run.
        resume: Continue the same run in ``output_dir`` from its newest checkpoint.
        overwrite: Discard the run that is there.
        accepted: Keys that may have changed since it began, see `jaxpeft.training.output.resume`.
        profile: Steps to trace into ``output_dir/profile``.

    Raises:
        UserError: Bad input (then nothing was written), divergence, a full disk, or an interruption
            after saving; ``exit_code`` tells them apart.
    """
    output, speaks = storage.as_path(config.output_dir), is_first()
    if profile and storage.is_remote(output):
        raise UserError(f"--profile: needs an output_dir on a disk, not {output}.")
    from_first(lambda: check_folder(config, resume=resume, overwrite=overwrite, accepted=accepted))
    if config.track.wandb is not None:
        trackers.import_wandb()
    mesh = layouts.make_mesh(**config.mesh.sizes)
    layout = layouts.Layout(mesh, layouts.parse_rules(config.mesh.rules))
    check_batches(config, mesh)
    model = load_model_config(config.model.path, config.model.revision)
    template = together(lambda: find_template(config, overwrite=overwrite, accepted=accepted))
    from_first(lambda: check_place(config, template))
    tokenizer = run_tokenizer(config, template)
    check_model(config, model, tokenizer)
    rows = read_data(config, model, tokenizer)
    check_sources(config, model, tokenizer, rows.steps, overwrite=overwrite)
    require_same("config and training data", run_config.to_yaml(config) + rows.plan.hash + template)
    with contextlib.ExitStack() as stack:
        made = from_first(lambda: make_folder(output))
        stack.callback(remove_empty, made if speaks else [])  # if the run did not begin
        check_shared(output)
        lock = run_lock.hold(output)
        from_first(lambda: stack.enter_context(lock) and None)
        stop = stack.enter_context(hosts.stop_request())
        checkpoints = stack.enter_context(
            Checkpoints(
                output / CHECKPOINTS,
                keep=config.checkpoint.keep,
                check_owner=lock.check,
                scored_on=scored_on(config, rows),
            )
        )
        latest, notes = None if overwrite else checkpoints.latest(), []
        if latest is not None:
            meta = checkpoints.meta(latest)
            rows, notes = resume_checks.check_start(meta, config, rows, model, tokenizer, accepted)
            check_steps_done(latest, rows.steps, config)
            notes += checkpoints.notes_on_scores() if config.checkpoint.best else []
        if latest == rows.steps and from_first(lambda: is_exported(config)):
            if not storage.is_remote(output):  # a bucket must be owned first
                from_first(lambda: clean(config) or checkpoints.tidy())
            if speaks:
                print(f"{output}: already finished, {export_path(config)} is ready.")
            return
        from_first(lambda: check_results(config, overwrite=overwrite))
        begun: list[Run] = []
        stack.enter_context(memory_explained(config, mesh.size, begun))
        load = functools.partial(load_base, config, layout, template, restored=latest is not None)
        base = stop.run_interruptible(load, "loading the model")
        require_same("base weights", base.fingerprint)
        run = Run(config, base, rows, layout, restored=latest is not None)
        begun.append(run)
        if latest is not None:
            run.restore(checkpoints, latest)
            run.notes = notes
        # Only now, after everything that can be wrong with the new run was checked.
        from_first(
            lambda: take_folder(config, template, checkpoints, latest, lock, overwrite=overwrite)
        )
        if speaks:
            tables.print_run_table(*run.describe())
        loop(run, checkpoints, stop, profile if speaks else range(0), lock.check)
        from_first(lock.check)
        place = export(run, checkpoints)
        from_first(lambda: end_result(config))
        if speaks:
            scores, exported = evaluations(output), int(run.state.step)
            result = [(place.name, f"{place} (step {exported})")]
            tables.print_final_table(scores.get(0), scores.get(exported), result)


def load_base(
    config: RunConfig, layout: layouts.Layout, template: str = "", *, restored: bool
) -> Model:
    """Loads the base onto its devices, quantised unless a new adapter needs the dense weights.

    Args:
        config: The run.
        layout: The devices.
        template: The chat template that overrides the tokenizer's; "" for none.
        restored: Whether the run continues from a checkpoint.
    """
    section, quantized = config.model, not starts_dense(config, restored)
    base = load_model(
        section.path,
        revision=section.revision,
        dtype=section.dtype,
        compute_dtype=section.compute_dtype,
        mesh=layout,
        quantization=section.quantization if quantized else None,
        double_quantization=section.double_quantization and quantized,
    )
    return base.replace(tokenizer=override_template(base.tokenizer, template))


def loop(
    run: Run,
    checkpoints: Checkpoints,
    stop: StopRequest,
    profile: range,
    check_lock: Callable[[], None],
) -> None:
    """Trains from the state's step to the last one, with evaluations and checkpoints.

    The metrics of a step are fetched while the device computes the next one. A signal interrupts an
    evaluation, which is repeated on resume, unless it decides which checkpoint is best.

    Raises:
        InterruptedRunError: A signal ended the run after saving.
        LostWorkerError: A process that reads data ended.
        DivergedError: Loss or gradient was not finite too many times in a row.
    """
    first, last, config = int(run.state.step), run.rows.steps, run.config
    best = config.checkpoint.best is not None
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(run, first))
        save = functools.partial(save_state, run, checkpoints, log, check_lock)
        if first:
            log.progress.note(f"going on after step {first}")
        if log.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            stop_diverged(run, checkpoints, log, check_lock)
        if evaluates(run, first) and not from_first(lambda: first in evaluations(run.output)):
            log.evaluation(first, stop.run_interruptible)
        if first == last:
            from_first(log.keep)
            require_good(run)
            return
        with log.progress.paused("compiling"):
            step_fn = run.compile_step(stop.run_interruptible)
        rows = placement.process_rows(run.mesh, run.batch_size)
        workers = config.data.workers
        read = iterate(run.rows.plan, first, last, workers=workers, rows=rows)
        batches = stack.enter_context(
            Batches(read, tell=log.warn, stop=lambda: stop.requested, workers=workers)
        )
        trace = stack.enter_context(Trace(run.output / PROFILE, profile))
        log.start_clock()
        for step in range(first + 1, last + 1):
            asked = time.perf_counter()
            try:
                batch = batches.next(step)
            except LostWorkerError as error:
                raise after_lost_worker(run, save, error) from error
            if batch is None:
                raise interrupted_at(run, save, stop)
            waited = time.perf_counter() - asked
            trace.before(step)
            run.state, metrics = step_fn(run.state, run.base.params, run.put(batch))
            log.step(step, metrics, waited)
            stop.note(step)
            if step == last:
                log.flush()
            trace.after(step, log.flush)
            if log.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                stop_diverged(run, checkpoints, log, check_lock)
            scores = None
            if evaluates(run, step) and (best or not stop.requested):
                with contextlib.suppress(InterruptedRunError):
                    scores = log.evaluation(step, at_once if best else stop.run_interruptible)
            interrupted = stop.requested  # read once: it may change at any time
            if interrupted:
                raise interrupted_at(run, functools.partial(save, scores), stop)
            decides = bool(best and scores)
            if due(step, config.checkpoint.every, last) or decides:
                save(scores, wait=decides or step == last)  # the score must be saved too
                log.start_clock()
        require_good(run)


def due(step: int, every: int | None, last: int) -> bool:
    """Whether an event that happens every so many steps, and at the end, happens now."""
    return step == last or (every is not None and step % every == 0)


def evaluates(run: Run, step: int) -> bool:
    """Whether this step has an evaluation: at the start, every so many steps, and at the end."""
    every, last = run.config.evaluation.every, run.rows.steps
    return run.rows.eval_examples is not None and (step == 0 or due(step, every, last))


def at_once(work: Callable[[], Any], doing: str) -> Any:
    """Calls `work` directly; it replaces `StopRequest.run_interruptible`."""
    del doing
    return work()


if __name__ == "__main__":
    survive_full_disks()
    exits.run(main)
