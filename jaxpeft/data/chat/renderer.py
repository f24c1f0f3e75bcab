"""A conversation in the form that its chat template accepts, rendered as often as needed.

Templates differ in the form they accept: arguments of tools as objects or as text, contents that
are null or empty, thinking in a key or in the content, names of roles. The first form that the
template renders is used for all renderings of a conversation, so that they can be compared.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data.chat import thinking
from jaxpeft.data.chat.template import ANSWER, ARGUMENT, QUESTION, THOUGHT, TOOL, Chat, RowError
from jaxpeft.data.rows.kinds import Conversation
from jaxpeft.data.rows.message_values import REASONING
from jaxpeft.data.rows.messages import Message


@dataclasses.dataclass(frozen=True)
class Words:
    """A message's own words.

    Attributes:
        thinking: The thinking of an assistant turn; "" if there is none.
        answer: The text, without a block of thinking.
        tool_names: The functions that it calls.
        inline: Whether its content has a block of thinking, which may be empty.
    """

    thinking: str
    answer: str
    tool_names: tuple[str, ...]
    inline: bool = False


class Renderer:
    """A conversation in the form that its template accepts, rendered as often as needed.

    Args:
        chat: The template.
        conversation: A checked conversation.

    Attributes:
        values: The messages in the accepted form.
        whole: The rendering of all of them.

    Raises:
        RowError: The template refuses the conversation in every form.
    """

    def __init__(self, chat: Chat, conversation: Conversation):
        self.chat, self.conversation = chat, conversation
        self.arguments = chat.arguments | dict(conversation.arguments)
        contents = [message.text for message in conversation.messages]
        thinks = any(map(thinking.lacks_opening, contents)) and self._prompt_thinks()
        self.words = [_words(message, thinks) for message in conversation.messages]
        self.values, self.whole = self._choose_form()

    def render(
        self,
        values: Sequence[dict[str, Any]],
        *,
        prompt: bool = False,
        documents: bool = True,
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders messages in the accepted form.

        Args:
            values: The messages.
            prompt: Whether to open an assistant turn after them.
            documents: Whether to pass the conversation's documents.
            tools: JSON schemas of tools; by default those of the conversation.
            arguments: Variables of the template; by default those of the conversation.

        Returns:
            The text.

        Raises:
            RowError: The template refuses the messages.
        """
        return self.chat.render(
            values,
            tools=self.conversation.tools if tools is None else tools,
            documents=self.conversation.documents if documents else None,
            prompt=prompt,
            arguments=self.arguments if arguments is None else arguments,
        )

    def attempt(self, values: Sequence[dict[str, Any]], **options: Any) -> str | None:
        """The result of `render`; None if the template refuses."""
        try:
            return self.render(values, **options)
        except RowError:
            return None

    def marked(self, index: int, suffix: str = "") -> tuple[dict[str, Any], list[str]]:
        """A message whose words are replaced by marks that are easy to find.

        Args:
            index: The place of the message.
            suffix: Text appended to the marks, to tell several messages apart.

        Returns:
            The message, and the marks that stand for its text and its calls.
        """
        values, words = dict(self.values[index]), self.words[index]
        if REASONING[0] in values:
            values |= dict.fromkeys(REASONING, THOUGHT + suffix)
        content, answer, marks = values["content"] or "", words.answer.strip(), []
        thought = words.thinking
        if answer:
            front = content[: content.rfind(answer)]
            content = front.replace(thought, THOUGHT + suffix, 1) if thought else front
            values["content"] = content + ANSWER + suffix
            marks.append(ANSWER + suffix)
        elif thought:
            values["content"] = content.replace(thought, THOUGHT + suffix, 1) or values["content"]
        if calls := values.get("tool_calls"):
            pairs = [_marked_call(call, f"{n}e{suffix}") for n, call in enumerate(calls)]
            values["tool_calls"] = [call for call, _ in pairs]
            marks += [mark for _, found in pairs for mark in found]
        return values, marks

    def _choose_form(self) -> tuple[list[dict[str, Any]], str]:
        """Finds the first form that the template renders, and the rendering."""
        messages, tools = self.conversation.messages, self.conversation.tools
        inline = any(words.inline for words in self.words)
        as_key = inline and self.chat.takes_reasoning(tools, self.arguments)
        self._has_place = as_key or (inline and self._prompt_thinks())
        calls = any(message.tool_names for message in messages)
        silent = any(message.values.get("content") is None for message in messages)
        problem: RowError | None = None
        for text, empty in itertools.product(
            [False, True][: 1 + calls], [False, True][: 1 + silent]
        ):
            form = [self._form(i, as_key, text, empty) for i in range(len(messages))]
            try:
                rendered = self.render(form)
            except RowError as error:
                problem = problem or error
                continue
            if silent and not empty and self._says_none(form, rendered):
                continue
            return form, rendered
        raise RowError(f"{problem}{self._way_out()}")

    def _prompt_thinks(self) -> bool:
        """Whether the generation prompt itself opens or closes a block of thinking."""
        question = [{"role": "user", "content": QUESTION}]
        prompt = self.attempt(question, prompt=True) or ""
        return thinking.open_at_end(prompt) is not None or thinking.closes_at_end(prompt)

    def _says_none(self, form: list[dict[str, Any]], rendered: str) -> bool:
        """Whether a template renders a content of null as the word None."""
        filled = [one | {"content": one["content"] or ""} for one in form]
        text = self.attempt(filled)
        return text is not None and rendered.count("None") > text.count("None")

    def _form(self, index: int, as_key: bool, text: bool, empty: bool) -> dict[str, Any]:
        message, words = self.conversation.messages[index], self.words[index]
        values = dict(message.values)
        values["role"] = self.role(values["role"])
        if words.thinking and (message.reasoning or as_key):
            values |= dict.fromkeys(REASONING, words.thinking.strip())
            values["content"] = words.answer if message.text else values["content"]
        elif words.inline and not words.thinking and self._has_place:
            values["content"] = words.answer  # the template or the prompt writes the empty block
        if values["content"] is None and empty:
            values["content"] = ""
        if text and "tool_calls" in values:
            values["tool_calls"] = [_with_text_arguments(call) for call in values["tool_calls"]]
        return values

    def role(self, role: str) -> str:
        """The template's name for the role of a message."""
        tools = self.conversation.tools
        names = {
            "developer": ("developer", "system"),
            "observation": ("observation", "tool"),
            "ipython": ("ipython", "tool"),
            "tool": ("tool", "observation", "ipython", "tool"),
        }.get(role, (role,))
        return next((name for name in names if self.chat.names(name, tools)), names[-1])

    def _way_out(self) -> str:
        """A hint for a template that refuses, if a change that helps is known."""
        form = [self._form(i, False, False, True) for i in range(len(self.words))]
        if form[0]["role"] == "system" and self.attempt(form[1:]) is not None:
            if not self.words[0].answer.strip():
                return "; it renders the conversation without the system message, so remove it"
            return (
                "; it renders the conversation without the system message, so move its text into "
                "the first user message"
            )
        roles = [one["role"] for one in form]
        spoken = ("user", "assistant")
        twice = [i for i in range(1, len(roles)) if roles[i] == roles[i - 1] in spoken]
        single = [one for i, one in enumerate(form) if i not in twice]
        if twice and self.attempt(single) is not None:
            where, role = self.conversation.messages[twice[0]].where, roles[twice[0]]
            return f"; join {where}, a second {role} turn in a row, with the one in front of it"
        return ""


