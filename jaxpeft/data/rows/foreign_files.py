"""Explains data files that are not JSON, and how to make rows of them.

Only the first lines are read. The explanation is a guess from the content, whatever the name: a CSV
with the name ``.jsonl`` is reported as a CSV.
"""

import ast
import csv
import json
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

_BINARY = {
    b"\x1f\x8b": ("gzip", "unpack it with gunzip first"),
    b"PK\x03\x04": ("zip", "unpack it first; of a spreadsheet (.xlsx) save the sheet as CSV"),
    b"PAR1": ("Parquet", "convert it: {parquet}"),
    b"ARROW1": ("Arrow", "convert it with datasets: Dataset.from_file(...).to_json(...)"),
    b"BZh": ("bzip2", "unpack it with bunzip2 first"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unpack it with unzstd first"),
    b"\xfd7zXZ": ("xz", "unpack it with unxz first"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
    b"SQLite format 3": ("SQLite", "write its rows as one JSON object a line"),
    b"%PDF": ("PDF", "write its text as one JSON object a line"),
    b"version https://git-lfs": ("git-LFS pointer", "fetch the file itself with `git lfs pull`"),
}
_PAGE = (b"<!doctype", b"<html", b"<?xml")
_LONGEST = 1 << 20
_DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV (with semicolons)"}
_TURN = ({"role", "content"}, {"from", "value"})


def binary(name: str, data: bytes) -> str:
    """What a file that begins with these bytes is, and the way out; "" for text."""
    for magic, (kind, way) in _BINARY.items():
        if data.startswith(magic):
            text = f"this is a {kind} file; expected JSON text in UTF-8"
            return f"{text}; {way.format(parquet=_from_parquet(name))}"
    if data[:64].lstrip().lower().startswith(_PAGE):
        return "this is a web page (HTML or XML); expected JSON; download the file itself"
    return ""


def other_text(name: str, body: bytes) -> str:
    """What a text file without any JSON object is, and the way out; "" if that is not clear.

    Args:
        name: The file as the user wrote it.
        body: Its bytes.
    """
    lines = _first_lines(body, 3)
    if not lines:
        return ""
    if table := _table(lines):
        delimiter, columns = table
        kind, shown = _DELIMITERS[delimiter], ", ".join(columns[:6])
        return (
            f"this looks like {kind} with the columns {shown}, not JSON; {_convert(name, *table)}"
        )
    if isinstance(_literal(lines[0]), dict):
        return (
            "this looks like Python dicts, not JSON, which has double quotes, true, false and "
            "null; write every row with json.dumps"
        )
    if not lines[0].lstrip().startswith(("{", "[")):
        return (
            "this looks like plain text, not JSON; write one object a line, such as "
            '{"text": ' + json.dumps(lines[0].strip()[:30], ensure_ascii=False) + "}"
        )
    return ""


def array_lines(name: str, first: Sequence[Any]) -> str:
    """What to do with a file that has an array on every line.

    Args:
        name: The file as the user wrote it.
        first: The array on its first line.
    """
    if is_conversation(first):
        return 'every line is an array of messages; write {"messages": [...]} on each line'
    if first and all(isinstance(item, dict) for item in first):
        code = (
            "import json, sys; [print(json.dumps(row)) for line in "
            "open(sys.argv[1], encoding='utf-8') if line.strip() for row in json.loads(line)]"
        )
        return "every line is an array of objects; write one object a line: " + _python(name, code)
    return (
        "every line is an array; write one object a line, such as "
        '{"prompt": "...", "completion": "..."}'
    )


def arrays(values: Sequence[Any]) -> str:
    """What to do with a file that is an array of messages, or an array of arrays."""
    if is_conversation(values):
        return (
            'the file is one array of messages; a row of it is {"messages": [...]}, with one '
            "conversation a row"
        )
    if values and is_conversation(values[0]):
        return 'the file is an array of conversations; write {"messages": [...]} for each'
    return (
        "the file is an array of arrays; write objects, such as "
        '{"prompt": "...", "completion": "..."}'
    )


def not_a_file(name: str) -> str:
    """What else a missing path may mean, as the end of a sentence; "" for nothing."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and "." not in name:
        return (
            "; rows are read from files only: of a dataset on the hub save them first, "
            f"with datasets.load_dataset({name!r}, split='train').to_json('train.jsonl')"
        )
    return ""


def is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of messages, which is one row and not several."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and any(keys <= turn.keys() for keys in _TURN) for turn in value
        )
    )


def _first_lines(body: bytes, count: int) -> list[str]:
    """The first lines that are not blank; the text ends where it is not UTF-8."""
    text = body[:_LONGEST].decode("utf-8", "ignore")
    return [line for line in text.split("\n") if line.strip()][:count]


def _table(lines: list[str]) -> tuple[str, list[str]] | None:
    """The delimiter and the columns of text that looks like a table."""
    if lines[0].lstrip().startswith(("{", "[")) or len(lines) < 2:
        return None
    for delimiter in _DELIMITERS:
        try:
            rows = list(csv.reader(lines, delimiter=delimiter))
        except csv.Error:
            continue
        columns = [name.strip() for name in rows[0]]
        named = all(name and len(name) <= 40 and name.isprintable() for name in columns)
        if len(columns) > 1 and named and len(set(columns)) == len(columns) <= len(rows[1]):
            return delimiter, columns
    return None


def _convert(name: str, delimiter: str, columns: list[str]) -> str:
    option = "" if delimiter == "," else f", delimiter={delimiter!r}"
    code = (
        "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader("
        f"open(sys.argv[1], newline='', encoding='utf-8-sig'){option})]"
    )
    renamed = ""
    if not {"prompt", "completion"} <= {*columns} and "text" not in columns:
        renamed = ", after its columns are renamed to prompt and completion, or to text"
    return f"convert it{renamed}: {_python(name, code)}"


def _python(name: str, code: str) -> str:
    """A command that reads a file and writes its rows to another file."""
    path = pathlib.PurePath(name)
    target = path.with_name(f"{path.stem}.rows.jsonl")
    return f'python -c "{code}" {shlex.quote(name)} > {shlex.quote(str(target))}'


def _from_parquet(name: str) -> str:
    code = "import datasets, sys; datasets.Dataset.from_parquet(sys.argv[1]).to_json(sys.argv[2])"
    path = pathlib.PurePath(name)
    target = path.with_name(f"{path.stem}.rows.jsonl")
    return f'python -c "{code}" {shlex.quote(name)} {shlex.quote(str(target))}'


def _literal(line: str) -> Any:
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
