"""The law of chat data as a check that knows nothing of how examples are made.

An assistant turn is learned in exactly the tokens in which generation would meet it: behind the
rendering of everything before it plus the generation prompt, up to and including the token at
which generation stops.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from chat_rows import KEYS_OF_THINKING, Case
from chat_templates import Kind, shown, spans_of

FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""The zoo's templates ask for the date as ``%d %b %Y`` only."""


def prompt_texts(tokenizer: Any, row: dict[str, Any], index: int) -> list[str]:
    """What generation may be given before the message at `index`, by apply_chat_template.

    There are two of them where a turn of the history has thinking inside its content, which may be
    handed to the template as it is or by key.
    """
    texts = []
    for by_key in (False, True):
        for as_text in (False, True):
            history = [_handed(m, by_key, as_text) for m in row["messages"][:index]]
            try:
                texts.append(_render(tokenizer, history, row))
                break
            except TypeError:  # the template wants arguments as JSON text
                if as_text:
                    raise
    return list(dict.fromkeys(texts))


def _handed(message: dict[str, Any], by_key: bool, as_text: bool) -> dict[str, Any]:
    """A message as templates want it: arguments as objects, all names of thinking, no null."""
    message = dict(message)
    message["content"] = message["content"] or ""
    given = [message[key] for key in KEYS_OF_THINKING if key in message]
    found = re.match(r"<think>\n(.*?)\n</think>\n\n(.*)", message["content"], re.DOTALL)
    if found and by_key and message["role"] == "assistant":
        given, message["content"] = [found[1]], found[2]
    if given:
        message |= dict.fromkeys(KEYS_OF_THINKING, given[0])
    if "tool_calls" in message and not as_text:
        message["tool_calls"] = [
            {
                **entry,
                "function": {
                    **entry["function"],
                    "arguments": json.loads(entry["function"]["arguments"]),
                },
            }
            for entry in message["tool_calls"]
        ]
    return message


def _render(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any]) -> str:
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        messages,
        chat_template=FIXED_DATE + tokenizer.get_chat_template(tools=tools),
        tools=tools,
        documents=row.get("documents"),
        add_generation_prompt=True,
        tokenize=False,
        **row.get("chat_template_kwargs", {}),
    )


def _without_blanks(text: str) -> str:
    """A text without the blanks beside tags of thinking, and in front."""
    return re.sub(r"\s*(</?think>)\s*", r"\1", text).lstrip()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that a template wrote."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_law(
    kind: Kind,
    tokenizer: Any,
    case: Case,
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]],
    stop_ids: Sequence[int],
) -> None:
    """Asserts the law for all examples of one row.

    Args:
        kind: The template and what its models say.
        tokenizer: With that template.
        case: The row, with what is to be learned of it.
        examples: Token ids and masks of every example of the row, in order.
        stop_ids: At which tokens generation stops.
    """
    stops = {*stop_ids, tokenizer.eos_token_id} - {None}
    seen = [shown(tokenizer, ids, mask) for ids, mask in examples]
    told = f"{kind.name}, {case.shape}: {case.row}\n  learned: {seen}"
    spans = [
        (place, start, end)
        for place, (_, mask) in enumerate(examples)
        for start, end in spans_of(mask)
    ]
    assert len(spans) == len(case.said), f"{told}\n  {len(case.said)} turns are to be learned"
    ahead: tuple[int, list[int]] | None = None
    for (place, start, end), said, index in zip(spans, case.said, case.at, strict=True):
        ids = list(map(int, examples[place][0]))
        # Behind what generation would be given, token by token.
        prompts = [encode(tokenizer, text) for text in prompt_texts(tokenizer, case.row, index)]
        assert ids[:start] in prompts, (
            f"{told}\n  before message {index} generation would be given:\n"
            + "\n".join(repr(tokenizer.decode(prompt)) for prompt in prompts)
        )
        # What the turn says, each word once, and its end.
        span = ids[start:end]
        got, expected = tokenizer.decode(span), said
        if kind.loose:
            got, expected = map(_without_blanks, (got, expected))
        assert got == expected, f"{told}\n  expected of message {index}: {said!r}"
        # A model that says the span is stopped at its last token, and not before.
        at = next((place for place, token in enumerate(span) if token in stops), None)
        assert at == len(span) - 1, f"{told}\n  generation of {got!r} stops at {at}: {stops}"
        # One example as long as prompts extend one another, a new one where they do not.
        if ahead is not None:
            extends = ids[:start][: len(ahead[1])] == ahead[1]
            assert (place == ahead[0]) == extends, f"{told}\n  message {index}: wrong example"
        ahead = (place, ids[:end])


def law_of(kind: Kind, tokenizer: Any, found: Sequence[Case], examples: Any) -> None:
    """Asserts the law for rows that were encoded together; lines count them from 1."""
    for line, case in enumerate(found, 1):
        own = [
            (examples.tokens[place].tolist(), examples.masks[place].tolist())
            for place, number in enumerate(examples.lines)
            if number == line
        ]
        check_law(kind, tokenizer, case, own, examples.stop_ids)
