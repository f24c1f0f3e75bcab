"""Checks what a chat template drops of a row.

A row is refused if its rendering lacks tools, documents, the text of an earlier message or certain
keys. Other keys and arguments that change nothing are reported once per file.
"""

from typing import Any

from jaxpeft.data.chat.renderer import Renderer
from jaxpeft.data.chat.template import ANSWER, TOOL, RowError
from jaxpeft.data.rows.messages import HANDED_ON


class Unused:
    """The keys and arguments that made no difference in any row so far."""

    def __init__(self):
        self._used: set[str] = set()
        self._unused: dict[str, None] = {}

    def is_open(self, name: str) -> bool:
        """Whether it is still unknown if something is used."""
        return name not in self._used

    def note(self, name: str, used: bool) -> None:
        """Records whether a row uses something."""
        if used:
            self._used.add(name)
        else:
            self._unused[name] = None

    def names(self) -> list[str]:
        """The names that no row has used."""
        return [name for name in self._unused if name not in self._used]


def check_prompt(renderer: Renderer, prompt: str, index: int) -> None:
    """Checks that the generation prompt holds everything in front of the answer.

    Args:
        renderer: The conversation.
        prompt: The text that generation is given.
        index: The number of messages in front of the answer.

    Raises:
        RowError: The template drops tools, documents, a message or the call of a tool.
    """
    values = renderer.values[:index]
    _check_tools(renderer, values, prompt)
    documents = renderer.conversation.documents
    if documents and renderer.attempt(values, prompt=True, documents=False) == prompt:
        raise RowError('"documents": the chat template does not render documents')
    marked = [renderer.marked(place, f"m{place}e") for place in range(index)]
    text = renderer.attempt([one for one, _ in marked], prompt=True) or ""
    for place, (one, marks) in enumerate(marked):
        if all(mark in text for mark in marks):
            continue
        alone = [*values[:place], one, *values[place + 1 :]]
        shown = renderer.attempt(alone, prompt=True)
        for mark in marks:
            if mark not in (shown or "") and not (shown is None and _says(renderer, place, prompt)):
                raise RowError(_lost(renderer, place, mark))


def _check_tools(renderer: Renderer, values: list[dict[str, Any]], prompt: str) -> None:
    """Checks that the template renders all tools.

    Raises:
        RowError: One is missing.
    """
    tools = renderer.conversation.tools
    if not tools:
        return
    text = renderer.attempt(
        values, prompt=True, tools=[_marked_tool(tool, n) for n, tool in enumerate(tools)]
    )
    for place, tool in enumerate(tools):
        name = tool.get("function", tool).get("name", "")
        mark = f"{TOOL}{place}e"
        if (name not in prompt) if text is None else (mark not in text):
            raise RowError(f'"tools": the chat template does not render tool {name!r}')


def _marked_tool(tool: dict[str, Any], place: int) -> dict[str, Any]:
    function = tool.get("function")
    if isinstance(function, dict):
        return {**tool, "function": {**function, "name": f"{TOOL}{place}e"}}
    return {**tool, "name": f"{TOOL}{place}e"}


def _says(renderer: Renderer, place: int, prompt: str) -> bool:
    """Whether a message's own words are in a prompt; for templates that refuse replaced words."""
    words = renderer.words[place]
    return all(word.strip() in prompt for word in (words.answer, *words.tool_names))


def _lost(renderer: Renderer, place: int, mark: str) -> str:
    """The error about what a template drops of a message, with the way out."""
    message, words = renderer.conversation.messages[place], renderer.words[place]
    if not mark.startswith(ANSWER):
        names = " and ".join(words.tool_names)
        return f'"{message.where}": the chat template drops the call of {names!r:.60}'
    system = message.role in ("system", "developer")
    way_out = "; move it into the first user message" if system else ""
    return (
        f'"{message.where}": the chat template drops the text of the {message.role} message, '
        f"{words.answer.strip()!r:.60}{way_out}"
    )


def check_keys(renderer: Renderer, unused: Unused) -> None:
    """Finds out which further keys of messages, and which arguments, the template reads.

    Raises:
        RowError: It does not read one of the keys in `HANDED_ON`.
    """
    for place, message in enumerate(renderer.conversation.messages):
        handed = [key for key in HANDED_ON if message.values.get(key)]
        for key in (*message.unknown, *handed):
            must = key in HANDED_ON
            if not (must or unused.is_open(f'messages["{key}"]')):
                continue
            values = [dict(one) for one in renderer.values]
            del values[place][key]
            used = renderer.attempt(values) != renderer.whole
            if must and not used:
                raise RowError(f'"{message.where}.{key}": the chat template does not render it')
            if not must:
                unused.note(f'messages["{key}"]', used)
    for name in renderer.arguments:
        if unused.is_open(f"chat_template_kwargs.{name}"):
            used = renderer.chat.names(name, renderer.conversation.tools)
            unused.note(f"chat_template_kwargs.{name}", used)


def find_markup(renderer: Renderer) -> None:
    """Checks contents, tools and documents for special tokens.

    Raises:
        RowError: One of them holds a special token, which would be read as the markup of a turn.
    """
    conversation = renderer.conversation
    places = [
        (f"{message.where}.{key}", value)
        for message in conversation.messages
        for key, value in message.values.items()
    ]
    beside = [("tools", conversation.tools), ("documents", conversation.documents)]
    for where, value in [*places, *beside]:
        for text in _texts(value):
            if token := renderer.chat.markup(text):
                raise RowError(
                    f'"{where}": holds the special token {token!r}, which the model reads as '
                    "markup and not as text; remove it, or set data.special_tokens_in_content to "
                    "allow"
                )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for one in (*value, *value.values()) for text in _texts(one)]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return []
