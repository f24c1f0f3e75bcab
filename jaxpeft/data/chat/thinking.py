"""Blocks of thinking in texts: where they open and close, and the text without them.

A block is between two tags, such as ``<think>`` and ``</think>``, ``[THINK]`` and ``[/THINK]``, or
``<|START_THINKING|>`` and ``<|END_THINKING|>``. gpt-oss writes channels instead, of which the last,
``final``, is the answer.
"""

import re

THINK, END_THINK = "<think>", "</think>"
FINAL_CHANNEL = "<|channel|>final<|message|>"

_NAME = r"(?:[\w.:-]*(?:think|thought|reason)[\w.:-]*)"
_OPEN = rf"(?:<(?!/){_NAME}>|\[(?!/){_NAME}\]|<\|(?:start|begin|begin_of)_{_NAME}\|>)"
_CLOSE = rf"(?:</{_NAME}>|\[/{_NAME}\]|<\|(?:end|end_of)_{_NAME}\|>)"
_OPEN_AT_END = re.compile(rf"({_OPEN})(\s*)\Z", re.IGNORECASE)
_CLOSE_AT_END = re.compile(rf"({_CLOSE})\s*\Z", re.IGNORECASE)
_ANY_CLOSE = re.compile(_CLOSE, re.IGNORECASE)
_LEADING_OPEN = re.compile(rf"\s*{_OPEN}", re.IGNORECASE)
_EMPTY_BLOCK = re.compile(rf"\s*({_OPEN})(\s*)({_CLOSE})", re.IGNORECASE)
_EMPTY_AT_END = re.compile(rf"{_OPEN}\s*{_CLOSE}\s*\Z", re.IGNORECASE)
_INLINE = re.compile(rf"\s*({THINK})?(.*?){END_THINK}(.*)\Z", re.DOTALL)
_ANY_OPEN_AT_END = re.compile(r"(<(?![/|])[^<>\s]+>|\[(?!/)[A-Z][A-Z_]*\])\s*\Z")
_MARKUP = re.compile(r"think|thought|reason|tool", re.IGNORECASE)


def split_inline(content: str, *, may_lack_opening: bool = False) -> tuple[str, str] | None:
    """The thinking and the answer of a text that begins with a block; None for other texts.

    Args:
        content: The text.
        may_lack_opening: Whether text before a closing tag counts as thinking although the opening
            tag is missing, as in answers to a prompt that ends with it.
    """
    found = _INLINE.match(content)
    if not found or not (found[1] or (may_lack_opening and THINK not in found[2])):
        return None
    return found[2], found[3]


def lacks_opening(content: str) -> bool:
    """Whether a text has a closing tag without an opening one at its start."""
    return END_THINK in content and not content.lstrip().startswith(THINK)


def open_at_end(text: str) -> tuple[str, str] | None:
    """The opening tag at the end of a text, with the blanks after it; None without one."""
    found = _OPEN_AT_END.search(text[-200:])
    return (found[1], found[2]) if found else None


def unknown_open_at_end(text: str) -> str | None:
    """A tag of any name that opens something at the end of a text; None without one."""
    found = _ANY_OPEN_AT_END.search(text[-200:])
    return found[1] if found else None


def closes_at_end(text: str) -> bool:
    """Whether a text ends with a closing tag."""
    return _CLOSE_AT_END.search(text[-200:]) is not None


def closing_of(tag: str) -> str:
    """The closing tag for an opening tag, such as ``[/THINK]`` for ``[THINK]``."""
    if tag.startswith("<|"):
        return re.sub("begin", "end", re.sub("start", "end", re.sub("START", "END", tag)))
    return f"{tag[0]}/{tag[1:]}"


def has_close(text: str) -> bool:
    """Whether a text has a closing tag."""
    return _ANY_CLOSE.search(text) is not None


def opens(text: str) -> bool:
    """Whether a text begins with an opening tag."""
    return _LEADING_OPEN.match(text) is not None


def fill_empty_block(text: str, thinking: str) -> str | None:
    """A text with its leading empty block filled; None if it does not begin with one."""
    found = _EMPTY_BLOCK.match(text)
    if not found:
        return None
    blank = "\n" if "\n" in found[2] else ""
    block = f"{found[1]}{blank}{thinking.strip()}{blank}{found[3]}"
    return text[: found.start(1)] + block + text[found.end() :]


def ends_with_empty_block(text: str) -> bool:
    """Whether a text ends with an empty block of thinking."""
    return _EMPTY_AT_END.search(text[-200:]) is not None


def is_exempt(token: str) -> bool:
    """Whether a special token is a tag of thinking or of tools, which contents may hold."""
    return _MARKUP.search(token) is not None


def without_thinking(prompt: str, answer: str, *, thinks: bool = True) -> str:
    """The part of an answer after its thinking, without blanks around it.

    Args:
        prompt: The prompt, whose end may open a block.
        answer: The text of the answer, with its tags.
        thinks: Whether tags of any name mean thinking. If not, only ``<think>`` does, and other
            tags are part of the answer.
    """
    answer = answer.rpartition(FINAL_CHANNEL)[2]
    tag = _tag_of(prompt, answer)
    if tag is None or not (thinks or tag.lower() == THINK):
        return answer.strip()
    return (answer.partition(closing_of(tag))[2] or answer).strip()


def _tag_of(prompt: str, answer: str) -> str | None:
    """The tag that opens thinking, at the end of a prompt or the start of an answer."""
    found, leading = open_at_end(prompt), _LEADING_OPEN.match(answer)
    if found:
        return found[0]
    return leading[0].strip() if leading else None


def thinks_on(prompt: str, answer: str) -> bool:
    """Whether an answer ends inside a block of thinking.

    Args:
        prompt: The prompt, whose end may open a block.
        answer: The generated text, with its tags.
    """
    if "<|channel|>" in prompt[-200:] + answer:
        return FINAL_CHANNEL not in answer
    tag = _tag_of(prompt, answer)
    return tag is not None and closing_of(tag) not in answer
