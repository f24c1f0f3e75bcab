"""Turns checked rows into token ids and masks, and collects notes about them."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.core.errors import first_few
from jaxpeft.data.chat.kept import Unused, check_keys, check_prompt, find_markup
from jaxpeft.data.chat.renderer import Renderer
from jaxpeft.data.chat.template import Chat, RowError
from jaxpeft.data.chat.turns import Turn, find_turns
from jaxpeft.data.encoder import Encoder, Texts
from jaxpeft.data.rows.kinds import Conversation, Row, is_chat, read_conversation, unused_keys
from jaxpeft.data.settings import Learn, Reading

Arrays = tuple[np.ndarray, np.ndarray]
_ROWS_PER_CALL = 1000


class RowTokenizer:
    """Turns rows into examples, and collects notes about all of them.

    Args:
        tokenizer: A tokenizer of transformers.
        reading: Which turns are learned, and how the chat template is called.
        tasks: Whether the rows' tasks are read.
    """

    def __init__(self, tokenizer: Any, reading: Reading, *, tasks: bool = True):
        self.reading = reading
        self._tasks = tasks
        self.chat = Chat(tokenizer, reading.stop_ids, reading.chat_template_kwargs)
        self.encoder = Encoder(tokenizer)
        self._unused = Unused()
        self._keys: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._stops: set[int] = set()

    def encode(self, rows: Sequence[Row]) -> Iterator[list[Arrays] | RowError]:
        """The examples of rows, in their order.

        Args:
            rows: Checked rows.

        Yields:
            For every row its examples, at least one, as int32 ids and a mask of the learned ones;
            or the reason why it has none.
        """
        table = self._map(rows)
        columns = (table[name] for name in ("row", "problem"))
        arrays = zip(_ragged(table["tokens"]), _ragged(table["mask"]), strict=True)
        found: list[list[Arrays] | RowError] = [[] for _ in rows]
        numbers, problems = (column.to_pylist() for column in columns)
        for number, problem, pair in zip(numbers, problems, arrays, strict=True):
            if problem is not None:
                found[number] = RowError(problem)
            else:
                examples = found[number]
                assert isinstance(examples, list)
                examples.append(pair)
        yield from found

    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that ended learned turns so far."""
        return tuple(sorted(self._stops))

    def notes(self) -> tuple[str, ...]:
        """Notes for the user about changes and unused parts of rows, a line each."""
        lines = [f"{text} ({count} times)" for text, count in self._notes.items()]
        names = [f'"{key}"' for key in self._keys] + self._unused.names()
        if names:
            lines.append(f"not used: {first_few(names)}")
        return tuple(lines)

    def texts_of(self, row: Mapping[str, Any], *, last_only: bool = False) -> Texts:
        """The learned text of a row.

        Args:
            row: The value of a checked row.
            last_only: Whether to return only the last of its learned turns.

        Raises:
            RowError: The chat template refuses the row or drops a part of it.
            UserError: There is no chat template, or it writes no end after an answer.
        """
        self._keys.update(unused_keys(row, tasks=self._tasks))
        if not is_chat(row):
            prompt = row.get("prompt", "")
            turn = Turn(prompt, row["completion"] if prompt else row["text"])
            return Texts((turn,), is_chat=False, learn_prompt=self.reading.learn == "all")
        if self.reading.learn == "all":
            raise RowError(
                "data.learn: all is for prompts and completions of text; of messages, assistant "
                "turns are learned"
            )
        conversation, _ = read_conversation(row)
        learned = learned_turns(conversation, self.reading.learn)[-1 if last_only else 0 :]
        renderer = Renderer(self.chat, conversation)
        if self.reading.special_tokens_in_content == "error":
            find_markup(renderer)
        turns = find_turns(renderer, learned, self.reading.end_of_turn)
        check_prompt(renderer, turns[-1].before, learned[-1])
        check_keys(renderer, self._unused)
        self._notes.update(turn.note for turn in turns if turn.note)
        return Texts(tuple(turns), renderer.whole)

    def _note_doubled_bos(self, ids: list[int]) -> None:
        bos = self.chat.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            token = self.chat.tokenizer.bos_token
            self._notes[f"warning: the first token, {token!r}, is written twice"] += 1

    def _map(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Columns of all examples, made with ``datasets.Dataset.map`` in memory."""
        import datasets

        if not rows:
            return dict.fromkeys(("row", "problem", "tokens", "mask"), _NOTHING)
        features = datasets.Features(
            {
                "row": datasets.Value("int64"),
                "tokens": datasets.List(datasets.Value("int32")),
                "mask": datasets.List(datasets.Value("bool")),
                "problem": datasets.Value("string"),
            }
        )
        table = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
        with _no_progress_bars():
            table = table.map(
                lambda numbers: self._encode_batch(numbers, [rows[i].value for i in numbers]),
                batched=True,
                batch_size=_ROWS_PER_CALL,
                input_columns=["row"],
                remove_columns=["row"],
                features=features,
                new_fingerprint="jaxpeft",  # else datasets would hash the tokenizer for its cache
            )
        arrow = table.with_format("arrow")[:]
        return {name: arrow[name] for name in features}

    def _encode_batch(
        self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[Any]]:
        texts: dict[int, Texts] = {}
        columns: dict[str, list[Any]] = {"row": [], "tokens": [], "mask": [], "problem": []}

        def add(number: int, tokens: list[int], mask: list[bool], problem: str | None) -> None:
            for name, value in zip(columns, (number, tokens, mask, problem), strict=True):
                columns[name].append(value)

        for number, row in zip(numbers, rows, strict=True):
            try:
                texts[number] = self.texts_of(row)
            except RowError as error:
                add(number, [], [], str(error))
        for number, examples in zip(texts, self.encoder.encode([*texts.values()]), strict=True):
            for example in examples:
                add(number, example.ids, example.mask, None)
                self._note_doubled_bos(example.ids)
                self._stops.update(example.stops)
        return columns


def learned_turns(conversation: Conversation, learn: Learn) -> list[int]:
    """The places of the assistant turns that are learned.

    Args:
        conversation: A checked conversation.
        learn: Which of its turns: all, the last, or those after the last user message.

    Raises:
        RowError: The weights of its messages leave none.
    """
    messages = conversation.messages
    turns = [
        place
        for place, message in enumerate(messages)
        if message.role == "assistant" and place >= conversation.start
    ]
    if learn == "last_message":
        turns = turns[-1:]
    elif learn == "last_exchange":
        users = [place for place, message in enumerate(messages) if message.role == "user"]
        turns = [place for place in turns if place > max(users, default=-1)]
    learned = [place for place in turns if messages[place].weight]
    if not learned:
        why = "have weight 0" if turns else "stand in front of the last user message"
        raise RowError(f"no turn is learned: with data.learn: {learn} all assistant turns {why}")
    return learned


class _Nothing:
    """An Arrow column without rows."""

    chunks: tuple[Any, ...] = ()

    def to_pylist(self) -> list[Any]:
        return []


_NOTHING = _Nothing()


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
