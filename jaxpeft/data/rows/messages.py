"""Messages of a row: the roles, contents and keys they may have, and their meaning.

`read_messages` checks messages as the file has them and converts them to one form:

* ``role`` is a role in `ROLES` (``human`` becomes ``user``, ``gpt`` becomes ``assistant``, ...);
* ``content`` is text, or None in a turn that only calls tools;
* ``reasoning_content`` is the thinking of an assistant turn, whatever its key in the file;
* ``tool_calls`` is a list of ``{"type": "function", "function": {"name", "arguments"}}`` with the
  arguments as an object;
* every other key is passed to the chat template.

Whether an assistant turn is learned is then no longer a key of the message but a `Message.weight`.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jaxpeft.core.errors import first_few
from jaxpeft.data.rows.checks import check_strings, check_text, type_name
from jaxpeft.data.rows.message_values import (
    REASONING,
    TEXT_ONLY,
    WEIGHTS,
    is_tool,
    read_content,
    read_reasoning,
    read_tool_calls,
    read_weight,
)

ROLES = ("system", "user", "assistant", "tool", "developer", "observation", "ipython")
RENAMED = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
HANDED_ON = ("tool_plan", "citations")
"""Keys that a template must render; if it does not, the row is refused."""
KNOWN = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING, *WEIGHTS, *HANDED_ON)

_TOOLS = 'write tool_calls: [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
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
    "audio": TEXT_ONLY,
    "images": TEXT_ONLY,
    "image": TEXT_ONLY,
    "video": TEXT_ONLY,
    "videos": TEXT_ONLY,
    "prefix": _NO_PREFIX,
    "partial": _NO_PREFIX,
    "channel": _CHANNELS,
    "recipient": _CHANNELS,
    "content_type": _CHANNELS,
    "end_turn": _CHANNELS,
    "from": _SHAREGPT,
    "value": _SHAREGPT,
}
"""Keys that change what other trainers learn, and that have no meaning here."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message in the form that the top of this module describes.

    Attributes:
        values: The message for the chat template.
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
        """The speaker."""
        return self.values["role"]

    @property
    def text(self) -> str:
        """The content; empty if there is none."""
        return self.values.get("content") or ""

    @property
    def reasoning(self) -> str:
        """The thinking in the key for it; empty if there is none."""
        return self.values.get(REASONING[0]) or ""

    @property
    def tool_names(self) -> list[str]:
        """The functions that an assistant turn calls."""
        return [call["function"]["name"] for call in self.values.get("tool_calls", [])]


def read_messages(field: str, messages: Any) -> tuple[list[Message], list[str]]:
    """Checks messages and converts them to one form.

    Args:
        field: The key that holds them, such as "messages", for problems.
        messages: Any JSON value.

    Returns:
        The messages and their problems, as "field: why". If there are problems, the messages must
        not be used.
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
    """Checks the order of roles over all parts of a conversation; the last part is learned.

    Args:
        parts: The name of each part, for problems, and its messages.

    Returns:
        At most one problem, of a kind that no template can repair.
    """
    previous = None
    for field, messages in parts:
        for index, message in enumerate(messages):
            where = f'"{field}[{index}].role"'
            if message.role in ("system", "developer") and previous not in (None, "system"):
                return [f"{where}: a {message.role} message must be the first"]
            starts = previous in (None, "system", "developer")
            if message.role == "assistant" and starts and message.weight and field != "prompt":
                return [f"{where}: the conversation starts with an assistant turn"]
            if is_tool(message.role) and previous in (None, "system", "developer"):
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


def _read_message(where: str, value: Any) -> tuple[Message, list[str]]:
    if not isinstance(value, dict):
        return Message({"role": ""}), [f'"{where}": expected an object, got {type_name(value)}']
    given = {key: one for key, one in value.items() if one is not None or key in ("role",)}
    problems = [f'"{where}.{key}": not supported; {REFUSED[key]}' for key in given.keys() & REFUSED]
    if problems:
        return Message({"role": ""}), sorted(problems)
    role, problems = _read_role(where, given)
    values: dict[str, Any] = {"role": role}
    content, thoughts, wrong = read_content(where, given, value, role)
    problems += wrong
    values["content"] = content
    reasoning, wrong = read_reasoning(where, given, thoughts, role)
    problems += wrong
    if reasoning:
        values[REASONING[0]] = reasoning
    calls, wrong = read_tool_calls(f"{where}.tool_calls", given.get("tool_calls"), role)
    problems += wrong
    if calls:
        values["tool_calls"] = calls
    weight, wrong = read_weight(where, given, role)
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
