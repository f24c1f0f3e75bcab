"""Data: rows of a file, checked, rendered, tokenised, packed, and read by step."""

from jaxpeft.data.chat import render_messages
from jaxpeft.data.encode import Examples, encode_file, encode_rows
from jaxpeft.data.packing import pack
from jaxpeft.data.plan import Plan, eval_batches, iterate
from jaxpeft.data.rows import Row, prompt_and_reference, read_rows
from jaxpeft.data.settings import DataConfig

__all__ = [
    "DataConfig",
    "Examples",
    "Plan",
    "Row",
    "encode_file",
    "encode_rows",
    "eval_batches",
    "iterate",
    "pack",
    "prompt_and_reference",
    "read_rows",
    "render_messages",
]
