r"""The learned turns of a conversation, exactly as generation meets them.

An assistant turn is learned after the rendering of everything before it plus the generation prompt,
up to and including the token at which generation stops:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    [------------------- before ---------------------------][-- text -----]

The text is found by comparing two renderings, without and with the turn. In both, the message
before it is replaced by a word that is easy to find, so a template may render history differently
once turns follow. Text of the generation prompt that the turn repeats belongs to the prompt; text
that only the prompt opens (``<think>``) is not learned.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.data.chat import thinking
from jaxpeft.data.chat.renderer import Renderer, Words
from jaxpeft.data.chat.template import ANSWER, ARGUMENT, NEXT, THOUGHT, TOOL, RowError
from jaxpeft.data.rows.messages import Message
from jaxpeft.data.settings import EndOfTurn

EMPTY_BLOCK = 'thinking is closed as an empty block, since the generation prompt opens "<think>"'


@dataclasses.dataclass(frozen=True)
class Turn:
    """An assistant turn as generation meets it.

    Attributes:
        before: The text that generation is given.
        text: The text that is to be generated; it ends with the token at which generation stops.
        note: A change that was made for this turn, for the user; "" for none.
        thinks: Whether it thinks before it answers, or shows that it does not.
    """

    before: str
    text: str
    note: str = ""
    thinks: bool = False


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A turn in its conversation.

    Attributes:
        before: The text that generation is given.
        opened: The part of the generation prompt that the turn itself does not repeat.
        rest: The turn's text after the prompt.
        marked: The same with its own words replaced by the marks of `jaxpeft.data.chat.template`.
        marks: The marks that stand for its text and its calls.
    """

    before: str
    opened: str
    rest: str
    marked: str
    marks: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """The place in `rest` where the own words end."""
        return len(self.rest) - _length_behind(self.rest, self.marked, self.marks)


def find_turns(
    renderer: Renderer, learned: Sequence[int], end_of_turn: EndOfTurn = "template"
) -> list[Turn]:
    """The learned turns of a conversation.

    Args:
        renderer: The conversation.
        learned: Indices of the assistant turns to learn, in their order.
        end_of_turn: Whether turns end with the template's end of a turn, or the tokenizer's end
            token.

    Returns:
        A turn for every index.

    Raises:
        RowError: The template drops a part of the row, or generation cannot meet a turn.
        UserError: The template writes no end after an answer.
    """
    return [_find_turn(renderer, index, end_of_turn) for index in learned]


def _find_turn(renderer: Renderer, index: int, end_of_turn: EndOfTurn) -> Turn:
    message, words = renderer.conversation.messages[index], renderer.words[index]
    turn = _split(renderer, index)
    _check_words(message, words, turn)
    text, note, tag = turn.rest, "", thinking.open_at_end(turn.before)
    if words.thinking:
        text = _with_thinking(renderer, index, turn)
    elif tag and thinking.closing_of(tag[0]) not in turn.rest:
        text, note = _close_block(message, tag, turn.rest), EMPTY_BLOCK
    elif not tag:
        _check_closed(message, turn)
    end = len(text) - (len(turn.rest) - turn.end)
    thinks = bool(words.thinking or tag) or thinking.opens(turn.marked)
    if end_of_turn == "eos":
        text = _end_with_eos(renderer, text, end)
    else:
        text = _end_with_stop(renderer, index, text, end)
    return Turn(turn.before, text, note, thinks)


def _split(renderer: Renderer, index: int) -> Rendered:
    """Finds a turn by comparing two renderings."""
    values, chat = renderer.values, renderer.chat
    before, plain = renderer.render(values[:index], prompt=True), renderer.attempt(values[:index])
    prompt = before[len(plain) :] if plain is not None and before.startswith(plain) else ""
    front = [*values[: index - 1], {**values[index - 1], "content": NEXT}]
    left = renderer.attempt(front, prompt=True) or ""
    if index and values[index - 1]["role"] == "assistant":
        _check_opener(renderer, index, left.rpartition(NEXT)[2] if NEXT in left else prompt)
    inside = {at for start, end in chat.spans(prompt) for at in range(start + 1, end)}

    def find(turn: dict[str, Any]) -> tuple[str, str]:
        """The part of the prompt that a turn leaves out, and the turn's text."""
        right, shown = renderer.attempt([*front, turn]) or "", left
        searched = prompt
        if NEXT in left and NEXT in right:
            shown, right = left.rpartition(NEXT)[2], right.rpartition(NEXT)[2]
        else:
            shown, right = before, renderer.render([*values[:index], turn])
            if plain is not None and right.startswith(plain):
                shown, right = before[len(plain) :], right[len(plain) :]
            else:
                searched = ""
        for length in range(len(searched), 0, -1):
            start = searched[:length]
            if length not in inside and start.strip() and start in right:
                return searched[length:], right.partition(start)[2]
        length = chat.common(shown, right)
        return shown[length:], right[length:]

    opened, rest = find(values[index])
    try:
        turn, marks = renderer.marked(index)
        marked = find(turn)[1]
    except RowError:
        marked, marks = "", []
    return Rendered(before, opened, rest, marked, tuple(marks))


