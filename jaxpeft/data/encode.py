"""From a file of rows to token ids and masks, with everything that is wrong told at once."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxpeft.data.chat import Encoder, Rendered, RowError, render_chat, render_plain
from jaxpeft.data.problems import DROP_HINT, Problem, count_reasons, report
from jaxpeft.data.rows import Row, RowFile, check_rows, check_task, conversation_of, scan_rows
from jaxpeft.data.settings import OnBadRow, OnLong
from jaxpeft.errors import UserError

TOO_LONG = "too long"
_ROWS_PER_CALL = 1000


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a file in its order.

    Attributes:
        tokens: int32 ids, one array an example.
        masks: bool, of the same lengths: which tokens are learned.
        lines: The line each example comes from.
        rows: The row itself.
        dropped: How many rows were left out, by reason.
        truncated: How many examples were cut to the longest length allowed.
        path: The file as the user wrote it.
        sha256: Of its bytes, in hex.
    """

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    lines: list[int]
    rows: list[dict[str, Any]]
    dropped: dict[str, int]
    truncated: int
    path: str
    sha256: str

    @classmethod
    def of_tokens(cls, tokens: list[np.ndarray], path: str) -> "Examples":
        """Examples that stand for those of a file: of each every token is learned."""
        return cls(
            tokens=[ids.astype(np.int32) for ids in tokens],
            masks=[np.ones(len(ids), bool) for ids in tokens],
            lines=list(range(1, len(tokens) + 1)),
            rows=[{}] * len(tokens),
            dropped={},
            truncated=0,
            path=path,
            sha256="",
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int | None) -> "Examples":
        """The first `count` examples; all of them for None."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[:count],
            masks=self.masks[:count],
            lines=self.lines[:count],
            rows=self.rows[:count],
        )

    def with_prefix(self, ids: np.ndarray) -> "Examples":
        """The examples with the virtual tokens of a soft prompt in front.

        Neither they nor what was an example's first token are learned, so that losses with and
        without a prompt are over the same tokens.

        Args:
            ids: int32 of shape ``(n,)``, ids from the size of the vocabulary on; or ``(tasks, n)``
                for those of each row's task, the first where a row names none.

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
) -> Examples:
    """Reads, checks, renders and tokenises a file.

    Args:
        path: A ``.jsonl`` or ``.json`` file of rows.
        tokenizer: A tokenizer of transformers.
        max_length: The longest example allowed, in tokens.
        vocab_size: Rows of the model's embedding table.
        on_long: What to do with longer ones.
        on_bad_row: What to do with rows that cannot be used.
        num_virtual_tokens: Room that every example leaves for `Examples.with_prefix`.
        num_tasks: How many tasks rows may name; 0 reads no tasks.

    Returns:
        At least one example.

    Raises:
        UserError: Naming all problems with their lines, the first 20 in full; or that no row
            is left, with counts.
    """
    return _encode(
        scan_rows(path),
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
        on_long=on_long,
        on_bad_row=on_bad_row,
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
) -> Examples:
    """Checks, renders and tokenises rows held in memory.

    Args:
        rows: Objects with messages, with prompt and completion, or with text.
        tokenizer: A tokenizer of transformers.
        max_length: The longest example allowed, in tokens.
        vocab_size: Rows of the model's embedding table; None trusts the tokenizer.
        on_long: What to do with longer ones.

    Returns:
        At least one example; the line of a row is its place, from 1.

    Raises:
        UserError: Naming all problems with the rows' places.
    """
    file = check_rows(rows, "rows")
    size = len(tokenizer) if vocab_size is None else vocab_size
    return _encode(
        file, tokenizer, max_length=max_length, vocab_size=size, on_long=on_long, on_bad_row="error"
    )


