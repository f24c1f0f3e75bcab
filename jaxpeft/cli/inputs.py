"""Inputs of commands other than flags: lines of prompts, and JSON in files and arguments."""

import sys
from pathlib import Path
from typing import Any

from jaxpeft.core import strict_json
from jaxpeft.core.errors import UserError


def read_lines(stream: Any = None) -> list[str]:
    """The lines of a text stream, each ended by a newline or a carriage return and a newline.

    Other characters that Unicode calls line breaks (U+2028, form feed, a lone carriage return) are
    text.

    Args:
        stream: A text stream, standard input by default; if it has a byte buffer, bytes are read.

    Returns:
        The lines without their ends; a newline at the very end starts no further line.

    Raises:
        UserError: The bytes are not UTF-8.
    """
    stream = sys.stdin if stream is None else stream
    source = getattr(stream, "buffer", stream)
    text = source.read()
    if isinstance(text, bytes):
        try:
            text = text.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"standard input:{line}: not UTF-8: byte 0x{text[error.start]:02x} at byte "
                f"{error.start}; send text in UTF-8"
            ) from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def require_text(name: str, text: str) -> None:
    """Checks that an argument is UTF-8.

    Raises:
        UserError: The bytes of the argument are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}: not UTF-8, got {ascii(text)[:60]}; send text in UTF-8") from None


def read_objects(flag: str, path: str) -> list[dict[str, Any]]:
    """Reads a JSON file that holds one list of objects.

    Args:
        flag: The flag that names the file, for errors.
        path: The file.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{flag}: {path}: cannot be read: {why}.") from None
    value = _parse_json(f"{flag}: {path}", text)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{flag}: {path}: expected a JSON list of objects.")
    return value


def parse_object(flag: str, text: str) -> dict[str, Any]:
    """Parses the JSON object after a flag.

    Raises:
        UserError: The text is no JSON object.
    """
    value = _parse_json(flag, text)
    if not isinstance(value, dict):
        raise UserError(f"{flag}: expected a JSON object, such as '{{\"key\": true}}'.")
    return value


def _parse_json(where: str, text: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}.") from None