def _check_opener(renderer: Renderer, index: int, behind: str) -> None:
    """Checks that something opens a turn that follows another assistant turn.

    Args:
        renderer: The conversation.
        index: The place of the second turn.
        behind: The template's text after the text of the first turn.

    Raises:
        RowError: Nothing opens it.
    """
    stop = renderer.chat.first_stop(behind, renderer.chat.stops(renderer.conversation.tools))
    if not (behind[stop[1] :] if stop else behind).strip():
        where = renderer.conversation.messages[index].where
        raise RowError(
            f'"{where}.role": two assistant turns in a row, and the chat template writes nothing '
            "between them; join them"
        )


def _check_words(message: Message, words: Words, turn: Rendered) -> None:
    """Checks that the template renders the answer and the calls of tools.

    Raises:
        RowError: It drops one of them.
    """
    if ANSWER not in turn.marked and words.answer.strip() not in turn.rest:
        raise RowError(
            f'"{message.where}": the chat template drops the text {words.answer.strip()!r:.60}'
        )
    if thinking.END_THINK in words.answer and words.answer.strip() not in turn.rest:
        raise RowError(
            f'"{message.where}.content": the chat template takes {thinking.END_THINK} in it for '
            "the end of thinking; write it otherwise, or give the thinking as reasoning_content"
        )
    for place, call in enumerate(message.values.get("tool_calls", [])):
        function = call["function"]
        for mark, said, what in (
            (f"{TOOL}{place}e", function["name"], "the call of"),
            (f"{ARGUMENT}{place}e", function["arguments"], "the arguments of the call of"),
        ):
            if said and mark not in turn.marked:
                name = function["name"]
                raise RowError(f'"{message.where}": the chat template drops {what} {name!r:.60}')


def _with_thinking(renderer: Renderer, index: int, turn: Rendered) -> str:
    """The text of a turn with its thinking, which the template may have dropped or repeated."""
    message, words = renderer.conversation.messages[index], renderer.words[index]
    thought, tag, rest = words.thinking.strip(), thinking.open_at_end(turn.before), turn.rest
    if thinking.has_close(turn.opened) or thinking.closes_at_end(turn.before):
        raise RowError(
            f'"{message.where}": the generation prompt closes thinking before the turn thinks'
            f"{_arguments_hint(renderer, index)}"
        )
    count = turn.marked.count(THOUGHT) if turn.marked else int(thought in rest)
    if count == 1 and not (tag and thinking.opens(rest)):
        return rest
    if count == 0 and (filled := thinking.fill_empty_block(rest, thought)) is not None:
        return filled
    if tag is None:
        what = "writes the thinking twice" if count else "drops the thinking"
        raise RowError(f'"{message.where}": the chat template {what} {thought!r:.60}')
    inline = thinking.split_inline(message.text, may_lack_opening=True)
    close = thinking.closing_of(tag[0])
    if inline and close == thinking.END_THINK:
        said = f"{inline[0].removeprefix(tag[1])}{close}{inline[1]}"
    else:
        blank = "\n" if "\n" in tag[1] else ""
        said = f"{thought}{blank}{close}{blank}{blank}{words.answer}"
    if not words.answer.strip():
        return said.rstrip() + (rest.partition(close)[2] if close in rest else rest)
    blanks = words.answer[: len(words.answer) - len(words.answer.lstrip())]
    front = turn.marked.partition(ANSWER)[0].removesuffix(blanks)
    behind = rest[len(front) :] if rest.startswith(front) else rest
    for answer in (words.answer, words.answer.rstrip(), words.answer.strip()):
        if behind.startswith(answer):
            return said.removesuffix(words.answer) + answer + behind[len(answer) :]
    raise RowError(f'"{message.where}": the chat template drops the thinking {thought!r:.60}')


