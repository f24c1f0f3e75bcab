"""Keys of rows that are refused, with what to write instead."""

from collections.abc import Mapping
from typing import Any

_TOOLS = "give tools, a list of JSON schemas, and tool_calls in messages"
_PREFERENCES = "rows of preferences need a preference loss; this run learns from examples"
_TOKENS = "rows are tokenised here; give messages, prompt and completion, or text"
_MASKS = "what is learned is said by data.learn, and by weight: 0 in a message"
_TEXT_ONLY = "only text can be learned here"
_ARGUMENTS = "arguments of the chat template belong in chat_template_kwargs"
_ALPACA = (
    'this is the Alpaca format; write it as {"prompt": instruction and input, "completion": '
    "output}, or as messages"
)
_PAIRS = 'questions and answers are written as {"prompt": ..., "completion": ...} or as messages'
_SHAREGPT = (
    'this is the ShareGPT format; write it as {"messages": [{"role": "user", "content": ...}, '
    '{"role": "assistant", "content": ...}]}'
)


def _same(text: str, *keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, text)


REFUSED = {
    **_same(_SHAREGPT, "conversations"),
    **_same(_ALPACA, "instruction", "input", "output"),
    **_same(_PAIRS, "response", "query", "history"),
    **_same(_ARGUMENTS, "enable_thinking", "thinking", "reasoning_effort"),
    **_same(_TOOLS, "functions", "function_call", "tool_choice"),
    **_same(_PREFERENCES, "chosen", "rejected", "preferred_output", "non_preferred_output"),
    **_same(_PREFERENCES, "kto_tag", "completions"),
    "label": "labels are for classification and for preferences; this run learns text",
    **_same(_TOKENS, "input_ids", "labels", "attention_mask", "position_ids", "seq_lengths"),
    **_same(_MASKS, "completion_mask", "assistant_masks", "mask", "loss_mask", "segments"),
    **_same(_TEXT_ONLY, "image", "images", "video", "videos"),
    **_same(_TEXT_ONLY, "audio", "audios"),
    "weight": "rows weigh the same; a message may have weight 0 or 1",
    **_same(_MASKS, "train_on_input", "train_on_inputs"),
    "chat_template": "one template serves all rows: model.chat_template",
}
"""Keys that change what other trainers learn, and that have no meaning here."""


def is_foreign(value: Mapping[str, Any]) -> bool:
    """Whether a row without messages, prompt or text has the columns of another format."""
    formats = (_SHAREGPT, _ALPACA, _PAIRS, _TOKENS, _PREFERENCES)
    return any(REFUSED.get(key) in formats for key in value)
