"""Writes the files of a tokenizer so that transformers 4 and 5 read the same tokens.

Everything that determines tokens is in ``tokenizer.json``. The settings beside it use only the
keys, and the class, that both versions know; each version may refuse what `save_pretrained` of the
other writes.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxpeft.files.companions import TEMPLATE, TEMPLATE_JSON, TEMPLATES, TOKENIZER, TOKENIZER_CONFIG

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_STATE = ("padding", "truncation")  # set by calls, not part of the tokenizer


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a fast tokenizer, content by name.

    Args:
        tokenizer: A transformers fast tokenizer; it may have one chat template, or several with
            names.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": tokenizer.padding_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    for name in _NAMED:
        if (token := getattr(tokenizer, f"{name}_token", None)) is not None:
            settings[f"{name}_token"] = str(token)
    if extra := [str(token) for token in getattr(tokenizer, "extra_special_tokens", ())]:
        settings["additional_special_tokens"] = extra
    files, template = {}, tokenizer.chat_template
    if isinstance(template, Mapping):
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    elif template:
        settings["chat_template"] = template
        files[TEMPLATE] = template.encode()
    text = json.dumps(_vocabulary(tokenizer), indent=2, ensure_ascii=False) + "\n"
    return {TOKENIZER: text.encode(), TOKENIZER_CONFIG: to_json(settings), **files}


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two fast tokenizers make the same tokens and have the same special tokens."""
    specials = [
        [getattr(tokenizer, f"{name}_token", None) for name in _NAMED] for tokenizer in (one, other)
    ]
    return specials[0] == specials[1] and _vocabulary(one) == _vocabulary(other)


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files of a tokenizer with `template` as the only chat template.

    transformers reads ``chat_template.jinja``, older versions a key in ``tokenizer_config.json``;
    if that key is there, it gets this template too. Named templates are removed.

    Args:
        files: Content by name.
        template: The text of the template.
    """
    changed = {
        name: content for name, content in files.items() if not name.startswith(f"{TEMPLATES}/")
    }
    changed[TEMPLATE] = template.encode()
    for name in (TOKENIZER_CONFIG, TEMPLATE_JSON):
        settings = json.loads(changed[name]) if name in changed else {}
        if "chat_template" in settings:
            changed[name] = to_json({**settings, "chat_template": template})
    return changed


def to_json(value: dict) -> bytes:
    """A value as JSON in the format of the Hugging Face libraries."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**content, **dict.fromkeys(_STATE)}
