"""A tokenizer's chat template: rendering, special tokens, and the token that ends a turn."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpeft.data.chat.thinking import ends_with_empty_block, is_exempt
from jaxpeft.data.rows.message_values import REASONING
from jaxpeft.data.templates.render import TemplateError, render_template

ANSWER, NEXT, QUESTION = "Zq4vanswer7", "Zq4vnext7", "Zq4vquestion7"
THOUGHT, TOOL, ARGUMENT = "Zq4vthought7", "Zq4vtool7", "Zq4vargument7"
"""Marks to find places in a rendering; no template changes them and no row contains them."""


class RowError(ValueError):
    """A row cannot become an example; the text is "field: why"."""


def render_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Renders messages with the tokenizer's chat template, for training and generation alike.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: The messages as the template takes them: role, content, ...
        tools: JSON schemas of tools.
        documents: Documents to answer from.
        add_generation_prompt: Whether to open an assistant turn at the end.
        arguments: Further variables of the template.

    Returns:
        The text, special tokens included: encode it with ``add_special_tokens=False``.

    Raises:
        UserError: If the tokenizer has no chat template.
        RowError: If the template refuses the messages.
    """
    try:
        return render_template(
            tokenizer,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            arguments=arguments,
        )
    except TemplateError as error:
        raise RowError(f"the chat template refuses the messages: {error}") from None


class Chat:
    """A tokenizer and its chat template, with facts about it that are found out once.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Further tokens that end generation, from the model's config.
        arguments: Variables of the template for all conversations.

    Attributes:
        tokenizer: The tokenizer.
        arguments: The variables.
        eos: The text of the tokenizer's end token; "" if it has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Iterable[int] = (),
        arguments: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.eos: str = tokenizer.eos_token or ""
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        added |= dict.fromkeys(tokenizer.all_special_tokens, True)
        names = sorted(filter(None, added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names))) if names else None
        self._special = {token for token in names if added[token]}
        markup = [token for token in names if added[token] and not is_exempt(token)]
        self._markup = re.compile("|".join(map(re.escape, markup))) if markup else None
        known = (tokenizer.convert_ids_to_tokens(int(token)) for token in stop_ids)
        self._stops = [token for token in dict.fromkeys([self.eos, *known]) if token]
        self._ends: dict[str, str] = {}
        self._parts: dict[str, bool] = {}
        self._reasons: dict[str, bool] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders messages whose contents are texts, see `render_messages`."""
        if self._wants_parts(tools):
            messages = [_in_parts(message) for message in messages]
        return render_messages(
            self.tokenizer,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=prompt,
            arguments=arguments,
        )

    def source(self, tools: Any = None) -> str:
        """The text of the template for conversations with tools, or without."""
        if not self.tokenizer.chat_template:
            return ""
        return self.tokenizer.get_chat_template(tools=list(tools) if tools else None)

    def names(self, word: str, tools: Any = None) -> bool:
        """Whether the template contains a word, such as a role or an argument."""
        return re.search(rf"\b{re.escape(word)}\b", self.source(tools)) is not None

    def end_of_turn(self, tools: Any = None) -> str:
        """The text of the token that ends an assistant turn; "" if the template writes none."""
        source = self.source(tools)
        if source not in self._ends:
            self._ends[source] = self._find_end(tools)
        return self._ends[source]

    def stops(self, tools: Any = None) -> list[str]:
        """The texts of all tokens at which generation stops."""
        return list(dict.fromkeys(filter(None, [*self._stops, self.end_of_turn(tools)])))

    def takes_reasoning(self, tools: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether the template reads thinking from a key of its own.

        It does if it writes the value of that key for the last turn, or an empty block to fill.
        """
        key = json.dumps([self.source(tools), dict(arguments)], sort_keys=True, default=repr)
        if key not in self._reasons:
            turn = {"role": "assistant", "content": ANSWER, **dict.fromkeys(REASONING, THOUGHT)}
            text = self._try([{"role": "user", "content": QUESTION}, turn], tools, arguments)
            front = text.partition(ANSWER)[0]
            self._reasons[key] = THOUGHT in text or ends_with_empty_block(front)
        return self._reasons[key]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The places in a text of tokens that were added to the vocabulary."""
        return [] if self._added is None else [found.span() for found in self._added.finditer(text)]

    def common(self, left: str, right: str) -> int:
        """The length of the common beginning of two texts; no added token is cut in two."""
        length = min(len(left), len(right))
        at = next((i for i in range(length) if left[i] != right[i]), length)
        for text in (left, right):
            inside = (start for start, end in self.spans(text) if start < at < end)
            at = min(at, next(inside, at))
        return at

    def first_stop(self, text: str, stops: Iterable[str], start: int = 0) -> tuple[int, int] | None:
        """The place of the first of several tokens in a text, from `start` on."""
        wanted = set(stops)
        for first, last in self.spans(text):
            if first >= start and text[first:last] in wanted:
                return first, last
        return None

    def specials(self, text: str) -> list[tuple[int, int]]:
        """The places in a text of tokens that are flagged special."""
        return [(i, j) for i, j in self.spans(text) if text[i:j] in self._special]

    def markup(self, text: str) -> str | None:
        """A special token in the content of a message, or None.

        Tags of thinking and of tools do not count as markup, because contents may hold them.
        """
        found = self._markup.search(text) if self._markup else None
        return found[0] if found else None

    def _wants_parts(self, tools: Any) -> bool:
        """Whether the template ignores contents that are texts, and reads lists of parts."""
        source = self.source(tools)
        if source not in self._parts:
            self._parts[source] = False
            text: dict[str, Any] = {"role": "user", "content": QUESTION}
            if QUESTION not in self._try([text], tools, self.arguments):
                found = self._try([_in_parts(text)], tools, self.arguments)
                self._parts[source] = QUESTION in found
        return self._parts[source]

    def _find_end(self, tools: Any) -> str:
        """Finds the end of a turn by rendering a turn that is last and one that is not."""
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        last = self._try(turns, tools, self.arguments).rpartition(ANSWER)[2]
        more = self._try([*turns, {"role": "user", "content": NEXT}], tools, self.arguments)
        follow = more.rpartition(ANSWER)[2].partition(NEXT)[0] if ANSWER in more else ""
        both = last[: self.common(last, follow)]
        special_in_both, special_in_follow = self.specials(both), self.specials(follow)
        found = (
            self.first_stop(both, self._stops)
            or (special_in_both[-1] if special_in_both else None),
            self.first_stop(last, self._stops),
            self.first_stop(follow, self._stops)
            or (special_in_follow[0] if special_in_follow else None),
        )
        for text, place in zip((both, last, follow), found, strict=True):
            if place is not None:
                return text[slice(*place)]
        return ""

    def _try(self, messages: Sequence[Any], tools: Any, arguments: Mapping[str, Any]) -> str:
        """A rendering, or None if the template refuses."""
        try:
            return self.render(messages, tools=tools, arguments=arguments)
        except RowError:
            return ""


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list with one part, its text."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": content}]}
