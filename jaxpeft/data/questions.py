"""Questions and reference answers from rows, for exact match.

A question is the same prompt after which the row's last learned turn is learned, and the reference
is that turn without its stop token. Blocks of thinking in front of an answer are learned, but do
not count here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.data.chat import thinking
from jaxpeft.data.chat.template import RowError
from jaxpeft.data.row_tokenizer import RowTokenizer, learned_turns
from jaxpeft.data.rows.kinds import has_answer, is_chat, read_conversation
from jaxpeft.data.settings import Reading


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its reference.

    Attributes:
        prompt: Token ids to answer.
        text: The end of the prompt as text, which may open a block of thinking.
        shown: The question for display: the prompt, or its last message.
        reference: The row's answer as it is learned, without thinking.
        stop: The token that ends it; None if the tokenizer has none.
        is_chat: Whether a chat template wrote the prompt; plain texts have no thinking.
        thinks: Whether tags of any name in front of an answer are taken for thinking.
        task: The row's task.
    """

    prompt: tuple[int, ...]
    text: str
    shown: str
    reference: str
    stop: int | None = None
    task: int = 0
    is_chat: bool = True
    thinks: bool = False

    def answer_of(self, text: str) -> str:
        """The part of a generated text that counts: no thinking, and no blanks around it."""
        if not self.is_chat or (not self.thinks and self.reference.startswith(thinking.THINK)):
            return text.strip()
        return thinking.without_thinking(self.text, text, thinks=self.thinks)


def make_questions(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, reading: Reading
) -> list[Question]:
    """The questions of rows, in their order; rows of plain text give none.

    Args:
        rows: Values of checked rows.
        tokenizer: A tokenizer of transformers.
        reading: How the rows are read.

    Raises:
        UserError: A row cannot be rendered.
    """
    row_tokenizer = RowTokenizer(tokenizer, reading)
    asked = [row for row in rows if has_answer(row)]
    try:
        texts = [row_tokenizer.texts_of(row, last_only=True) for row in asked]
    except RowError as error:
        raise UserError(f"a row to evaluate on: {error}.") from None
    questions = []
    for row, text, examples in zip(asked, texts, row_tokenizer.encoder.encode(texts), strict=True):
        last = examples[-1]
        assert last.answer is not None
        start, end = last.answer
        answer = last.ids[start:end]
        stop = answer.pop() if last.stops and answer[-1] in last.stops else None
        turn = text.turns[-1]
        question = Question(
            prompt=tuple(last.ids[:start]),
            text=turn.before[-200:],
            shown=_shown(row, reading),
            reference="",
            stop=stop,
            task=row.get("task", 0),
            is_chat=text.is_chat,
            thinks=turn.thinks,
        )
        reference = without_special(tokenizer, question.answer_of(tokenizer.decode(answer)))
        questions.append(dataclasses.replace(question, reference=reference))
    return questions


def without_special(tokenizer: Any, text: str) -> str:
    """A text without special tokens, and without blanks around it."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "")
    return text.strip()


def _shown(row: Mapping[str, Any], reading: Reading) -> str:
    if not is_chat(row):
        return row["prompt"]
    conversation, _ = read_conversation(row)
    last = learned_turns(conversation, reading.learn)[-1]
    return conversation.messages[last - 1].text
