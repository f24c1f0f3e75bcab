"""Rows of training data: the kinds of rows, and the checks of each.

A row is an object with ``messages``, or with ``prompt`` and ``completion`` (both text or both
lists of messages), or with ``text``. Beside messages it may have ``tools``, ``documents``,
``chat_template_kwargs`` and ``system``. A method for several tasks reads ``task``, a number from 0
on. Keys that have a meaning for another trainer are refused; any other key is ignored, and reported
once.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core import strict_json
from jaxpeft.core.errors import first_few, nearest
from jaxpeft.data.rows.checks import (
    check_arguments,
    check_shape,
    check_strings,
    check_text,
    type_name,
)
from jaxpeft.data.rows.json_rows import read_json
from jaxpeft.data.rows.keys import REFUSED, is_foreign
from jaxpeft.data.rows.messages import Message, check_turns, read_messages
from jaxpeft.data.rows.problems import Problem, report

KINDS = ("messages", "prompt", "completion", "text")
CHAT_KEYS = ("tools", "documents", "chat_template_kwargs", "system")
KNOWN = (*KINDS, *CHAT_KEYS, "task")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        line: The line where it starts, from 1.
        value: The object.
    """

    line: int
    value: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The usable rows of a file, and the problems of the others.

    Attributes:
        path: The file as the user wrote it.
        sha256: The hash of its bytes, in hex.
        rows: Checked rows in the order of the file.
        problems: At least one for every other row.
    """

    path: str
    sha256: str
    rows: list[Row]
    problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row of messages, with the further inputs of its chat template.

    Attributes:
        messages: All messages, in one form.
        start: Index of the first message that may be learned: 0, or the start of the completion.
        tools: JSON schemas of the tools, or None.
        documents: Documents to answer from, or None.
        arguments: Further variables of the template.
    """

    messages: tuple[Message, ...]
    start: int = 0
    tools: tuple[Any, ...] | None = None
    documents: tuple[Any, ...] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    text = json.dumps([row.value for row in rows], default=repr)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return RowFile(name, digest, rows, problems)


def read_rows(path: str | pathlib.Path) -> list[Row]:
    """Reads a file of rows, all of which must be correct.

    Args:
        path: A ``.jsonl`` or ``.json`` file.

    Returns:
        The rows in the order of the file.

    Raises:
        UserError: Some rows are not correct; the text has the first 20 problems with their lines.
    """
    file = scan_rows(path)
    if file.problems:
        raise report(file.path, file.problems)
    return file.rows


def check_row(value: Any) -> list[str]:
    """Checks a row.

    Args:
        value: Any JSON value.

    Returns:
        All problems, each as "field: why"; empty for a row that is correct.
    """
    if not isinstance(value, dict):
        return [f"expected an object, got {type_name(value)}"]
    if problems := check_shape(value):
        return problems
    kinds = tuple(key for key in KINDS if value.get(key) is not None)
    if len(kinds) < 1 or kinds in (("prompt",), ("completion",)):
        kinds = tuple(key for key in KINDS if key in value)
    refused = [key for key in REFUSED if value.get(key) is not None]
    if refused and (kinds or is_foreign(value)):
        hints = dict.fromkeys(REFUSED[key] for key in refused)
        return [f"{_quoted(refused, hint)}: not supported; {hint}" for hint in hints]
    if kinds == ("messages",) or (kinds == ("prompt", "completion") and _has_lists(value)):
        return read_conversation(value)[1]
    chat_only = [key for key in CHAT_KEYS if value.get(key) is not None]
    if kinds and chat_only:
        return [f'"{key}": needs messages; the row has text' for key in chat_only]
    if kinds == ("prompt", "completion"):
        return _check_pair(value["prompt"], value["completion"])
    if kinds == ("text",):
        return check_text('"text"', value["text"])
    return [_explain_kinds(value, kinds)]


