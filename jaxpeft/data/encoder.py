"""Turns texts into token ids and a mask of the learned ones.

A prompt and the text learned after it are tokenised together if the prompt's tokens stay the same,
and separately if they would merge with others, because generation is given the prompt's own tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data.chat.turns import Turn

_ANCHORS = ("\n", "a", ".", " ")
Ids = Mapping[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Texts:
    """The text of a row.

    Attributes:
        turns: Pairs of learned text and the text before it; plain text is one turn after nothing.
        whole: The whole conversation, whose end after the last turn is not learned.
        is_chat: Whether a template wrote it, special tokens included.
        learn_prompt: Whether the prompt of a text row is learned too.
    """

    turns: tuple[Turn, ...]
    whole: str = ""
    is_chat: bool = True
    learn_prompt: bool = False

    def texts(self) -> list[str]:
        """All texts whose tokens are needed."""
        pairs = [text for turn in self.turns for text in (turn.before, turn.before + turn.text)]
        return [*pairs, self.whole]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example.

    Attributes:
        ids: Its tokens.
        mask: Which of them are learned.
        answer: The first and last place of its last answer; None if there is no question.
        stops: The tokens that end its learned turns.
    """

    ids: list[int]
    mask: list[bool]
    answer: tuple[int, int] | None = None
    stops: frozenset[int] = frozenset()


class Encoder:
    """Turns texts into token ids.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        probe = self.ids(["a"])[0]
        around = tokenizer("a")["input_ids"]
        at = next(
            (i for i in range(len(around)) if around[i : i + len(probe)] == probe), len(around)
        )
        self.first: list[int] = around[:at]
        eos = tokenizer.eos_token_id
        self.last: list[int] = [eos] if eos is not None else around[at + len(probe) :]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, without special tokens around them."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, rows: Sequence[Texts]) -> list[list[Encoded]]:
        """The examples of rows, tokenised in one call.

        Args:
            rows: Any number of rows.

        Returns:
            For every row its examples, at least one.
        """
        several = list(dict.fromkeys(text for row in rows for text in row.texts()))
        known = dict(zip(several, self.ids(several), strict=True))
        return [self._turns(row, known) if row.is_chat else self._plain(row, known) for row in rows]

    def prompt(self, text: str, *, is_chat: bool) -> list[int]:
        """The ids of a prompt, as `encode` puts them in front of an answer."""
        ids = self.ids([text])[0]
        return ids if is_chat else self._around(ids)[0] + ids

    def _plain(self, row: Texts, known: Ids) -> list[Encoded]:
        """The example of a text, or of a prompt and a completion.

        The tokenizer's own first and last tokens are around it.
        """
        (turn,) = row.turns
        prompt = known[turn.before]
        answer = self._behind(turn, known)
        first, last = self._around(prompt + answer)
        front, answer = first + prompt, answer + last
        mask = [False] * len(first) + [row.learn_prompt] * len(prompt) + [True] * len(answer)
        place = (len(front), len(front) + len(answer)) if turn.before else None
        stops = frozenset(self.last if answer[-len(self.last) :] == self.last else [])
        return [Encoded(front + answer, mask, place, stops)]

    def _turns(self, row: Texts, known: Ids) -> list[Encoded]:
        """The examples of a conversation: one for all turns whose prompts extend one another."""
        examples: list[Encoded] = []
        for turn in row.turns:
            prompt, answer = known[turn.before], self._behind(turn, known)
            mask, stops = [False] * len(prompt), frozenset(answer[-1:])
            if examples and prompt[: len(examples[-1].ids)] == examples[-1].ids:
                last = examples.pop()
                mask[: len(last.mask)] = last.mask
                stops |= last.stops
            place = (len(prompt), len(prompt) + len(answer))
            examples.append(Encoded(prompt + answer, mask + [True] * len(answer), place, stops))
        last, whole = examples[-1], known[row.whole]
        if whole[: len(last.ids)] == last.ids:
            behind = [False] * (len(whole) - len(last.ids))
            examples[-1] = dataclasses.replace(last, ids=whole, mask=last.mask + behind)
        return examples

    def _behind(self, turn: Turn, known: Ids) -> list[int]:
        """The ids of a turn's text after the ids of its prompt."""
        prompt, whole = known[turn.before], known[turn.before + turn.text]
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self._apart(turn.text)

    def _apart(self, text: str) -> list[int]:
        """The ids of a text that does not stand at the beginning.

        Some tokenizers put a blank before the first word of a text.
        """
        for anchor, joined in zip(
            _ANCHORS, self.ids([one + text for one in _ANCHORS]), strict=True
        ):
            alone = self.ids([anchor])[0]
            if joined[: len(alone)] == alone:
                return joined[len(alone) :]
        return self.ids([text])[0]

    def _around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Adds the tokenizer's first and last tokens, unless the text has them itself."""
        first = [] if ids[: len(self.first)] == self.first else self.first
        last = [] if self.last and ids[-len(self.last) :] == self.last else self.last
        return first, last