def _check_closed(message: Message, turn: Rendered) -> None:
    """Checks that the turn closes a block of another name which the prompt opens.

    Raises:
        RowError: The turn leaves the block open.
    """
    tag = thinking.unknown_open_at_end(turn.opened)
    if tag and thinking.closing_of(tag) not in turn.rest:
        raise RowError(
            f'"{message.where}": the generation prompt opens {tag!r}, and the turn does not close '
            "it; begin its content with what belongs there"
        )


def _close_block(message: Message, tag: tuple[str, str], rest: str) -> str:
    """The text of a turn without thinking, after a prompt that opens a block of thinking."""
    if tag[0] != thinking.THINK:
        raise RowError(
            f'"{message.where}": the generation prompt opens {tag[0]!r}, and the turn has no '
            "thinking; give it reasoning_content"
        )
    blank = "\n" if "\n" in tag[1] else ""
    return f"{blank}{thinking.END_THINK}{blank}{blank}{rest}"


def _end_with_stop(renderer: Renderer, index: int, text: str, end: int) -> str:
    """A turn's text up to the token at which generation stops; its own words end at `end`."""
    chat = renderer.chat
    tools = renderer.conversation.tools
    stops = chat.stops(tools)
    if place := chat.first_stop(text, stops, end):
        return text[: place[1]]
    follow = _follow(renderer, index)
    if place := chat.first_stop(follow, stops):
        return text[:end] + follow[: place[1]]
    written = text.rstrip()
    special = chat.specials(written)
    if special and special[-1][1] == len(written) and special[-1][0] >= end:
        return written
    if special := chat.specials(follow):
        return text[:end] + follow[: special[0][1]]
    if chat.end_of_turn(tools) and not follow:  # history does not show the turn
        return text + chat.end_of_turn(tools)
    raise UserError(
        "the chat template writes no end behind an answer, so generation would not stop: set "
        "data.end_of_turn to eos to learn the tokenizer's end token there, or give another "
        "template with model.chat_template."
    )


def _follow(renderer: Renderer, index: int) -> str:
    """The template's text between the own words of a turn and the next message."""
    values, (marked, marks) = renderer.values[: index + 1], renderer.marked(index)
    answers = [
        {
            "role": renderer.role("tool"),
            "content": NEXT,
            "name": call["function"]["name"],
            **({"tool_call_id": call["id"]} if "id" in call else {}),
        }
        for call in values[index].get("tool_calls", [])
    ]
    for following in (answers, [{"role": "user", "content": NEXT}]):
        real = renderer.attempt([*values, *following]) if following else None
        other = renderer.attempt([*values[:index], marked, *following]) or ""
        if real is not None and NEXT in real and NEXT in other:
            real, other = real.partition(NEXT)[0], other.partition(NEXT)[0]
            if any(mark in other for mark in (*marks, THOUGHT)):
                return real[len(real) - _length_behind(real, other, marks) :]
    return ""


def _end_with_eos(renderer: Renderer, text: str, end: int) -> str:
    """A turn's text with the tokenizer's end token instead of the template's end."""
    chat = renderer.chat
    if not chat.eos:
        raise UserError(
            "data.end_of_turn: eos, but the tokenizer has no end token; set it to template."
        )
    place = chat.first_stop(text, chat.stops(renderer.conversation.tools), end)
    special = next((found for found in chat.specials(text) if found[0] >= end), None)
    cut = min((found[0] for found in (place, special) if found), default=len(text))
    return text[:end] + text[end:cut].rstrip() + chat.eos


def _length_behind(text: str, marked: str, marks: Sequence[str]) -> int:
    """The length of the template's text after the own words of a turn.

    Args:
        text: The rendering with the words, which ends with the turn.
        marked: The rendering with marks in their place.
        marks: The marks.
    """
    ends = [marked.rfind(mark) + len(mark) for mark in (*marks, THOUGHT) if mark in marked]
    tail = marked[max(ends, default=0) :]
    if text.endswith(tail):
        return len(tail)
    pairs = zip(reversed(text), reversed(marked), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


_SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_mode", "reasoning")


def _arguments_hint(renderer: Renderer, index: int) -> str:
    """A hint at the argument of the template that lets a turn think, if there is one."""
    values = renderer.values[:index]
    for name in _SWITCHES:
        for value in (True, "high", "thinking"):
            changed = renderer.arguments | {name: value}
            prompt = renderer.attempt(values, prompt=True, arguments=changed)
            if prompt is not None and not thinking.closes_at_end(prompt):
                shown = json.dumps(value)
                return f"; set {name} to {shown} in data.chat_template_kwargs"
    return ""
