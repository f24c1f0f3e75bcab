"""Prompts for generation, with exactly the tokens that training puts in front of an answer.

Chat messages are rendered with the template, the arguments and the end-of-turn tokens of the
adapter's training, see `jaxpeft.methods.chat_settings`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.chat_settings import chat_of
from jaxpeft.pretrained.chat_template import override_template
from jaxpeft.pretrained.model import Model

Prompt = str | Sequence[dict]


def tokenizer_of(base: Model, adapter: Adapter | Sequence[Adapter] | None = None) -> Any:
    """The tokenizer of a model, with the chat template that an adapter was trained with.

    Raises:
        UserError: If the model has no tokenizer.
    """
    if base.tokenizer is None:
        raise UserError(
            f"{base.name or 'the model'}: has no tokenizer; put its tokenizer files beside the "
            "weights."
        )
    return override_template(base.tokenizer, chat_of(adapter).template)


def encode_prompts(
    base: Model,
    prompts: Sequence[Prompt],
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    tools: Sequence[dict] | None = None,
    documents: Sequence[dict] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, exactly those that training puts in front of an answer.

    Args:
        base: The model, with its tokenizer.
        prompts: Texts, or lists of chat messages that end before the assistant's turn.
        adapter: The adapter whose chat settings are used.
        tools: JSON schemas of tools that chats may call.
        documents: Documents that chats may answer from.
        chat_template_kwargs: Variables of the chat template; they override the adapter's.

    Returns:
        The ids of every prompt.

    Raises:
        UserError: There is no tokenizer or no chat template, or the template refuses messages.
    """
    from jaxpeft.data.chat.kept import check_prompt
    from jaxpeft.data.chat.renderer import Renderer
    from jaxpeft.data.chat.template import Chat, RowError
    from jaxpeft.data.encoder import Encoder

    if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
        raise UserError("prompts must be a list of prompts; put square brackets around this one.")
    tokenizer, settings = tokenizer_of(base, adapter), chat_of(adapter)
    chat = Chat(tokenizer, base.config.eos_token_ids, settings.arguments)
    encoder = Encoder(tokenizer)
    beside = {"tools": tools, "documents": documents, "chat_template_kwargs": chat_template_kwargs}
    given = {name: value for name, value in beside.items() if value}
    ids = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if given:
                raise UserError(f"prompt {index}: {next(iter(given))} need chat messages.")
            ids.append(encoder.prompt(prompt, is_chat=False) if prompt else [])
            continue
        if not prompt:
            raise UserError(f"prompt {index}: no messages.")
        conversation = _conversation(index, prompt, given)
        try:
            renderer = Renderer(chat, conversation)
            text = renderer.render(renderer.values, prompt=True)
            check_prompt(renderer, text, len(conversation.messages))
        except RowError as error:
            raise UserError(f"prompt {index}: {error}.") from None
        ids.append(encoder.prompt(text, is_chat=True))
    return ids


def _conversation(index: int, prompt: Sequence[dict], given: Mapping[str, Any]) -> Any:
    """A prompt as a checked conversation."""
    from jaxpeft.data.rows.kinds import read_conversation

    last = prompt[-1].get("role") if isinstance(prompt[-1], dict) else None
    if last in ("assistant", "gpt", "model", "bot"):
        raise UserError(
            f"prompt {index}: messages[{len(prompt)}].role: two assistant turns in a row: a prompt "
            "ends where the assistant begins to speak."
        )
    answered = {**given, "messages": [*prompt, {"role": "assistant", "content": "-"}]}
    conversation, problems = read_conversation(answered)
    if problems:
        raise UserError(f"prompt {index}: {first_few(problems)}.")
    return dataclasses.replace(conversation, messages=conversation.messages[:-1])


def stop_ids(
    base: Model,
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    chat: bool = False,
    tools: Sequence[dict] | None = None,
) -> tuple[int, ...]:
    """The ids that end an answer.

    Args:
        base: The model, whose config and tokenizer name some.
        adapter: The adapter, which names those that ended the turns it learned.
        chat: Whether chats are answered; then the chat template's end of a turn is included.
        tools: JSON schemas of tools that chats may call.
    """
    from jaxpeft.data.chat.template import Chat

    ids = [*base.config.eos_token_ids, *chat_of(adapter).stop_ids]
    tokenizer = base.tokenizer
    if tokenizer is None:
        return tuple(dict.fromkeys(ids))
    if tokenizer.eos_token_id is not None:
        ids.insert(len(base.config.eos_token_ids), tokenizer.eos_token_id)
    known = Chat(tokenizer_of(base, adapter), ids) if chat else None
    if known is not None and (end := known.end_of_turn(tools)):
        ids.append(tokenizer.convert_tokens_to_ids(end))
    return tuple(dict.fromkeys(ids))
