"""Prompts from standard input: a newline ends one, and nothing else does."""

import io
import sys
import unicodedata

import pytest

from jaxpeft.cli import arguments, exits, inputs
from jaxpeft.core.errors import UserError
from jaxpeft.generate import main as generate_main

# What str.splitlines breaks at, by the table in Python's documentation of it.
BREAKS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


@pytest.mark.parametrize("text", BREAKS, ids=lambda text: f"U+{ord(text):04X}")
def test_only_a_newline_ends_a_line(text):
    data = f"a{text}b\nc\r\n{text}d".encode()
    assert inputs.read_lines(stdin_of(data)) == [f"a{text}b", "c", f"{text}d"]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", [""]),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\r\n", ["a"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
    ],
)
def test_ends_of_lines_are_left_out(data, lines):
    assert inputs.read_lines(stdin_of(data)) == lines


def test_bytes_that_are_no_text_are_told_with_their_place():
    with pytest.raises(UserError, match=r"^standard input:2: not UTF-8: byte 0xff at byte 3"):
        inputs.read_lines(stdin_of(b"a\nb\xff\n"))


def test_generate_asks_one_prompt_a_line(monkeypatch, capsys):
    asked = []

    class Base:
        tokenizer = None

    monkeypatch.setattr(arguments, "load_base", lambda args: Base())
    monkeypatch.setattr(
        "jaxpeft.inference.decoding.generate", lambda base, texts, **_: asked.extend(texts) or texts
    )
    monkeypatch.setattr(sys, "stdin", stdin_of("a\u2028b\fc\n\x1cd\x85\n \n".encode()))
    generate_main(["--model", "m", "--raw", "-"])
    assert asked == ["a\u2028b\fc", "\x1cd\x85"]


def test_generate_refuses_a_prompt_that_is_no_text(monkeypatch):
    monkeypatch.setattr(arguments, "load_base", lambda args: 1 / 0)
    with pytest.raises(UserError, match=r"^prompt 2: not UTF-8"):
        generate_main(["--model", "m", "--raw", "a", "b\udcff"])
    with pytest.raises(UserError, match=r"^--system: not UTF-8"):
        generate_main(["--model", "m", "--system", "\udcff", "a"])


def test_an_error_is_one_line_for_every_newline_in_it(capsys):
    text = "model\u2028x: not there\nsecond"
    assert unicodedata.category("\u2028") == "Zl"
    assert exits.report(UserError(text)) == 2
    assert capsys.readouterr().err.split("\n") == [
        "error: model\u2028x: not there", "error: second", "",
    ]  # fmt: skip
