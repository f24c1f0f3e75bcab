"""Data: rows of a file, checked, rendered, tokenised, packed, and read by step."""

from jaxpeft.data.chat import render_messages
from jaxpeft.data.encode import Examples, encode_file, encode_rows
from jaxpeft.data.packing import pack
from jaxpeft.data.plan import Plan, eval_batches, iterate
from jaxpeft.data.questions import Question, make_questions
from jaxpeft.data.rows import Row, has_answer, read_rows
from jaxpeft.data.settings import DataConfig, Reading

__all__ = [
    "DataConfig",
    "Examples",
    "Plan",
    "Question",
    "Reading",
    "Row",
    "encode_file",
    "encode_rows",
    "eval_batches",
    "has_answer",
    "iterate",
    "make_questions",
    "pack",
    "read_rows",
    "render_messages",
]
