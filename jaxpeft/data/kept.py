"""What a chat template must not lose of a row, and what of a row it need not read.

Tools, documents, the texts of earlier messages and some keys are refused by name where the
rendering is without them. Keys and arguments that change nothing are named once for a file.
"""

from typing import Any

from jaxpeft.data.chat import NEXT, RowError
from jaxpeft.data.messages import HANDED_ON
from jaxpeft.data.renderer import Renderer


class Unused:
    """Which keys and arguments made no difference in any row so far."""

    def __init__(self):
        self._used: set[str] = set()
        self._unused: dict[str, None] = {}

    def is_open(self, name: str) -> bool:
        """Whether it is still to be found out if something is used."""
        return name not in self._used

    def note(self, name: str, used: bool) -> None:
        """Remembers what a row shows."""
        if used:
            self._used.add(name)
        else:
            self._unused[name] = None

    def names(self) -> list[str]:
        """What no row has used."""
        return [name for name in self._unused if name not in self._used]


def check_prompt(renderer: Renderer, prompt: str, index: int) -> None:
    """Finds out whether generation sees all that a conversation says.

    Args:
        renderer: The conversation.
        prompt: What generation is given.
        index: How many messages stand in front of the answer.

    Raises:
        RowError: If the template drops tools, documents, a message or the call of a tool.
    """
    conversation = renderer.conversation
    for tool in conversation.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in prompt:
            raise RowError(f'"tools": the chat template does not render tool {name!r}')
    if conversation.documents:
        values = renderer.values[:index]
        if renderer.attempt(values, prompt=True, documents=False) == prompt:
            raise RowError('"documents": the chat template does not render documents')
    for place, message in enumerate(conversation.messages[:index]):
        words = renderer.words[place]
        said = words.answer.strip() if message.role == "assistant" else message.text.strip()
        if said and said not in prompt and not _is_written(renderer, place, index):
            way_out = ""
            if message.role in ("system", "developer"):
                way_out = "; move it into the first user message"
            raise RowError(
                f'"{message.where}": the chat template drops the text of the {message.role} '
                f"message, {said!r:.60}{way_out}"
            )
        lost = [name for name in message.tool_names if name not in prompt]
        if lost:
            raise RowError(f'"{message.where}": the chat template drops the call of {lost[0]!r}')


def check_keys(renderer: Renderer, unused: Unused) -> None:
    """Finds out which further keys of messages and which arguments the template reads.

    Raises:
        RowError: If it does not read one of `HANDED_ON`.
    """
    messages, whole = renderer.conversation.messages, None
    for place, message in enumerate(messages):
        for key in (*message.unknown, *HANDED_ON):
            must = key in HANDED_ON
            if key not in message.values or not (must or unused.is_open(f'messages["{key}"]')):
                continue
            whole = renderer.attempt(renderer.values) if whole is None else whole
            values = [dict(one) for one in renderer.values]
            del values[place][key]
            used = renderer.attempt(values) != whole
            if must and not used:
                raise RowError(f'"{message.where}.{key}": the chat template does not render it')
            if not must:
                unused.note(f'messages["{key}"]', used)
    for name in renderer.arguments:
        if unused.is_open(f"chat_template_kwargs.{name}"):
            used = renderer.chat.names(name, renderer.conversation.tools)
            unused.note(f"chat_template_kwargs.{name}", used)


def find_markup(renderer: Renderer) -> None:
    """Looks for special tokens inside of contents.

    Raises:
        RowError: If a content holds one, which would be read as the markup of a turn.
    """
    for message in renderer.conversation.messages:
        for key, value in message.values.items():
            for text in _texts(value):
                if token := renderer.chat.markup(text):
                    raise RowError(
                        f'"{message.where}.{key}": holds the special token {token!r}, which the '
                        "model reads as markup and not as text; remove it, or set "
                        "data.special_tokens_in_content to allow"
                    )


def _is_written(renderer: Renderer, place: int, index: int) -> bool:
    """Whether the template writes the content of a message in some other form."""
    values = [*renderer.values[:index]]
    values[place] = {**values[place], "content": NEXT}
    text = renderer.attempt(values, prompt=True)
    return text is not None and NEXT in text


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for one in (*value, *value.values()) for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return []
