"""The values of a message: its content, thinking, tool calls, and whether it is learned.

Each reader returns a value in the form of `jaxpeft.data.rows.messages`, and its problems as "field:
why".
"""

import json
from typing import Any

from jaxpeft.core import strict_json
from jaxpeft.core.errors import first_few
from jaxpeft.data.rows.checks import check_strings, check_text, type_name

REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "training", "trainable", "loss")
TEXT_ONLY = "only text can be learned here"


def is_tool(role: str) -> bool:
    """Whether a role is that of a tool's answer."""
    return role in ("tool", "observation", "ipython")


def read_content(
    where: str, given: dict[str, Any], value: dict[str, Any], role: str
) -> tuple[str | None, str, list[str]]:
    """The text, the thinking in its parts, and problems."""
    field, content = f'"{where}.content"', given.get("content")
    silent = role == "assistant" and (given.get("tool_calls") or _thinks(given))
    if content is None:
        if silent:
            return None, "", []
        if "content" in value:
            return None, "", [f"{field}: expected text, got null"]
        keys = first_few([json.dumps(name) for name in given]) or "none"
        return None, "", [f"{field}: missing; keys of the message: {keys}"]
    thoughts = ""
    if isinstance(content, list):
        content, thoughts, problems = _read_parts(f"{where}.content", content)
        if problems:
            return None, "", problems
        silent = silent or (role == "assistant" and bool(thoughts))
    may_be_empty = bool(silent) or role in ("system", "developer") or is_tool(role)
    problems = check_text(field, content, may_be_empty=may_be_empty)
    return None if problems else content, thoughts, problems


def _thinks(given: dict[str, Any]) -> bool:
    return any(isinstance(given.get(key), str) and given[key].strip() for key in REASONING)


def _read_parts(where: str, parts: list[Any]) -> tuple[str, str, list[str]]:
    """Joins a content that is a list of parts; returns its text, its thinking, and problems."""
    texts: list[str] = []
    thoughts: list[str] = []
    problems: list[str] = []
    for index, part in enumerate(parts):
        field = f"{where}[{index}]"
        if not isinstance(part, dict):
            problems.append(f'"{field}": expected an object, got {type_name(part)}')
            continue
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type")
        if kind not in ("text", "thinking"):
            shown = json.dumps(kind)
            problems.append(f'"{field}.type": {shown} is not supported; {TEXT_ONLY}')
            continue
        if odd := [key for key in part if key not in ("type", kind)]:
            problems.append(f'"{field}.{odd[0]}": not supported; a part has type and {kind}')
            continue
        text = part.get(kind)
        if kind == "thinking" and isinstance(text, list):
            text, _, wrong = _read_parts(f"{field}.thinking", text)
        else:
            wrong = check_text(f'"{field}.{kind}"', text, may_be_empty=True)
        problems += wrong
        if not wrong:
            (texts if kind == "text" else thoughts).append(str(text))
    return "".join(texts), "".join(thoughts), problems


def read_reasoning(
    where: str, given: dict[str, Any], thoughts: str, role: str
) -> tuple[str, list[str]]:
    """The thinking in a key or in parts of the content, and problems."""
    found: dict[str, str] = {"content": thoughts} if thoughts.strip() else {}
    for key in REASONING:
        value = given.get(key)
        if value is None or value == "":
            continue
        if problems := check_text(f'"{where}.{key}"', value, may_be_empty=True):
            return "", problems
        if value.strip():
            found[key] = value
    if not found:
        return "", []
    name, text = next(iter(found.items()))
    if role != "assistant":
        return "", [f'"{where}.{name}": only assistant turns think']
    other = next((key for key, value in found.items() if value.strip() != text.strip()), None)
    if other is not None:
        return "", [f'"{where}.{other}": says other than {name}; keep one of them']
    return text, []


def read_tool_calls(field: str, calls: Any, role: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The tool calls in one form, and problems."""
    if calls is None or calls == []:
        return [], []
    if not isinstance(calls, list):
        return [], [f'"{field}": expected a list of calls, got {type_name(calls)}']
    if role != "assistant":
        return [], [f'"{field}": only assistant turns call tools']
    found, problems = [], []
    for index, call in enumerate(calls):
        read, problem = _read_call(f"{field}[{index}]", call)
        if problem:
            problems.append(problem)
        else:
            found.append(read)
    return found, problems


def _read_call(where: str, call: Any) -> tuple[dict[str, Any], str]:
    if not isinstance(call, dict):
        return {}, f'"{where}": expected an object, got {type_name(call)}'
    function = call.get("function", call)
    inner = f"{where}.function" if "function" in call else where
    if not isinstance(function, dict):
        return {}, f'"{inner}": expected an object, got {type_name(function)}'
    if problems := check_text(f'"{inner}.name"', function.get("name")):
        return {}, problems[0]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            return {}, f'"{inner}.arguments": the text is not JSON; write an object'
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        return {}, f'"{inner}.arguments": expected an object, got {type_name(arguments)}'
    if problems := check_strings(f'"{where}"', call):
        return {}, problems[0]
    rest = {
        key: value
        for key, value in call.items()
        if key not in ("function", "type", "name", "arguments") and value is not None
    }
    named = {"name": function["name"], "arguments": arguments}
    return {**rest, "type": "function", "function": named}, ""


def read_weight(where: str, given: dict[str, Any], role: str) -> tuple[int, list[str]]:
    """Whether a turn may be learned, 1 or 0, and problems."""
    found: dict[str, int] = {}
    for key in WEIGHTS:
        if key not in given:
            continue
        value = given[key]
        if value not in (0, 1) or isinstance(value, str):
            shown = json.dumps(value)
            return 1, [f'"{where}.{key}": expected 0, 1, true or false, got {shown}']
        if role != "assistant":
            return 1, [f'"{where}.{key}": only assistant turns are learned; remove the key']
        found[key] = int(value)
    if len(set(found.values())) > 1:
        names = " and ".join(found)
        return 1, [f'"{where}.{next(iter(found))}": {names} disagree; keep one of them']
    return next(iter(found.values()), 1), []
