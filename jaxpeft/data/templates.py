"""Rendering a tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import UserError

# Put in front of templates that ask for the date of today, which would change the data daily;
# the date is Llama 3's own fallback.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)


class TemplateError(ValueError):
    """Why a template cannot be rendered, in one line."""


def render_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Renders messages with the tokenizer's chat template.

    Raises:
        UserError: If the tokenizer has no chat template.
        TemplateError: If the template refuses the messages.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template, which rows with messages need; use a "
            "chat model, set tokenizer.chat_template, or give prompt and completion as text."
        )
    tools = list(tools) if tools else None
    template = tokenizer.get_chat_template(tools=tools)
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=list(documents) if documents else None,
            **(arguments or {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise TemplateError(str(error)) from None
