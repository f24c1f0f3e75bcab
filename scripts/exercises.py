"""Runs the course exercises of the field on the quickstart's model and prints a table of them.

Every exercise trains in a process of its own, goes on where it was interrupted, and is not done
twice. A second table shows exact match for every task with every adapter, on one loaded base.

Speed is measured apart (``--speed``): a few steps of every exercise in turns, on a machine that
does nothing else.

Usage: python scripts/exercises.py [--only NAME ...] [--steps N] [--speed ROUNDS]; first
scripts/quickstart.sh
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sms_data
from quickstart_data import DATA, MODEL_LINK
from quickstart_report import first_and_last, folder_bytes, read_jsonl

CONFIGS = Path("configs/exercises")
RUNS = Path("runs/exercises")
MEASURES = "measures.json"
PEAK = "peak_bytes"
SPEED = "speed.json"
SPEED_STEPS = 8
GENERAL = Path(__file__).parent / "general_text.txt"
TEXT = "Answer with one word: abbreviation, description, entity, human, location or number."
LONG_TEXT = f"Name what the question asks for. {TEXT}"  # a prefix reads 20 tokens of it


class Exercise(NamedTuple):
    """One training: its config, and the flags that follow it."""

    config: str
    flags: tuple[str, ...] = ()
    rows: int | None = None


EXERCISES = {
    **{
        f"lora-rank-{rank}": Exercise(
            "lora", ("--method.rank", str(rank), "--method.alpha", str(2 * rank))
        )
        for rank in (2, 4, 8, 16)
    },
    "dora": Exercise("dora"),
    "rslora": Exercise("rslora"),
    "prompt-random": Exercise("prompt_tuning", ("--method.initial", "random")),
    "prompt-sampled": Exercise("prompt_tuning", ("--method.initial", "sampled")),
    "prompt-text": Exercise("prompt_tuning", ("--method.initial", "text", "--method.text", TEXT)),
    "prefix-random": Exercise("prefix_tuning"),
    "prefix-prompt": Exercise(
        "prefix_tuning", ("--method.initial", "prompt", "--method.text", LONG_TEXT)
    ),
    "ia3": Exercise("ia3"),
    "full": Exercise("full"),
    **{
        f"{config}-{rows}-rows": Exercise(config, rows=rows)
        for config in ("lora", "full")
        for rows in (50, 200, 640)
    },
    "sms": Exercise("sms"),
}
HEADINGS = (
    *("exercise", "trainable", "%", "on disk", "exact match", "eval loss"),
    *("general perplexity", "tokens/s", "peak memory"),
)


def command(name: str, steps: int | None, run: Path) -> list[str]:
    """The command that trains an exercise in the folder `run`."""
    exercise = EXERCISES[name]
    flags = [*exercise.flags, "--output_dir", str(run)]
    if exercise.rows is not None:
        flags += ["--data.train", str(RUNS / f"train-{exercise.rows}.jsonl")]
    if steps is not None:
        flags += ["--train.steps", str(steps), "--optim.warmup_steps", "0"]
    config = str(CONFIGS / f"{exercise.config}.yaml")
    return [sys.executable, "-m", "jaxpeft.train", config, *flags]


def run_folder(name: str, steps: int | None) -> Path:
    """Where an exercise leaves its run; another number of steps is another run."""
    return RUNS / (name if steps is None else f"{name}-{steps}-steps")


def train(name: str, steps: int | None) -> None:
    """Trains an exercise unless it is done, and notes the peak memory of its process.

    Raises:
        ValueError: The training failed.
    """
    run, rows = run_folder(name, steps), EXERCISES[name].rows
    if (run / MEASURES).is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        lines = Path(DATA, "train.jsonl").read_bytes().splitlines(keepends=True)
        (RUNS / f"train-{rows}.jsonl").write_bytes(b"".join(lines[:rows]))
    process = subprocess.Popen(command(name, steps, run))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = run / PEAK  # of all processes, where training was interrupted
    before = int(peak.read_text()) if peak.is_file() else 0
    peak.write_text(str(max(before, usage.ru_maxrss * 1024)))
    if process.returncode:
        raise ValueError(f"{name}: training ended with exit code {process.returncode}.")
    measures = {"peak_bytes": int(peak.read_text())} | measure(run)
    (run / MEASURES).write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


def measure_speed(names: Sequence[str], rounds: int, steps: int | None) -> None:
    """Trains every exercise for a few steps, in turns, and notes the tokens a second of each.

    They are noted beside the trainings of `steps` steps.

    Raises:
        ValueError: A training failed.
    """
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            run = RUNS / "speed" / name
            shutil.rmtree(run, ignore_errors=True)
            silent = ["--data.eval", "null", "--evaluation.exact_match", "false"]
            short = [*command(name, SPEED_STEPS, run), *silent]
            if subprocess.run(short, stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"{name}: training for {SPEED_STEPS} steps failed.")
            speeds[name] += speeds_of(read_jsonl(run / "metrics.jsonl"))
            shutil.rmtree(run)
    for name, values in speeds.items():
        (run_folder(name, steps) / SPEED).write_text(json.dumps(values) + "\n", encoding="utf-8")


def speeds_of(lines: Iterable[dict[str, Any]]) -> list[float]:
    """Tokens a second of every logged step but the first, which compiles."""
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return speeds[1:] or speeds


def measure(run: Path) -> dict[str, Any]:
    """What has to be computed of a finished run: sizes, and perplexity on general text."""
    import jaxpeft as jp
    from jaxpeft.inference.metrics import evaluate_file
    from jaxpeft.methods.summary import count_parameters, count_trainable

    rows = run / "general.jsonl"
    lines = GENERAL.read_text(encoding="utf-8").splitlines()
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    base = jp.load_model(Path(DATA, MODEL_LINK))
    total = trainable = count_parameters(base.params)
    before = evaluate_file(base, str(rows), {"base": None})["base"]
    if (run / "model").is_dir():
        after = evaluate_file(jp.load_model(run / "model"), str(rows), {"run": None})["run"]
    else:
        adapter = jp.load_adapter(run, base)
        trainable = count_trainable(adapter)
        after = evaluate_file(base, str(rows), {"run": adapter})["run"]
    return {
        "trainable": trainable,
        "percent": 100 * trainable / total,
        "general_before": before["eval_perplexity"],
        "general_after": after["eval_perplexity"],
    }


def table_row(name: str, run: Path) -> list[str]:
    """One finished exercise as the cells of a line.

    Raises:
        ValueError: The run's folder lacks something.
    """
    log = run / "metrics.jsonl"
    lines = read_jsonl(log)
    before, after = first_and_last(lines, "eval_exact_match", log)
    measures = json.loads((run / MEASURES).read_text(encoding="utf-8"))
    apart = run / SPEED
    speeds = json.loads(apart.read_text()) if apart.is_file() else speeds_of(lines)
    saved = run / ("model" if (run / "model").is_dir() else "adapter")
    return [
        name,
        f"{measures['trainable']:,}",
        f"{measures['percent']:.3g}",
        f"{folder_bytes(saved) / 1e6:.2f} MB",
        f"{before['eval_exact_match']:.1%} -> {after['eval_exact_match']:.1%}",
        f"{after['eval_loss']:.3f}",
        f"{measures['general_before']:.2f} -> {measures['general_after']:.2f}",
        f"{statistics.median(speeds):.0f}",
        f"{measures['peak_bytes'] / 2**30:.2f} GiB",
    ]


def matrix(adapters: dict[str, Path], tasks: dict[str, Path]) -> list[list[str]]:
    """Exact match of every task with every adapter, switched on one loaded base."""
    import jaxpeft as jp
    from jaxpeft.inference.metrics import evaluate_file

    base = jp.load_model(Path(DATA, MODEL_LINK))
    loaded = {"none": None} | {name: jp.load_adapter(run, base) for name, run in adapters.items()}
    scores = {
        task: evaluate_file(base, str(file), loaded, max_new_tokens=8)
        for task, file in tasks.items()
    }
    return [
        [task, *(f"{result[name]['eval_exact_match']:.1%}" for name in loaded)]
        for task, result in scores.items()
    ]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 where something is missing or wrong."""
    parser = argparse.ArgumentParser(description="Runs the exercises and prints their tables.")
    parser.add_argument("--only", nargs="+", choices=EXERCISES, metavar="NAME")
    parser.add_argument("--steps", type=int, help="updates of every exercise; default: its config")
    parser.add_argument("--speed", type=int, metavar="ROUNDS", help="measure speed, in turns")
    args = parser.parse_args(argv)
    names = args.only or list(EXERCISES)
    try:
        wanted = "sms" in names and not Path(sms_data.DATA, "train.jsonl").is_file()
        if wanted and (status := sms_data.main([])):
            return status
        for name in names:
            train(name, args.steps)
        if args.speed:
            measure_speed(names, args.speed, args.steps)
        runs = {name: run_folder(name, args.steps) for name in names}
        print(markdown(HEADINGS, [table_row(name, run) for name, run in runs.items()]))
        if {"lora-rank-16", "sms"} <= runs.keys():
            adapters = {"questions": runs["lora-rank-16"], "sms": runs["sms"]}
            tasks = {
                "questions": Path(DATA, "eval.jsonl"),
                "sms": Path(sms_data.DATA, "eval.jsonl"),
            }
            print()
            print(markdown(["task", "no adapter", *adapters], matrix(adapters, tasks)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
