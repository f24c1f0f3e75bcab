"""The largest values allowed in a config, in a model and for the sizes of files.

A larger value is refused as soon as a config, a header or the size of a file shows it, before
memory is allocated. Every limit is many times the largest value in real use.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.errors import UserError

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limit:
    """The largest value allowed.

    Attributes:
        most: The value.
        why: What the value counts, and why it exceeds everything in use.
    """

    most: int
    why: str


WHOLE = Limit(2**31 - 1, "whole numbers are int32 on devices")
"""The limit of every whole number in a config that has no limit of its own."""

CONFIG = {
    "steps": Limit(10**7, "a run of this many updates at one a second takes four months"),
    "epochs": Limit(10**6, "so many passes over the rows teach nothing more"),
    "batch_size": Limit(2**20, "sequences of one update; the largest trainings use some 10,000"),
    "microbatch_size": Limit(2**20, "as batch_size"),
    "max_length": Limit(2**24, "tokens of a sequence; the longest contexts hold 10 million"),
    "workers": Limit(512, "processes on one host; more than its cores gain nothing"),
    "max_new_tokens": Limit(2**20, "tokens of one answer"),
    "rank": Limit(2**16, "no kernel in use has a smaller side of this size"),
    "initial_rank": Limit(2**16, "as rank"),
    "rank_pattern": Limit(2**16, "as rank"),
    "num_tokens": Limit(2**16, "virtual tokens of one prompt; papers use up to 200"),
    "num_tasks": Limit(2**16, "prompts that are learned together"),
    "hidden_size": Limit(2**16, "width of a prompt's encoder"),
    "block_size": Limit(2**16, "no kernel in use has a smaller side of this size"),
    "decompose_factor": Limit(2**16, "no kernel in use has a smaller side of this size"),
    "terms": Limit(100, "terms of a series that is written out in the program"),
    "loftq_steps": Limit(1000, "decompositions of every kernel before the first update"),
}
"""Limits of the keys of a config, and of command-line options with the same names."""

BATCH_TOKENS = Limit(2**28, "batch_size times max_length; the largest trainings use 64 million")
PROMPT_TOKENS = Limit(2**22, "num_tokens times num_tasks")
LIST_ITEMS = Limit(2**20, "entries of one list in a config")

MODEL = {
    "num_layers": Limit(2048, "the deepest models have some 130 layers, and one had 1,000"),
    "d_model": Limit(2**20, "the widest models have some 20,000 channels"),
    "d_ff": Limit(2**22, "the widest MLPs have some 80,000 channels"),
    "num_heads": Limit(2**16, "the most heads are 128"),
    "num_kv_heads": Limit(2**16, "the most heads are 128"),
    "head_dim": Limit(2**16, "the widest heads have 256 channels"),
    "vocab_size": Limit(2**24, "the largest vocabularies have some 260,000 tokens"),
}
"""Limits of the sizes of a model, under jaxpeft's names."""

ROW_BYTES = Limit(16 * MIB, "one row of a data file; a token has some 4 bytes")
ROW_DEPTH = Limit(100, "objects and lists in one another in a row; real rows have some 10")
DATA_BYTES = Limit(64 << 30, "one data file, all of which is held in memory")
CONFIG_BYTES = Limit(256 << 10, "a config file")
WRITTEN_CONFIG_BYTES = Limit(64 * MIB, "the config.yaml of a run, which holds every default")
JSON_BYTES = Limit(32 * MIB, "config.json, an index of shards, or another JSON file of a model")
HEADER_BYTES = Limit(24 * MIB, "the header of one safetensors file: some 200,000 tensors")
TOKENIZER_BYTES = Limit(128 * MIB, "one file of a tokenizer; the largest have some 40 MB")
GGUF_HEADER_BYTES = Limit(128 * MIB, "the header of a GGUF file, with its vocabulary")
GGUF_ITEMS = Limit(2**22, "entries of one array in a GGUF header, and tensors of the file")

