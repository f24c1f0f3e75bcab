"""Rows held in memory are encoded like the same rows in a file."""

import json

import numpy as np
import pytest
from toy_tokenizer import toy_tokenizer

from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_file, encode_rows

ROWS = [{"prompt": "ab", "completion": "c"}, {"text": "abc"}]


def test_rows_in_memory_give_what_the_same_file_gives(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = toy_tokenizer()
    one = encode_rows(ROWS, tokenizer, max_length=16)
    other = encode_file(path, tokenizer, max_length=16, vocab_size=len(tokenizer))
    assert len(one) == len(other) == 2
    for left, right in zip(one.tokens + one.masks, other.tokens + other.masks, strict=True):
        np.testing.assert_array_equal(left, right)


def test_bad_rows_in_memory_are_named_by_their_place():
    with pytest.raises(UserError, match=r'^rows:2: "completion": missing'):
        encode_rows([ROWS[0], {"prompt": "ab"}], toy_tokenizer(), max_length=16)


def test_rows_of_an_array_on_one_line_keep_apart(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"prompt": "ab", "completion": letter} for letter in "cde"]
    path.write_text(json.dumps([*rows, {"prompt": "ab"}, {"text": ""}]))
    tokenizer = toy_tokenizer()
    examples = encode_file(
        path, tokenizer, max_length=16, vocab_size=len(tokenizer), on_bad_row="drop"
    )
    assert examples.rows == rows
    assert examples.dropped == {"bad row": 2}
    assert examples.first(2).rows == rows[:2]


def test_long_rows_of_an_array_on_one_line_are_counted_one_by_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "abc"}, {"text": "a" * 40}, {"text": "b" * 40}]))
    tokenizer = toy_tokenizer()
    settings = {"max_length": 16, "vocab_size": len(tokenizer)}
    assert encode_file(path, tokenizer, on_long="drop", **settings).dropped == {"too long": 2}
    assert encode_file(path, tokenizer, on_long="truncate", **settings).truncated == 2