def _encode(
    file: RowFile,
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int,
    on_long: OnLong,
    on_bad_row: OnBadRow,
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
    tokens, masks, lines, rows = [], [], [], []
    truncated = 0
    long: list[tuple[int, int]] = []
    for row, example in zip(file.rows, _encode_rows(file.rows, tokenizer), strict=True):
        if isinstance(example, RowError):
            problems.append(Problem(row.line, str(example), "chat template or tokenizer"))
            continue
        if num_tasks and (wrong := check_task(row.value, num_tasks)):
            problems.append(Problem(row.line, wrong, "bad task"))
            continue
        ids, mask = example
        is_long = len(ids) > room
        problem = _check_tokens(row.line, ids, mask, vocab_size, tokenizer)
        if problem is None and is_long:
            long.append((row.line, len(ids)))
            if on_long != "truncate":
                continue
            ids, mask = ids[:room], mask[:room]
            problem = _check_tokens(row.line, ids, mask, vocab_size, tokenizer)
        if problem is not None:
            problems.append(problem)
            continue
        tokens.append(ids)
        masks.append(mask)
        lines.append(row.line)
        rows.append(row.value)
        truncated += is_long
    if on_long == "error":
        problems += _long_problems(long, max_length, virtual)
    blocking = [
        problem
        for problem in problems
        if on_bad_row == "error" or problem.fatal or problem.reason == TOO_LONG
    ]
    if blocking:
        raise report(file.path, blocking)
    dropped: dict[str, int] = {}
    counted: set[int] = set()
    for problem in problems:
        if problem.row is None or problem.row not in counted:
            dropped[problem.reason] = dropped.get(problem.reason, 0) + 1
        if problem.row is not None:
            counted.add(problem.row)
    if long and on_long == "drop":
        dropped[TOO_LONG] = len(long)
    if not tokens:
        raise UserError(f"{file.path}: no row is left: {count_reasons(dropped)}.")
    return Examples(tokens, masks, lines, rows, dropped, truncated, file.path, file.sha256)


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


def _encode_rows(
    rows: Sequence[Row], tokenizer: Any
) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
    """Tokenises rows with ``datasets.Dataset.map``, in memory and without touching its cache."""
    import datasets

    if not rows:
        return []
    encoder = Encoder(tokenizer)
    text, whole = datasets.Value("string"), datasets.Value("int64")
    message = {"role": text, "content": text}
    columns = {"text": text, "prompt": text, "completion": text}
    columns |= {"messages": datasets.List(message), "start": whole}
    results = {
        "tokens": datasets.List(datasets.Value("int32")),
        "mask": datasets.List(datasets.Value("bool")),
        "problem": text,
    }
    table = datasets.Dataset.from_list(
        [_columns(row.value) for row in rows], features=datasets.Features(columns)
    )
    with _no_progress_bars():
        table = table.map(
            lambda *batch: _encode_batch(encoder, *batch),
            batched=True,
            batch_size=_ROWS_PER_CALL,
            input_columns=list(columns),
            remove_columns=list(columns),
            features=datasets.Features(results),
            new_fingerprint="jaxpeft",  # or datasets hashes the tokenizer for its cache
        )
    arrow = table.with_format("arrow")[:]
    examples = zip(
        _ragged(arrow["tokens"]), _ragged(arrow["mask"]), arrow["problem"].to_pylist(), strict=True
    )
    return [
        (ids, mask) if problem is None else RowError(problem) for ids, mask, problem in examples
    ]


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row in columns that have one type each, as Arrow wants them."""
    empty = {"text": None, "prompt": None, "completion": None, "messages": None, "start": 0}
    if "text" in row:
        return empty | {"text": row["text"]}
    if isinstance(row.get("prompt"), str):
        return empty | {"prompt": row["prompt"], "completion": row["completion"]}
    messages, start = conversation_of(row)
    return empty | {"messages": messages, "start": start}


def _encode_batch(
    encoder: Encoder,
    texts: list[str | None],
    prompts: list[str | None],
    completions: list[str | None],
    conversations: list[list[dict[str, str]] | None],
    starts: list[int],
) -> dict[str, list[Any]]:
    rendered: list[Rendered | RowError] = []
    columns = zip(texts, prompts, completions, conversations, starts, strict=True)
    for text, prompt, completion, messages, start in columns:
        try:
            if messages is not None:
                rendered.append(render_chat(encoder.tokenizer, messages, start))
            elif text is not None:
                rendered.append(render_plain("", text))
            else:
                rendered.append(render_plain(prompt or "", completion or ""))
        except RowError as error:
            rendered.append(error)
    encoded = iter(encoder.encode([row for row in rendered if isinstance(row, Rendered)]))
    results = [next(encoded) if isinstance(row, Rendered) else row for row in rendered]
    return {
        "tokens": [[] if isinstance(result, RowError) else result[0] for result in results],
        "mask": [[] if isinstance(result, RowError) else result[1] for result in results],
        "problem": [str(result) if isinstance(result, RowError) else None for result in results],
    }


def _ragged(column: Any) -> Iterator[np.ndarray]:
    """The rows of an Arrow column of lists."""
    for chunk in column.chunks:
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        yield from np.split(flat, ends[:-1])


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
