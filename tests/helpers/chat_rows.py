"""Rows of every shape that a kind of template takes, with what is to be learned of each."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from chat_templates import ID, Kind

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Cats", "text": "They purr."}, {"title": "Dogs", "text": "They bark."}]
KEYS_OF_THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass(frozen=True)
class Words:
    """The texts that rows are made of."""

    users: Sequence[str] = ("Hi", "1+1?", "Why?")
    answers: Sequence[str] = ("Hello", "2", "So.")
    thoughts: Sequence[str] = ("A greeting.", "A sum.")
    system: str = "Be brief."
    place: str = "Zürich"
    result: str = "8 °C"


@dataclasses.dataclass(frozen=True)
class Case:
    """A row and the text of every span that is to be learned, in order.

    Attributes:
        shape: A name for errors.
        row: The row.
        said: What the model says, one text a learned turn.
        at: The index of each learned turn among the messages.
    """

    shape: str
    row: dict[str, Any]
    said: tuple[str, ...]
    at: tuple[int, ...]


def user(text: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": text}


def answer(text: str | None, **keys: Any) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": text, **keys}


def call(place: str, name: str = "weather", id_: str = ID) -> dict[str, Any]:
    """A call of the tool, whose arguments are JSON text as in the OpenAI format."""
    said = json.dumps({"place": place}, ensure_ascii=False)
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": said}}


def result(text: str) -> dict[str, Any]:
    """What the tool answered."""
    return {"role": "tool", "tool_call_id": ID, "name": "weather", "content": text}


def cases(kind: Kind, words: Words) -> list[Case]:
    """All rows that a kind takes."""
    found = [*_plain(kind, words)]
    if kind.thought is not None:
        found += _thinking(kind, words)
    if kind.inline == "text":
        inline = f"<think>\n{words.thoughts[0]}\n</think>\n\n{words.answers[0]}"
        found.append(_case(kind, "inline text", user(words.users[0]), answer(inline)))
    if kind.call is not None:
        found += _calls(kind, words)
    if kind.documents:
        plain = (user(words.users[0]), answer(words.answers[0]))
        found.append(_case(kind, "documents", *plain, documents=DOCUMENTS))
    return found


def _case(kind: Kind, shape: str, *messages: dict[str, Any], **keys: Any) -> Case:
    said, at = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        calls = [entry["function"] for entry in message.get("tool_calls", ())]
        given = [message[key] for key in KEYS_OF_THINKING if key in message]
        text = message["content"] or ""
        thinking = given[0] if given else None
        if kind.inline == "thought" and text.startswith("<think>"):
            thinking, text = text.removeprefix("<think>\n").split("\n</think>\n\n", 1)
        said.append(
            kind.said(
                text, thinking, [(one["name"], json.loads(one["arguments"])) for one in calls]
            )
        )
        at.append(index)
    row = {"messages": list(messages), **keys}
    if kind.arguments:
        row["chat_template_kwargs"] = dict(kind.arguments)
    return Case(shape, row, tuple(said), tuple(at))


def _plain(kind: Kind, words: Words) -> list[Case]:
    a, b, c = map(user, words.users)
    x, y, z = map(answer, words.answers)
    found = [
        _case(kind, "plain", a, x),
        _case(kind, "two turns", a, x, b, y),
        _case(kind, "three turns", a, x, b, y, c, z),
        _case(kind, "the user has the last word", a, x, b),
        _case(kind, "the same again", a, x, a, x),
    ]
    if kind.users:
        found.append(_case(kind, "two users", a, b, x))
    if kind.system == "own":
        s = system(words.system)
        found += [
            _case(kind, "system", s, a, x),
            _case(kind, "system, two turns", s, a, x, b, y),
            _case(kind, "empty system", system(""), a, x),
        ]
    return found


def _thinking(kind: Kind, words: Words) -> list[Case]:
    a, b, _ = map(user, words.users)
    x, y, _ = words.answers
    t, u = words.thoughts
    found = [
        _case(kind, f"thinking by {key}", a, answer(x, **{key: t})) for key in KEYS_OF_THINKING
    ]
    found += [
        _case(kind, "thinking twice", a, answer(x, thinking=t), b, answer(y, thinking=u)),
        _case(kind, "thinking once", a, answer(x, thinking=t), b, answer(y)),
        _case(kind, "thinking at last", a, answer(x), b, answer(y, thinking=u)),
    ]
    if kind.inline == "thought":
        inline = [
            answer(f"<think>\n{thought}\n</think>\n\n{text.lstrip()}")
            for thought, text in ((t, x), (u, y))
        ]
        found += [
            _case(kind, "inline", a, inline[0]),
            _case(kind, "inline twice", a, inline[0], b, inline[1]),
        ]
    return found


def _calls(kind: Kind, words: Words) -> list[Case]:
    a, b, _ = map(user, words.users)
    x, y, _ = words.answers
    one, back = call(words.place), result(words.result)
    other = call("Bern", id_="f6g7h8i9j")
    asked = answer(None, tool_calls=[one])
    found = [
        _case(kind, "call", a, asked, tools=TOOLS),
        _case(kind, "call and result", a, asked, back, answer(x), tools=TOOLS),
        _case(kind, "tools unused", a, answer(x), tools=TOOLS),
        _case(kind, "call late", a, answer(x), b, asked, back, answer(y), tools=TOOLS),
        _case(kind, "call early", a, asked, back, answer(x), b, answer(y), tools=TOOLS),
        _case(kind, "call with an empty text", a, {**asked, "content": ""}, tools=TOOLS),
    ]
    if kind.talks:
        talk = answer(x, tool_calls=[one])
        found.append(_case(kind, "call with a text", a, talk, back, answer(y), tools=TOOLS))
    if kind.joined is not None:
        two = answer(None, tool_calls=[one, other])
        back_too = {**result("9 °C"), "tool_call_id": other["id"]}
        found.append(_case(kind, "two calls", a, two, back, back_too, answer(x), tools=TOOLS))
    if kind.thought is not None:
        t, u = words.thoughts
        asked = {**asked, "reasoning_content": t}
        said = answer(y, reasoning_content=u)
        found.append(_case(kind, "thinking and a call", a, asked, back, said, tools=TOOLS))
    return found
