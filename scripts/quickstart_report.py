"""Prints what the quickstart's training changed: the base model beside the adapted one.

Reads what the trainer left in the run's folder: `metrics.jsonl` (exact match at the first and the
last evaluation), `samples.jsonl` (answers of the same two evaluations) and `adapter/`.

Usage: python scripts/quickstart_report.py RUN
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quickstart_data import DATA, INSTRUCTION, MODEL_LINK
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EXACT_MATCH = "eval_exact_match"


class Sample(NamedTuple):
    """One held-out question, its right answer, and the answers before and after training."""

    question: str
    reference: str
    base: str
    adapted: str


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line.

    Raises:
        ValueError: The file is missing, or a line is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; `bash scripts/quickstart.sh` trains and writes it."
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line!r}.")
        rows.append(row)
    return rows


def first_and_last(
    rows: Iterable[dict[str, Any]], field: str, where: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows with `field` at the smallest and at the largest step.

    Of several rows with one step, as a resumed run may write, the last one counts.

    Raises:
        ValueError: Fewer than two steps have the field.
    """
    by_step = {row["step"]: row for row in rows if row.get(field) is not None}
    if len(by_step) < 2:
        raise ValueError(
            f"{where}: expected {field} from an evaluation before and one after training, got "
            f"{len(by_step)}; `evaluation.exact_match: true` in the config switches it on."
        )
    return by_step[min(by_step)], by_step[max(by_step)]


def pick_samples(rows: Sequence[dict[str, Any]], base: int, adapted: int) -> list[Sample]:
    """Pairs the answers of two evaluations, the right answers in turns so that samples differ.

    Args:
        rows: Rows with `step`, `prompt`, `reference` and `answer`.
        base: The step of the evaluation before training.
        adapted: The step of the evaluation after training.

    Returns:
        The samples answered at both steps: first the first one of every reference, then the rest.
    """
    before = {row["prompt"]: row["answer"] for row in rows if row["step"] == base}
    samples = {
        row["prompt"]: Sample(row["prompt"], row["reference"], before[row["prompt"]], row["answer"])
        for row in rows
        if row["step"] == adapted and row["prompt"] in before
    }
    firsts = {sample.reference: sample for sample in reversed(samples.values())}
    return sorted(samples.values(), key=lambda sample: firsts[sample.reference] != sample)


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder.

    Raises:
        ValueError: There is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; `bash scripts/quickstart.sh` trains the adapter."
        )
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def next_commands(run: str) -> list[tuple[str, str]]:
    """What to do with the adapter now: pairs of a purpose and a command."""
    python = ".venv/bin/python -m"
    given = f"--model {DATA}/{MODEL_LINK} --adapter {run}/adapter"
    question = f'--system "{INSTRUCTION}" "Who painted the Mona Lisa ?"'
    data = f"--data {DATA}/eval.jsonl --max_new_tokens 8"
    return [
        ("ask the adapted model", f"{python} jaxpeft.generate {given} {question}"),
        ("measure again", f"{python} jaxpeft.evaluate {given} {data}"),
        ("write the merged model", f"{python} jaxpeft.merge {given} --output {run}/merged"),
    ]


def report(run: Path, console: Console, num_samples: int = 3) -> None:
    """Prints the scores, some answers, the adapter's size, and which commands come next.

    Args:
        run: The run's folder.
        console: Where to print.
        num_samples: How many answers to show.

    Raises:
        ValueError: The run's folder lacks something.
    """
    metrics = run / "metrics.jsonl"
    base, adapted = first_and_last(read_jsonl(metrics), EXACT_MATCH, metrics)
    samples = pick_samples(read_jsonl(run / "samples.jsonl"), base["step"], adapted["step"])
    size = folder_bytes(run / "adapter")

    table = Table(title="Held-out questions", title_justify="left")
    for heading in ("question", "right answer", "base", "adapted"):
        table.add_column(heading, overflow="fold")
    for sample in samples[:num_samples]:
        table.add_row(*(escape(" ".join(text.split())) for text in sample))
    table.add_section()
    table.add_row(
        "exact match", "", f"{base[EXACT_MATCH]:.1%}", f"[bold]{adapted[EXACT_MATCH]:.1%}[/bold]"
    )
    console.print(table)
    console.print(f"The adapter: {run}/adapter, {size / 1e6:.1f} MB\n\nNext:", highlight=False)
    for purpose, command in next_commands(str(run)):
        console.print(f"  # {purpose}", style="dim", highlight=False)
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 where the run lacks something."""
    parser = argparse.ArgumentParser(description="Prints the base model beside the adapted one.")
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/quickstart")
    args = parser.parse_args(argv)
    try:
        report(args.run, Console())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