FILES = {
    "ROW_BYTES": ROW_BYTES,
    "ROW_DEPTH": ROW_DEPTH,
    "DATA_BYTES": DATA_BYTES,
    "CONFIG_BYTES": CONFIG_BYTES,
    "WRITTEN_CONFIG_BYTES": WRITTEN_CONFIG_BYTES,
    "JSON_BYTES": JSON_BYTES,
    "HEADER_BYTES": HEADER_BYTES,
    "TOKENIZER_BYTES": TOKENIZER_BYTES,
    "GGUF_HEADER_BYTES": GGUF_HEADER_BYTES,
    "GGUF_ITEMS": GGUF_ITEMS,
}
"""Limits of the sizes of files, in bytes."""

TEMPLATES = {
    "TEMPLATE_CHARS": Limit(250_000, "characters of a chat template; the longest have some 40,000"),
    "TEMPLATE_TEXT": Limit(10**7, "characters of one text that a chat template makes"),
    "TEMPLATE_TEXTS": Limit(5 * 10**8, "characters of all texts of one rendering together"),
    "TEMPLATE_STEPS": Limit(10**7, "of one rendering: a turn of a loop is 1 or more, a call 4"),
    "TEMPLATE_ITEMS": Limit(10**6, "items of one list that a chat template makes"),
    "TEMPLATE_BITS": Limit(20_000, "bits of one whole number that a chat template computes"),
    "TEMPLATE_DEPTH": Limit(200, "lists in one another that a chat template makes"),
}
"""Limits of the rendering of a chat template; they count work, not seconds."""

_MOST_BITS = 1024
"""The limit of any whole number, in bits. No float is as large; all such numbers can be printed."""

_NO_LIMIT = ("seed",)  # checked where it is used: up to 2**32


def exceeds(name: str, value: Any) -> str:
    """A clause "must be at most ..." for a value that is too large; "" for one that is not.

    Args:
        name: The key, without its section.
        value: Any value. A list may be too long, or hold a number that is too large.
    """
    huge = isinstance(value, int) and value.bit_length() > _MOST_BITS
    if huge and (value < 0 or name in _NO_LIMIT):
        return f"must be smaller in size, got {number(value)}"
    if isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        limit = CONFIG.get(name, WHOLE if isinstance(value, int) else None)
        if limit is None or name in _NO_LIMIT or not value > limit.most:
            return ""
        return f"must be at most {limit.most:,}, got {number(value)}: {limit.why}"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        if len(value) > LIST_ITEMS.most:
            return f"must have at most {LIST_ITEMS.most:,} entries, got {len(value):,}"
        return next((text for item in value if (text := exceeds(name, item))), "")
    return ""


def require_fields(cls_name: str, values: Mapping[str, Any]) -> None:
    """Checks the sizes in a config.

    Args:
        cls_name: The name of the config's class, for messages.
        values: Its fields.

    Raises:
        UserError: Some are too large; the message has a line for each.
    """
    texts = [
        f"{cls_name}.{name} {text}"
        for name, value in values.items()
        if (text := exceeds(name, value))
    ]
    if texts:
        raise UserError("\n".join(texts))


def size_of_model(name: str) -> int:
    """The largest supported size of a model, by jaxpeft's name for it."""
    return MODEL[name].most if name in MODEL else WHOLE.most


def require_bytes(where: Any, count: int, limit: Limit) -> None:
    """Checks the size of a file before it is read.

    Raises:
        UserError: It has more bytes than `limit` allows.
    """
    if count > limit.most:
        raise UserError(
            f"{where}: {count:,} bytes are too large, at most {limit.most:,} are read: {limit.why}"
        )


def number(value: float) -> str:
    """A number for a message; one of many digits is shortened.

    Example:
        >>> number(10**30), number(-(10**5000))  # Python refuses to print the second
        ('a number of 31 digits', 'a number of about 5001 digits')
    """
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = str(value)
    return text if len(text) <= 24 else f"a number of {len(text)} digits"
