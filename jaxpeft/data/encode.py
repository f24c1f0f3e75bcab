"""Encodes rows as token ids and masks; everything that is wrong is reported at once."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.core.errors import UserError
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.data.chat.template import RowError
from jaxpeft.data.row_tokenizer import RowTokenizer
from jaxpeft.data.rows.kinds import RowFile, check_rows, check_task, scan_rows
from jaxpeft.data.rows.problems import DROP_HINT, Problem, count_reasons, report
from jaxpeft.data.settings import (
    EndOfTurn,
    Learn,
    OnBadRow,
    OnLong,
    Reading,
    SpecialTokens,
)

TOO_LONG = "too long"
NO_ARGUMENTS: Mapping[str, Any] = FrozenMap()
DEFAULT_READING = Reading()


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a file, in its order.

    Attributes:
        tokens: int32 ids, one array per example.
        masks: bool, of the same lengths: which tokens are learned.
        lines: The line that each example comes from.
        rows: The row of each example.
        dropped: How many rows were left out, by reason.
        truncated: How many examples were cut to the longest length allowed.
        path: The file as the user wrote it.
        sha256: The hash of its bytes, in hex.
        stop_ids: The tokens that end learned turns.
        notes: Notes for the user about changes and unused parts of rows, a line each.
        numbers: For every example, the place of its row in the file.

    A conversation whose template rewrites earlier turns gives several consecutive examples with the
    same line and row.
    """

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    lines: list[int]
    rows: list[dict[str, Any]]
    dropped: dict[str, int]
    truncated: int
    path: str
    sha256: str
    stop_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    @classmethod
    def of_tokens(cls, tokens: list[np.ndarray], path: str) -> "Examples":
        """Examples of these tokens, all of them learned, in place of a file's."""
        return cls(
            tokens=[ids.astype(np.int32) for ids in tokens],
            masks=[np.ones(len(ids), bool) for ids in tokens],
            lines=list(range(1, len(tokens) + 1)),
            rows=[{}] * len(tokens),
            dropped={},
            truncated=0,
            path=path,
            sha256="",
            numbers=tuple(range(len(tokens))),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_rows(self) -> int:
        """The number of rows that the examples come from."""
        return len(set(self.numbers))

    @property
    def distinct_rows(self) -> list[dict[str, Any]]:
        """The rows that the examples come from, each once."""
        return list(dict(zip(self.numbers, self.rows, strict=True)).values())

    def first(self, count: int | None) -> "Examples":
        """The examples of the first `count` rows; all of them for None."""
        if count is not None:
            kept = set(list(dict.fromkeys(self.numbers))[:count])
            count = sum(number in kept for number in self.numbers)
        return dataclasses.replace(
            self,
            tokens=self.tokens[:count],
            masks=self.masks[:count],
            lines=self.lines[:count],
            rows=self.rows[:count],
            numbers=self.numbers[:count],
        )

    def with_prefix(self, ids: np.ndarray) -> "Examples":
        """The examples with the virtual tokens of a soft prompt in front.

        Neither the virtual tokens nor the first token after them are learned, so that losses with
        and without a prompt are over the same tokens.

        Args:
            ids: int32 of shape ``(n,)``, ids from the size of the vocabulary on; or ``(tasks, n)``
                for the ids of every task. A row that names no task gets the first.

        Returns:
            The same examples, each ``n`` tokens longer.
        """
        count = ids.shape[-1]
        if not count:
            return self
        unlearned = np.zeros(count + 1, bool)
        fronts = [ids if ids.ndim == 1 else ids[row.get("task", 0)] for row in self.rows]
        pairs = zip(fronts, self.tokens, strict=True)
        return dataclasses.replace(
            self,
            tokens=[np.concatenate(pair).astype(np.int32) for pair in pairs],
            masks=[np.concatenate([unlearned, mask[1:]]) for mask in self.masks],
        )


def encode_file(
    path: str | pathlib.Path,
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int,
    on_long: OnLong = "error",
    on_bad_row: OnBadRow = "error",
    num_virtual_tokens: int = 0,
    num_tasks: int = 0,
    reading: Reading = DEFAULT_READING,
) -> Examples:
    """Reads, checks, renders and tokenises a file.

    Args:
        path: A ``.jsonl`` or ``.json`` file of rows.
        tokenizer: A tokenizer of transformers.
        max_length: The longest example allowed, in tokens.
        vocab_size: Rows of the model's embedding table.
        on_long: What to do with longer ones.
        on_bad_row: What to do with rows that cannot be used.
        num_virtual_tokens: Tokens of room that every example leaves for `Examples.with_prefix`.
        num_tasks: The number of tasks that rows may name; 0 ignores tasks.
        reading: Which turns are learned, and how the chat template is called.

    Returns:
        At least one example.

    Raises:
        UserError: Some rows cannot be used (the text has the first 20 problems with their lines),
            or no row is left (it has counts).
    """
    return _encode(
        scan_rows(path),
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
        on_long=on_long,
        on_bad_row=on_bad_row,
        reading=reading,
        virtual=num_virtual_tokens,
        num_tasks=num_tasks,
    )


def encode_rows(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int | None = None,
    on_long: OnLong = "error",
    learn: Learn = "assistant",
    end_of_turn: EndOfTurn = "template",
    special_tokens_in_content: SpecialTokens = "error",
    chat_template_kwargs: Mapping[str, Any] = NO_ARGUMENTS,
    stop_ids: Sequence[int] = (),
) -> Examples:
    """Checks, renders and tokenises rows held in memory.

    Args:
        rows: Objects with messages, with prompt and completion, or with text.
        tokenizer: A tokenizer of transformers.
        max_length: The longest example allowed, in tokens.
        vocab_size: Rows of the model's embedding table; None trusts the tokenizer.
        on_long: What to do with longer ones.
        learn: Which turns are learned, see `jaxpeft.data.settings.DataConfig`.
        end_of_turn: The token that ends a learned turn, see `jaxpeft.data.settings.DataConfig`.
        special_tokens_in_content: Whether contents may hold special tokens.
        chat_template_kwargs: Variables of the chat template for all rows.
        stop_ids: Tokens that end generation, from the model's config.

    Returns:
        At least one example; the line of a row is its place, from 1.

    Raises:
        UserError: Some rows cannot be used; the text names their places and problems.
    """
    file = check_rows(rows, "rows")
    size = len(tokenizer) if vocab_size is None else vocab_size
    reading = Reading(
        learn=learn,
        end_of_turn=end_of_turn,
        special_tokens_in_content=special_tokens_in_content,
        chat_template_kwargs=chat_template_kwargs,
        stop_ids=tuple(stop_ids),
    )
    return _encode(
        file,
        tokenizer,
        max_length=max_length,
        vocab_size=size,
        on_long=on_long,
        on_bad_row="error",
        reading=reading,
    )


def _encode(
    file: RowFile,
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int,
    on_long: OnLong,
    on_bad_row: OnBadRow,
    reading: Reading,
    virtual: int = 0,
    num_tasks: int = 0,
) -> Examples:
    room = max_length - virtual
    if room < 2:
        raise UserError(
            f"data.max_length: {max_length} leaves no room behind {virtual} virtual tokens; "
            "raise it, or train fewer of them."
        )
    problems = list(file.problems)
    tokens, masks, numbers = [], [], []
    truncated = 0
    long: list[tuple[int, int]] = []
    row_tokenizer = RowTokenizer(tokenizer, reading, tasks=num_tasks > 0)
    for number, examples in enumerate(row_tokenizer.encode(file.rows)):
        row = file.rows[number]
        if isinstance(examples, RowError):
            problems.append(Problem(row.line, str(examples), "chat template or tokenizer"))
            continue
        if num_tasks and (wrong := check_task(row.value, num_tasks)):
            problems.append(Problem(row.line, wrong, "bad task"))
            continue
        for ids, mask in examples:
            end = max(room, _learned_end(mask))  # the rest may be cut
            ids, mask = ids[:end], mask[:end]
            is_long = len(ids) > room
            problem = _check_tokens(row.line, ids, mask, vocab_size, tokenizer)
            if problem is None and is_long:
                long.append((number, len(ids)))
                if on_long != "truncate":
                    continue
                ids, mask = ids[:room], mask[:room]
                problem = _check_tokens(row.line, ids, mask, vocab_size, tokenizer)
            if problem is not None:
                problems.append(problem)
                continue
            tokens.append(ids)
            masks.append(mask)
            numbers.append(number)
            truncated += is_long
    if on_long == "error":
        lengths = [(file.rows[number].line, length) for number, length in long]
        problems += _long_problems(lengths, max_length, virtual)
    blocking = [
        problem
        for problem in problems
        if on_bad_row == "error" or problem.fatal or problem.reason == TOO_LONG
    ]
    if blocking:
        raise report(file.path, blocking)
    dropped = _count_dropped(problems)
    if long and on_long == "drop":
        dropped[TOO_LONG] = len({number for number, _ in long})
    if not tokens:
        why = f"no row is left: {count_reasons(dropped)}" if dropped else "there are no rows"
        raise UserError(f"{file.path}: {why}.")
    return Examples(
        tokens=tokens,
        masks=masks,
        lines=[file.rows[number].line for number in numbers],
        rows=[file.rows[number].value for number in numbers],
        dropped=dropped,
        truncated=truncated,
        path=file.path,
        sha256=file.sha256,
        stop_ids=row_tokenizer.stop_ids(),
        notes=row_tokenizer.notes(),
        numbers=tuple(numbers),
    )


def _learned_end(mask: np.ndarray) -> int:
    """The place after the last learned token; 0 if none is learned."""
    return int(np.flatnonzero(mask).max(initial=-1)) + 1


def _count_dropped(problems: Sequence[Problem]) -> dict[str, int]:
    """The number of rows left out, by the first reason that each has."""
    dropped: dict[str, int] = {}
    counted: set[int] = set()
    for problem in problems:
        if problem.row is None or problem.row not in counted:
            dropped[problem.reason] = dropped.get(problem.reason, 0) + 1
        if problem.row is not None:
            counted.add(problem.row)
    return dropped


def _check_tokens(
    line: int, ids: np.ndarray, mask: np.ndarray, vocab_size: int, tokenizer: Any
) -> Problem | None:
    if ids.max(initial=0) >= vocab_size:
        bad = int(ids[ids >= vocab_size][0])
        token = tokenizer.convert_ids_to_tokens(bad)
        why = f"token id {bad} ({token!r}) is outside the model's vocabulary of {vocab_size}"
        hint = f"use the tokenizer that belongs to the model, or {DROP_HINT}"
        return Problem(line, why, "token id outside the vocabulary", hint)
    if not mask[1:].any():  # the first token is never predicted
        return Problem(line, "no supervised token is left to learn from", "no supervised token")
    return None


def _long_problems(long: list[tuple[int, int]], max_length: int, virtual: int) -> list[Problem]:
    longest = max((length for _, length in long), default=0) + virtual
    soft = f" and {virtual} virtual tokens" if virtual else ""
    hint = f'set data.max_length to {longest}, or data.on_long to "drop" or "truncate"'
    return [
        Problem(line, f"{length} tokens{soft}, more than max_length {max_length}", TOO_LONG, hint)
        for line, length in long
    ]
