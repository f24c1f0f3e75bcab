"""Messages of a row: which roles, contents and keys there are, and what each of them means.

`read_messages` checks the messages as the file has them and writes them in one form:

* ``role`` is a role of `ROLES` (``human`` becomes ``user``, ``gpt`` becomes ``assistant``, ...);
* ``content`` is text, or None in a turn that only calls tools;
* ``reasoning_content`` is the thinking of an assistant turn, whatever the file called it;
* ``tool_calls`` is a list of ``{"type": "function", "function": {"name", "arguments"}}`` with the
  arguments as an object;
* every other key is handed on to the chat template.

Whether an assistant turn is learned is no key of the message any more, but a `Message.weight`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import first_few

ROLES = ("system", "user", "assistant", "tool", "developer", "observation", "ipython")
RENAMED = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "training", "trainable", "loss")
HANDED_ON = ("tool_plan", "citations")
"""Keys that a template must render: a row is refused where it does not."""
KNOWN = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING, *WEIGHTS, *HANDED_ON)

_TOOLS = 'write tool_calls: [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
_TEXT_ONLY = "only text can be learned here"
_WHICH_TURNS = "which turns are learned is said for whole messages, by weight: 0 or 1"
_NO_PREFIX = "an answer is always learned from its start"
_CHANNELS = "the template writes channels itself; give reasoning_content, content and tool_calls"
_SHAREGPT = "messages have role and content; from and value are ShareGPT's names"
REFUSED = {
    "function_call": _TOOLS,
    "unparsed_tool_calls": _TOOLS,
    "train_detail": _WHICH_TURNS,
    "training_detail": _WHICH_TURNS,
    "mask": _WHICH_TURNS,
    "label": _WHICH_TURNS,
    "refusal": "put the text of a refusal into content",
    "audio": _TEXT_ONLY,
    "images": _TEXT_ONLY,
    "image": _TEXT_ONLY,
    "video": _TEXT_ONLY,
    "videos": _TEXT_ONLY,
    "prefix": _NO_PREFIX,
    "partial": _NO_PREFIX,
    "channel": _CHANNELS,
    "recipient": _CHANNELS,
    "content_type": _CHANNELS,
    "end_turn": _CHANNELS,
    "from": _SHAREGPT,
    "value": _SHAREGPT,
}
"""Keys of messages that would change what is learned and have no meaning here."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message in the form that the top of this module describes.

    Attributes:
        values: What the chat template is given.
        weight: 0 for an assistant turn that is not learned, 1 for one that may be.
        unknown: Keys that neither this library nor its tables know.
        where: Its place in the row, such as "messages[1]", for problems.
    """

    values: dict[str, Any]
    weight: int = 1
    unknown: tuple[str, ...] = ()
    where: str = ""

    @property
    def role(self) -> str:
        """Who speaks."""
        return self.values["role"]

    @property
    def text(self) -> str:
        """The content; empty where there is none."""
        return self.values.get("content") or ""

    @property
    def reasoning(self) -> str:
        """The thinking that a key holds; empty where there is none."""
        return self.values.get(REASONING[0]) or ""

    @property
    def tool_names(self) -> list[str]:
        """The functions that an assistant turn calls."""
        return [call["function"]["name"] for call in self.values.get("tool_calls", [])]


def read_messages(field: str, messages: Any) -> tuple[list[Message], list[str]]:
    """Checks messages and writes them in one form.

    Args:
        field: What holds them, such as "messages", for problems.
        messages: Any JSON value.

    Returns:
        The messages, and what is wrong with them, as "field: why"; with problems the messages
        are not to be used.
    """
    if not isinstance(messages, list):
        return [], [f'"{field}": expected a list of messages, got {type_name(messages)}']
    if not messages:
        return [], [f'"{field}": empty']
    found, problems = [], []
    for index, value in enumerate(messages):
        message, wrong = _read_message(f"{field}[{index}]", value)
        found.append(message)
        problems += wrong
    return found, problems


def check_turns(parts: Sequence[tuple[str, Sequence[Message]]]) -> list[str]:
    """Checks the order of roles over all parts of a conversation, the last of which is learned.

    Args:
        parts: The name of each part, for problems, and its messages.

    Returns:
        At most one problem: what no template can mend.
    """
    previous = None
    for field, messages in parts:
        for index, message in enumerate(messages):
            where = f'"{field}[{index}].role"'
            if message.role in ("system", "developer") and previous not in (None, "system"):
                return [f"{where}: a {message.role} message must be the first"]
            if message.role == "assistant" and previous in (None, "system", "developer"):
                return [f"{where}: the conversation starts with an assistant turn"]
            if _is_tool(message.role) and previous in (None, "system", "developer"):
                return [f"{where}: the conversation starts with the answer of a tool"]
            previous = message.role
    field, learned = parts[-1]
    turns = [message for message in learned if message.role == "assistant"]
    if not turns:
        return [f'"{field}": no assistant turn, so there is nothing to learn']
    if field == "completion" and learned[0].role != "assistant":
        return ['"completion[0].role": a completion must open with an assistant turn']
    if not any(message.weight for message in turns):
        return [f'"{field}": every assistant turn has weight 0, so there is nothing to learn']
    return []


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def check_text(field: str, value: Any, *, may_be_empty: bool = False) -> list[str]:
    """Says what is wrong with a text, as "field: why"; nothing for one that is right."""
    if not isinstance(value, str):
        return [f"{field}: expected text, got {type_name(value)}"]
    if not value.strip() and not may_be_empty:
        return [f"{field}: empty"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [f"{field}: half of a surrogate pair at character {error.start}"]
    return []


def check_strings(field: str, value: Any) -> list[str]:
    """Says what is wrong with the texts inside a JSON value, at any depth."""
    if isinstance(value, str):
        return check_text(field, value, may_be_empty=True)
    if isinstance(value, dict):
        texts = [check_strings(f"{field}.{key}", one) for key, one in value.items()]
        keys = [check_text(field, key, may_be_empty=True) for key in value]
        return [problem for found in (*texts, *keys) for problem in found]
    if isinstance(value, list):
        return [problem for one in value for problem in check_strings(field, one)]
    return []


TAKEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that no argument may set."""