def _words(message: Message, prompt_thinks: bool) -> Words:
    """A message's own words.

    Args:
        message: The message.
        prompt_thinks: Whether the generation prompt opens or closes a block of thinking. Then a
            content may begin inside a block.

    Raises:
        RowError: A block of thinking is not closed, or differs from the key beside it.
    """
    text, names = message.text, tuple(message.tool_names)
    if message.role != "assistant":
        return Words("", text, names)
    inline = thinking.split_inline(text, may_lack_opening=prompt_thinks)
    if inline is None:
        if text.lstrip().startswith(thinking.THINK):
            raise RowError(
                f'"{message.where}.content": opens {thinking.THINK} and does not close it; write '
                f"{thinking.END_THINK} behind the thinking"
            )
        return Words(message.reasoning, text, names)
    thought = inline[0] if inline[0].strip() else ""
    if thought and message.reasoning and message.reasoning.strip() != thought.strip():
        raise RowError(
            f'"{message.where}.content": its <think> block says other than the key beside it; '
            "keep one of them"
        )
    return Words(thought or message.reasoning, inline[1].lstrip("\n"), names, inline=True)


def _marked_call(call: dict[str, Any], suffix: str) -> tuple[dict[str, Any], list[str]]:
    """A call whose name and argument values are replaced by marks."""
    given = call["function"]["arguments"]
    is_text = isinstance(given, str)
    values: dict[str, Any] = json.loads(given) if is_text else given
    name, argument = TOOL + suffix, ARGUMENT + suffix
    marked: Any = dict.fromkeys(values, argument)
    named = {"name": name, "arguments": json.dumps(marked) if is_text else marked}
    marks = [name, argument] if values else [name]
    return {**call, "function": {**call["function"], **named}}, marks


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
