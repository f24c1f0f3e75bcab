"""Reads .jsonl and .json files as JSON values, each with the line on which it starts.

The reader is stricter than those of Arrow and Python, which name no line, keep the last of two
equal keys and accept NaN. A ``.jsonl`` file has one object per line; a ``.json`` file has either
that or one array of objects.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from jaxpeft.core import limits, strict_json
from jaxpeft.core.errors import UserError, first_few, nearest
from jaxpeft.data.rows import foreign_files
from jaxpeft.data.rows.problems import DROP_HINT, Problem
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath

MALFORMED = "malformed JSON"
SPLIT_HINT = "split its text into several rows"


@dataclasses.dataclass(frozen=True)
class JsonFile:
    """The content of a file.

    Attributes:
        path: The file as the user wrote it.
        sha256: The hash of its bytes, in hex.
        values: The rows that are JSON, each with its line.
        problems: The rows that are not JSON.
    """

    path: str
    sha256: str
    values: list[tuple[int, Any]]
    problems: list[Problem]


def read_json(path: str | pathlib.Path) -> JsonFile:
    """Reads all rows of a file, and explains which of them are not JSON.

    Args:
        path: A ``.jsonl`` file, or a ``.json`` file with an array or one object per line; on disk
            or in a bucket (``gs://``).

    Returns:
        Values and problems; blank lines are skipped, a byte order mark and CRLF are accepted.

    Raises:
        UserError: There is no such file, it is empty, its bytes are not text, or it is ``.jsonl``
            by name and an array by content.
        StoreError: The bucket refuses, or cannot be reached.
    """
    name = str(path)
    with storage.explained(name):
        data = _read_bytes(storage.as_path(path))
    sha256 = hashlib.sha256(data).hexdigest()
    if kind := foreign_files.binary(name, data):
        raise UserError(f"{name}: {kind}.")
    body = data.removeprefix(b"\xef\xbb\xbf")
    if not body.strip():
        what = "empty" if not data else "blank, it has no row"
        raise UserError(f"{name}: the file is {what}; expected one JSON object a line.")
    skipped = len(data) - len(body)
    is_array = body.lstrip().startswith(b"[")
    if is_array and pathlib.Path(name).suffix in (".jsonl", ".ndjson"):
        _check_array_in_lines(name, body)
        is_array = False
    if is_array:
        values, problems = _read_array(name, body, skipped)
    else:
        values, problems = _read_lines(body, skipped)
    found = [value for _, value in values]
    if is_array and found and not problems and not _has_rows(found):
        raise UserError(f"{name}:1: {foreign_files.arrays(found)}.")
    if not is_array and not any(isinstance(value, dict) for value in found):
        if kind := foreign_files.other_text(name, body):
            raise UserError(f"{name}:{problems[0].line if problems else 1}: {kind}.")
        # Dropping every row would help nobody.
        problems = [dataclasses.replace(problem, hint="") for problem in problems]
    return JsonFile(name, sha256, values, problems)


def _read_bytes(path: StoragePath) -> bytes:
    try:
        if not storage.is_remote(path) and path.is_char_device():
            raise UserError(f"{path}: this is a device; give a .jsonl or .json file.")
        limits.require_bytes(path, storage.size(path), limits.DATA_BYTES)
        return path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            hint = foreign_files.not_a_file(str(path))
            raise UserError(f"{path}: no such file: there is no folder {folder}{hint}.") from None
        close = nearest(path.name, sorted(entry.name for entry in folder.iterdir()))
        hint = f"closest names: {', '.join(close)}" if close else "no name there is close"
        where = folder.resolve() if str(folder) == "." else folder
        raise UserError(f"{path}: no such file in {where}; {hint}.") from None
    except IsADirectoryError:
        inside = [entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json")]
        way = (
            f"give a file in it: {first_few(sorted(inside))}"
            if inside
            else ("it holds no .jsonl or .json file; give the file that has the rows")
        )
        raise UserError(f"{path}: this is a folder; {way}.") from None
    except OSError as error:
        if storage.is_remote(path):
            raise  # the store's failure, not the file's
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _read_lines(body: bytes, skipped: int) -> tuple[list[tuple[int, Any]], list[Problem]]:
    values: list[tuple[int, Any]] = []
    problems: list[Problem] = []
    reader, offset = strict_json.Reader(), skipped
    lines = body.split(b"\n")
    last = max(number for number, line in enumerate(lines, 1) if line.strip())
    for number, line in enumerate(lines, 1):
        if line.strip():
            value, problem = _parse_line(reader, line, number, offset, number == last)
            if problem is None:
                values.append((number, value))
            else:
                problems.append(problem)
        offset += len(line) + 1
    return values, problems


def _parse_line(
    reader: strict_json.Reader, line: bytes, number: int, offset: int, is_last: bool
) -> tuple[Any, Problem | None]:
    if len(line) > limits.ROW_BYTES.most:
        return None, _too_large(number)
    try:
        text = line.decode("utf-8").rstrip()
        start = len(text) - len(text.lstrip())
        value, end, notes = reader.read(text, start)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        return None, _bad_utf8(number, offset + error.start, line[error.start])
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc) or error.msg.startswith("Unterminated string")
        if cut and is_last:
            why = "the last line is incomplete: the file is cut off"
        elif cut:
            why = "malformed JSON: the line ends inside an object; a row must fit on one line"
        else:
            why = f"malformed JSON: {error.msg}"
        return None, Problem(number, why, MALFORMED, column=error.pos + 1)
    except (ValueError, RecursionError) as error:
        return None, Problem(number, _explain(error), MALFORMED)
    if notes:
        return None, Problem(number, notes[0], MALFORMED)
    return value, None


def _read_array(
    name: str, body: bytes, skipped: int
) -> tuple[list[tuple[int, Any]], list[Problem]]:
    values: list[tuple[int, Any]] = []
    problems: list[Problem] = []
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        problem = _bad_utf8(line, skipped + error.start, body[error.start])
        raise UserError(problem.describe(name)) from None
    reader, line, counted = strict_json.Reader(), 1, 0
    at = _skip_blanks(text, text.index("[") + 1)
    try:
        while not text.startswith("]", at) or values or problems:
            line += text.count("\n", counted, at)
            counted = at
            value, at, notes = _parse_within(reader, text, at)
            if notes:
                problems.append(Problem(line, notes[0], MALFORMED))
            else:
                values.append((line, value))
            at = _skip_blanks(text, at)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip_blanks(text, at + 1)
        end = _skip_blanks(text, at + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        why = "the array is incomplete: the file is cut off" if cut else f"{MALFORMED}: {error.msg}"
        problems.append(Problem(error.lineno, why, MALFORMED, "", error.colno, fatal=True))
    except _TooLargeError:
        problems.append(dataclasses.replace(_too_large(line), hint=SPLIT_HINT, fatal=True))
    except (ValueError, RecursionError) as error:
        problems.append(Problem(line, _explain(error), MALFORMED, "", fatal=True))
    if not values and not problems:
        raise UserError(f"{name}: the array is empty; expected an array of objects.")
    return values, problems


def _has_rows(values: list[Any]) -> bool:
    """Whether the items of an array may be rows: they are no messages, and not all are arrays."""
    if foreign_files.is_conversation(values):
        return False
    return not all(isinstance(value, list) for value in values)


def _check_array_in_lines(name: str, body: bytes) -> None:
    """Checks that a ``.jsonl`` file is not one array.

    Raises:
        UserError: It opens with "[" and no line is an object.
    """
    lines = body.strip().split(b"\n", 2)
    try:
        if len(lines[0]) > limits.ROW_BYTES.most:
            raise _TooLargeError
        text = lines[0].decode("utf-8").strip()
        value, end, _ = strict_json.Reader().read(text)
        first = value if isinstance(value, list) and end == len(text) else None
    except (ValueError, RecursionError):
        first = None
    if first is not None and len(lines) > 1:
        if lines[1].lstrip().startswith(b"["):
            raise UserError(f"{name}:1: {foreign_files.array_lines(name, first)}.")
        return
    if first and not _has_rows(first):
        raise UserError(f"{name}:1: {foreign_files.arrays(first)}.")
    raise UserError(
        f"{name}:1: the file is one JSON array, but .jsonl means one object a line; "
        "rename it to .json or write one object a line."
    )


class _TooLargeError(ValueError):
    """A row is larger than allowed."""


def _parse_within(reader: strict_json.Reader, text: str, start: int) -> tuple[Any, int, list[str]]:
    """Reads like `strict_json.Reader.read`, but reads no more text than one row may have.

    Raises:
        _TooLargeError: The value is longer than that.
        json.JSONDecodeError: It is malformed.
    """
    most = limits.ROW_BYTES.most
    for width in sorted({most, *(1 << bits for bits in (12, 16, 20) if 1 << bits < most)}):
        if start + width >= len(text):
            break
        try:
            value, end, notes = reader.read(text[start : start + width])
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Unterminated") and error.pos < width - 16:
                break  # malformed, and not because it was cut
        else:
            if end < width:  # at the end, a number may continue
                return value, start + end, notes
    else:
        raise _TooLargeError
    return reader.read(text, start)


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _too_large(line: int) -> Problem:
    why = f"a row of more than {limits.ROW_BYTES.most:,} bytes, which is not read"
    return Problem(line, why, "too large", f"{SPLIT_HINT}, or {DROP_HINT}")


def _bad_utf8(line: int, offset: int, byte: int) -> Problem:
    why = f"not UTF-8: byte 0x{byte:02x} at byte {offset} of the file"
    return Problem(line, why, "not UTF-8", f"save the file as UTF-8, or {DROP_HINT}")


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    return f"{MALFORMED}: {error}"