def check_arguments(field: str, arguments: Mapping[str, Any]) -> list[str]:
    """Says what is wrong with arguments of a chat template, as "field: why"."""
    taken = [name for name in arguments if name in TAKEN]
    problems = [f"{field}: {name} is set by the row itself; remove it" for name in taken]
    return problems + check_strings(field, dict(arguments))


def _is_tool(role: str) -> bool:
    return role in ("tool", "observation", "ipython")


def _read_message(where: str, value: Any) -> tuple[Message, list[str]]:
    if not isinstance(value, dict):
        return Message({"role": ""}), [f'"{where}": expected an object, got {type_name(value)}']
    given = {key: one for key, one in value.items() if one is not None or key in ("role",)}
    problems = [f'"{where}.{key}": not supported; {REFUSED[key]}' for key in given.keys() & REFUSED]
    if problems:
        return Message({"role": ""}), sorted(problems)
    role, problems = _read_role(where, given)
    values: dict[str, Any] = {"role": role}
    content, thoughts, wrong = _read_content(where, given, value, role)
    problems += wrong
    values["content"] = content
    reasoning, wrong = _read_reasoning(where, given, thoughts, role)
    problems += wrong
    if reasoning:
        values[REASONING[0]] = reasoning
    calls, wrong = _read_tool_calls(f"{where}.tool_calls", given.get("tool_calls"), role)
    problems += wrong
    if calls:
        values["tool_calls"] = calls
    weight, wrong = _read_weight(where, given, role)
    problems += wrong
    unknown = tuple(key for key in given if key not in KNOWN)
    for key in ("tool_call_id", "name", *HANDED_ON, *unknown):
        if key in given:
            problems += check_strings(f'"{where}.{key}"', given[key])
            values[key] = given[key]
    return Message(values, weight, unknown, where), problems


def _read_role(where: str, given: dict[str, Any]) -> tuple[str, list[str]]:
    if "role" not in given:
        keys = first_few([json.dumps(name) for name in given]) or "none"
        return "", [f'"{where}.role": missing; keys of the message: {keys}']
    role = given["role"]
    if problems := check_text(f'"{where}.role"', role):
        return "", problems
    if role == "function":
        return "", [f'"{where}.role": "function" is called "tool" now, and for its call {_TOOLS}']
    role = RENAMED.get(role, role)
    if role not in ROLES:
        known = ", ".join(ROLES)
        return "", [f'"{where}.role": unknown role {json.dumps(role)}; known: {known}']
    return role, []


def _read_content(
    where: str, given: dict[str, Any], value: dict[str, Any], role: str
) -> tuple[str | None, str, list[str]]:
    """The text, the thinking among its parts, and problems."""
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
    may_be_empty = bool(silent) or role in ("system", "developer") or _is_tool(role)
    return content, thoughts, check_text(field, content, may_be_empty=may_be_empty)


def _thinks(given: dict[str, Any]) -> bool:
    return any(isinstance(given.get(key), str) and given[key].strip() for key in REASONING)


def _read_parts(where: str, parts: list[Any]) -> tuple[str, str, list[str]]:
    """Joins a content that is a list of parts: its text, its thinking, and problems."""
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
            problems.append(f'"{field}.type": {shown} is not supported; {_TEXT_ONLY}')
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


def _read_reasoning(
    where: str, given: dict[str, Any], thoughts: str, role: str
) -> tuple[str, list[str]]:
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


def _read_tool_calls(field: str, calls: Any, role: str) -> tuple[list[dict[str, Any]], list[str]]:
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
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return {}, f'"{inner}.arguments": the text is not JSON; write an object'
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        return {}, f'"{inner}.arguments": expected an object, got {type_name(arguments)}'
    if problems := check_strings(f'"{inner}.arguments"', arguments):
        return {}, problems[0]
    rest = {
        key: value
        for key, value in call.items()
        if key not in ("function", "type", "name", "arguments") and value is not None
    }
    named = {"name": function["name"], "arguments": arguments}
    return {**rest, "type": "function", "function": named}, ""


def _read_weight(where: str, given: dict[str, Any], role: str) -> tuple[int, list[str]]:
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