def read_conversation(row: Mapping[str, Any]) -> tuple[Conversation, list[str]]:
    """The conversation of a row, and its problems, each as "field: why".

    Args:
        row: A row with messages, or with a prompt and a completion of messages.

    Returns:
        The conversation, which must not be used if there are problems.
    """
    fields = ("messages",) if "messages" in row else ("prompt", "completion")
    parts, problems = [], []
    for field in fields:
        messages, wrong = read_messages(field, row[field])
        parts.append((field, messages))
        problems += wrong
    problems = problems or check_turns(parts)
    system = row.get("system")
    if system is not None:
        problems += check_text('"system"', system, may_be_empty=True)
        if any(one.role in ("system", "developer") for one in parts[0][1]):
            problems.append('"system": the row has a system message too; keep one of them')
        parts[0][1].insert(0, Message({"role": "system", "content": system}, where="system"))
    tools, wrong = _read_list('"tools"', row.get("tools"))
    problems += wrong or [problem for tool in tools or () for problem in _check_tool(tool)]
    documents, wrong = _read_list('"documents"', row.get("documents"))
    problems += wrong
    arguments = row.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, dict):
        got = type_name(arguments)
        problems.append(f'"chat_template_kwargs": expected an object, got {got}')
    elif arguments:
        problems += check_arguments('"chat_template_kwargs"', arguments)
    conversation = Conversation(
        messages=tuple(message for _, messages in parts for message in messages),
        start=len(parts[0][1]) if len(parts) == 2 else 0,
        tools=tools,
        documents=documents,
        arguments=arguments if isinstance(arguments, dict) else {},
    )
    return conversation, problems


def check_task(row: dict[str, Any], count: int) -> str | None:
    """The problem with a row's task, as "field: why".

    Args:
        row: The value of a checked row.
        count: The number of tasks. With one, the row need not name it.
    """
    if "task" not in row:
        missing = f'"task": missing; the method has {count} tasks, give every row one from 0 on'
        return missing if count > 1 else None
    task = row["task"]
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < count:
        return f'"task": expected a whole number from 0 to {count - 1}, got {json.dumps(task)}'
    return None


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a checked row has messages."""
    return "messages" in row or ("prompt" in row and not isinstance(row["prompt"], str))


def has_answer(row: Mapping[str, Any]) -> bool:
    """Whether a checked row has a question and an answer, which plain text does not have."""
    return "text" not in row


def unused_keys(row: Mapping[str, Any], *, tasks: bool = True) -> list[str]:
    """Keys of a checked row that nothing reads.

    Args:
        row: The row.
        tasks: Whether the rows' tasks are read.
    """
    known = [key for key in KNOWN if tasks or key != "task"]
    return [key for key in row if key not in known and row[key] is not None]


def _quoted(keys: Sequence[str], hint: str) -> str:
    """The keys that share a hint."""
    return ", ".join(f'"{key}"' for key in keys if REFUSED[key] == hint)


def _has_lists(value: Mapping[str, Any]) -> bool:
    return isinstance(value["prompt"], list) and isinstance(value["completion"], list)


def _read_list(field: str, value: Any) -> tuple[tuple[Any, ...] | None, list[str]]:
    """A list of objects, or the JSON text of one; None for an empty list."""
    if isinstance(value, str):
        if not value.strip():
            return None, []
        try:
            value = strict_json.loads(value)
        except ValueError:
            return None, [f"{field}: the text is not JSON; write a list of objects"]
    if value is None or value == []:
        return None, []
    if not isinstance(value, list):
        return None, [f"{field}: expected a list of objects, got {type_name(value)}"]
    odd = [one for one in value if not isinstance(one, dict)]
    if odd:
        return None, [f"{field}: expected a list of objects, got {type_name(odd[0])} in it"]
    return tuple(value), check_strings(field, value)


def _check_tool(tool: Mapping[str, Any]) -> list[str]:
    """The problem with the schema of a tool, as "field: why"."""
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return [f'"tools": function: expected an object, got {type_name(function)}']
    return check_text('"tools": the name of a tool', function.get("name"))


def _check_pair(prompt: Any, completion: Any) -> list[str]:
    if isinstance(prompt, list | str) and isinstance(completion, list | str):
        if type(prompt) is type(completion):
            return check_text('"prompt"', prompt) + check_text('"completion"', completion)
        kinds = f'"prompt" is {type_name(prompt)} and "completion" is {type_name(completion)}'
        return [f"{kinds}; make both text or both lists of messages"]
    problems = []
    for field, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list):
            problems += check_text(f'"{field}"', value)
    return problems


def _explain_kinds(value: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    """The error about a row that is of no kind, or of several."""
    keys = first_few([json.dumps(key) for key in value]) or "none"
    if kinds in (("prompt",), ("completion",)):
        missing = "completion" if kinds == ("prompt",) else "prompt"
        return f'"{missing}": missing; keys of the row: {keys}'
    if kinds:
        given = ", ".join(f'"{kind}"' for kind in kinds)
        return f"the row mixes {given}; keep messages, or prompt and completion, or text"
    close = [match for key in value for match in nearest(key, list(KINDS), 1)]
    guess = f'; did you mean "{close[0]}"?' if close else ""
    return f"expected messages, or prompt and completion, or text; keys of the row: {keys}{guess}"
