"""Rows of training data: which kinds there are, and what makes one of them wrong.

A row is an object with ``messages``, or with ``prompt`` and ``completion`` (both text or both
lists of messages), or with ``text``. A method of several tasks reads its ``task``, a number from 0
on. Other keys of the row are ignored.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxpeft.data.files import read_json
from jaxpeft.data.problems import Problem, report
from jaxpeft.errors import first_few, nearest

KINDS = ("messages", "prompt", "completion", "text")
ROLES = ("system", "user", "assistant")
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        line: Where it starts, from 1.
        value: The object.
    """

    line: int
    value: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The usable rows of a file, and what is wrong with the others.

    Attributes:
        path: The file as the user wrote it.
        sha256: Of its bytes, in hex.
        rows: Checked rows in the order of the file.
        problems: At least one for every other row.
    """

    path: str
    sha256: str
    rows: list[Row]
    problems: list[Problem]


def scan_rows(path: str | pathlib.Path) -> RowFile:
    """Reads and checks every row of a file in one pass.

    Args:
        path: A ``.jsonl`` or ``.json`` file.

    Returns:
        The rows that are right and the problems of the others.

    Raises:
        UserError: If the file as a whole cannot be read.
    """
    file = read_json(path)
    rows, problems = [], list(file.problems)
    for place, (line, value) in enumerate(file.values):
        found = check_row(value)
        problems += [Problem(line, text, "bad row", row=place) for text in found]
        if not found:
            rows.append(Row(line, value))
    return RowFile(file.path, file.sha256, rows, problems)


def check_rows(values: Sequence[Any], name: str) -> RowFile:
    """Checks rows held in memory.

    Args:
        values: The rows.
        name: What to call them in errors.

    Returns:
        The rows that are right and the problems of the others; lines count from 1.
    """
    rows, problems = [], []
    for line, value in enumerate(values, 1):
        found = check_row(value)
        problems += [Problem(line, text, "bad row", hint="", row=line) for text in found]
        if not found:
            rows.append(Row(line, value))
    digest = hashlib.sha256(json.dumps(list(values), default=repr).encode()).hexdigest()
    return RowFile(name, digest, rows, problems)


def read_rows(path: str | pathlib.Path) -> list[Row]:
    """Reads a file of rows, all of which must be right.

    Args:
        path: A ``.jsonl`` or ``.json`` file.

    Returns:
        The rows in the order of the file.

    Raises:
        UserError: Naming every problem with its line, the first 20 in full.
    """
    file = scan_rows(path)
    if file.problems:
        raise report(file.path, file.problems)
    return file.rows


def check_row(value: Any) -> list[str]:
    """Says what is wrong with a row, as "field: why".

    Args:
        value: Any JSON value.

    Returns:
        All problems found; empty for a row that is right.
    """
    if not isinstance(value, dict):
        return [f"expected an object, got {type_name(value)}"]
    kinds = tuple(key for key in KINDS if key in value)
    if kinds == ("messages",):
        return _check_messages("messages", value["messages"]) or _check_turns(
            [("messages", value["messages"])]
        )
    if kinds == ("prompt", "completion"):
        return _check_pair(value["prompt"], value["completion"])
    if kinds == ("text",):
        return _check_text('"text"', value["text"])
    keys = first_few([json.dumps(key) for key in value]) or "none"
    if kinds in (("prompt",), ("completion",)):
        missing = "completion" if kinds == ("prompt",) else "prompt"
        return [f'"{missing}": missing; keys of the row: {keys}']
    if kinds:
        given = ", ".join(f'"{kind}"' for kind in kinds)
        return [f"the row mixes {given}; keep messages, or prompt and completion, or text"]
    close = [match for key in value for match in nearest(key, list(KINDS), 1)]
    guess = f'; did you mean "{close[0]}"?' if close else ""
    return [f"expected messages, or prompt and completion, or text; keys of the row: {keys}{guess}"]


def check_task(row: dict[str, Any], count: int) -> str | None:
    """Says what is wrong with a row's task, as "field: why".

    Args:
        row: The value of a checked row.
        count: How many tasks there are. With one, the row need not name it.
    """
    if "task" not in row:
        missing = f'"task": missing; the method has {count} tasks, give every row one from 0 on'
        return missing if count > 1 else None
    task = row["task"]
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < count:
        return f'"task": expected a whole number from 0 to {count - 1}, got {json.dumps(task)}'
    return None


def prompt_and_reference(row: dict[str, Any]) -> tuple[list[dict[str, str]] | str, str] | None:
    """Splits a row into what the model is given and what it should answer.

    Args:
        row: The value of a checked row.

    Returns:
        The messages before the last assistant turn, or the prompt, and the reference text
        without spaces around it; None for rows of plain text.
    """
    if "text" in row:
        return None
    if isinstance(row.get("prompt"), str):
        return row["prompt"], row["completion"].strip()
    messages, _ = conversation_of(row)
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    return messages[:last], messages[last]["content"].strip()


def conversation_of(row: dict[str, Any]) -> tuple[list[dict[str, str]], int]:
    """All messages of a row, and from which of them on assistant turns are learned.

    Args:
        row: The value of a checked row with messages.

    Returns:
        Role and content of every message, and an index: 0, or the start of the completion.
    """
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    start = 0 if "messages" in row else len(row["prompt"])
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns], start


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _check_text(field: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{field}: expected text, got {type_name(value)}"]
    if not value.strip():
        return [f"{field}: empty"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [f"{field}: half of a surrogate pair at character {error.start}"]
    return []


def _check_pair(prompt: Any, completion: Any) -> list[str]:
    if isinstance(prompt, list) and isinstance(completion, list):
        problems = _check_messages("prompt", prompt) + _check_messages("completion", completion)
        return problems or _check_turns([("prompt", prompt), ("completion", completion)])
    if isinstance(prompt, list | str) and isinstance(completion, list | str):
        if type(prompt) is type(completion):
            return _check_text('"prompt"', prompt) + _check_text('"completion"', completion)
        kinds = f'"prompt" is {type_name(prompt)} and "completion" is {type_name(completion)}'
        return [f"{kinds}; make both text or both lists of messages"]
    problems = []
    for field, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list):
            problems += _check_text(f'"{field}"', value)
    return problems


def _check_messages(field: str, messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return [f'"{field}": expected a list of messages, got {type_name(messages)}']
    if not messages:
        return [f'"{field}": empty']
    problems = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            problems.append(f'"{where}": expected an object, got {type_name(message)}')
            continue
        for key in ("role", "content"):
            if key not in message:
                keys = first_few([json.dumps(name) for name in message]) or "none"
                problems.append(f'"{where}.{key}": missing; keys of the message: {keys}')
            else:
                problems += _check_text(f'"{where}.{key}"', message[key])
        role = message.get("role")
        if isinstance(role, str) and role.strip() and role not in ROLES:
            known = ", ".join(ROLES)
            problems.append(f'"{where}.role": unknown role {json.dumps(role)}; known: {known}')
        for key in _UNSUPPORTED:
            if message.get(key) is not None:
                problems.append(f'"{where}.{key}": not supported; only role and content are used')
    return problems


def _check_turns(parts: list[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """Checks that user and assistant take turns over all parts, the last of which is learned."""
    previous = None
    for field, messages in parts:
        for index, message in enumerate(messages):
            role, where = message["role"], f'"{field}[{index}].role"'
            if role == "system" and previous is not None:
                return [f"{where}: a system message must be the first"]
            if role == "assistant" and previous in (None, "system"):
                return [f"{where}: the conversation starts with an assistant turn"]
            if role == previous:
                return [f"{where}: two {role} turns in a row"]
            previous = role
    field, learned = parts[-1]
    if all(message["role"] != "assistant" for message in learned):
        return [f'"{field}": no assistant turn, so there is nothing to learn']
    if field == "completion" and learned[0]["role"] != "assistant":
        return ['"completion[0].role": a completion must open with an assistant turn']
    return []
