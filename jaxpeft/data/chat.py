"""From a row to text, and from text to tokens with the mask of those that are learned.

Which tokens are learned is found by rendering prefixes of the conversation, for every template
alike and without ``{% generation %}`` markers. With `before` the rendering of all messages
before an assistant turn plus the generation prompt, and `through` the rendering up to and
including the turn, the turn's tokens are those of the whole that follow the tokens of
`before`, as far as `through` goes, cut after the last special token (the end of the turn):

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    [------------- before ----------------------------------]
    [------------- through ----------------------------------------------------]
                                                            [-- learned ---]

Tokens of prefixes are compared, rather than characters mapped to tokens by offsets: what counts
is that a generating model, which is given exactly the tokens of `before`, was trained behind
those very tokens; and offsets hide a seam that was merged away, since byte-level tokenizers may
leave the space in front of a word out of them. The mask never looks at pad or eos by id, so the
end of a turn is learned even where eos doubles as pad.

Plain prompts and completions follow TRL: the two texts are joined as they are, the tokenizer's
own special tokens go in front once, eos at the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxpeft.errors import UserError

# Put in front of templates that ask for the date of today, which would change the data daily;
# the date is Llama 3's own fallback.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)


class RowError(ValueError):
    """A row that the tokenizer cannot turn into an example; the text is "field: why"."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """The text of a row.

    Attributes:
        text: All of it.
        spans: For every stretch that is learned, the text before it and the text through it.
        is_chat: Whether a template wrote it, special tokens included.
    """

    text: str
    spans: tuple[tuple[str, str], ...]
    is_chat: bool

    def texts(self) -> list[str]:
        """Every text whose tokens the mask needs."""
        return list(dict.fromkeys([self.text, *(text for span in self.spans for text in span)]))


def render_messages(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Renders messages with the tokenizer's chat template, for training and generation alike.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Role and content of each.
        add_generation_prompt: Whether to open an assistant turn at the end.

    Returns:
        The text, special tokens included: encode it with ``add_special_tokens=False``.

    Raises:
        UserError: If the tokenizer has no chat template.
        RowError: If the template refuses the messages.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template, which rows with messages need; use a "
            "chat model, set tokenizer.chat_template, or give prompt and completion as text."
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise RowError(f"the chat template refuses the messages: {error}") from None


def render_plain(prompt: str, completion: str) -> Rendered:
    """Joins a prompt, which may be empty, and the text to learn, as they are."""
    text = prompt + completion
    return Rendered(text, ((prompt, text),), is_chat=False)


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], start: int = 0) -> Rendered:
    """Renders a conversation and finds the stretches of text that are learned.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Role and content of each; user and assistant take turns.
        start: Index of the message from which on assistant turns are learned.

    Returns:
        The text with a span for every such turn.

    Raises:
        UserError: If the tokenizer has no chat template.
        RowError: If the template refuses the messages, or renders a turn differently when
            other turns follow.
    """
    whole = render_messages(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < start:
            continue
        before = render_messages(tokenizer, messages[:index], add_generation_prompt=True)
        is_last = index == len(messages) - 1
        through = whole if is_last else render_messages(tokenizer, messages[: index + 1])
        _check_prefix(through, whole, index, "the whole conversation")
        _check_prefix(before, through, index, "the conversation through that turn")
        spans.append((before, through))
    return Rendered(whole, tuple(spans), is_chat=True)


class Encoder:
    """Turns rendered rows into token ids and masks.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        probe = self._encode(["a"])[0]
        around = tokenizer("a")["input_ids"]
        at = next(
            (i for i in range(len(around)) if around[i : i + len(probe)] == probe), len(around)
        )
        self._first = around[:at]
        eos = tokenizer.eos_token_id
        self._last = [eos] if eos is not None else around[at + len(probe) :]
        added = tokenizer.added_tokens_decoder.items()
        self._ends = {index for index, token in added if not token.content.isspace()}
        self._ends.update(tokenizer.all_special_ids)
        self._is_blank = functools.cache(lambda token: not tokenizer.decode([token]).strip())

    def encode(self, rows: Sequence[Rendered]) -> list[tuple[list[int], list[bool]] | RowError]:
        """Tokenises rows in one call.

        Args:
            rows: Any number of rendered rows.

        Returns:
            For every row its token ids and, of the same length, which of them are learned; or
            the reason why it has none.
        """
        texts = list(dict.fromkeys(text for row in rows for text in row.texts()))
        ids = dict(zip(texts, self._encode(texts), strict=True))
        results: list[tuple[list[int], list[bool]] | RowError] = []
        for row in rows:
            try:
                results.append(self._encode_row(row, ids.__getitem__))
            except RowError as error:
                results.append(error)
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_row(
        self, row: Rendered, ids_of: Callable[[str], list[int]]
    ) -> tuple[list[int], list[bool]]:
        ids = ids_of(row.text)
        mask = [False] * len(ids)
        for before, through in row.spans:
            start = len(ids_of(before))
            if ids[:start] != ids_of(before):
                raise self._seam_error(row, ids, ids_of(before))
            end = len(ids) if through == row.text else _common_length(ids, ids_of(through))
            if row.is_chat:
                end = self._end_of_turn(ids, start, end)
            mask[start:end] = [True] * (end - start)
        return (ids, mask) if row.is_chat else self._with_special_tokens(ids, mask)

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Cuts blanks behind the turn's last special token, which the template writes."""
        for last in range(end - 1, start - 1, -1):
            if ids[last] in self._ends:
                return last + 1
            if not self._is_blank(ids[last]):
                return end
        return end

    def _with_special_tokens(
        self, ids: list[int], mask: list[bool]
    ) -> tuple[list[int], list[bool]]:
        first = [] if ids[: len(self._first)] == self._first else self._first
        last = [] if self._last and ids[-len(self._last) :] == self._last else self._last
        return first + ids + last, [False] * len(first) + mask + [True] * len(last)

    def _seam_error(self, row: Rendered, ids: list[int], before: list[int]) -> RowError:
        at = _common_length(ids, before)
        alone = self.tokenizer.decode(before[at : at + 3])
        joined = self.tokenizer.decode(ids[at : at + 3])
        where = "the generation prompt and the assistant turn"
        hint = "begin the turn's content with other than blanks"
        if not row.is_chat:
            where = '"prompt" and "completion"'
            hint = "begin the completion with a blank or a new line"
            if row.spans[0][0][-1:].isspace():
                hint = "move blanks from the end of the prompt to the start of the completion"
        return RowError(
            f"{where} merge into other tokens where they meet: the prompt alone ends in "
            f"{alone!r}, with what follows it reads {joined!r}; {hint}"
        )


def _check_prefix(part: str, whole: str, index: int, what: str) -> None:
    if whole.startswith(part):
        return
    at = _common_length(part, whole)
    raise RowError(
        f"messages[{index}]: the chat template renders it differently in {what}: "
        f"{part[at : at + 40]!r} becomes {whole[at : at + 40]!r}; use one row a turn, or a "
        "template that does not rewrite earlier turns"
    )


def _common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items at the start of two sequences are equal."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
