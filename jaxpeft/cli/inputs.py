"""What commands read beside their flags: lines of prompts, and JSON in files and arguments."""

import json
import sys
from pathlib import Path
from typing import Any

from jaxpeft.core.errors import UserError


def read_lines(stream: Any = None) -> list[str]:
    """The lines of a text stream, each ended by a newline or a carriage return and a newline.

    Other characters that Unicode calls line breaks (U+2028, form feed, a lone carriage return) are
    text.

    Args:
        stream: Standard input by default; its bytes are read where it has some.

    Returns:
        The lines without their ends; nothing follows the last newline.

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
    """Checks the bytes of an argument.

    Raises:
        UserError: They are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}: not UTF-8, got {ascii(text)[:60]}; send text in UTF-8") from None


def read_objects(flag: str, path: str) -> list[dict[str, Any]]:
    """The objects of a JSON file with one list of them.

    Args:
        flag: What the file was given by, for errors.
        path: The file.

    Raises:
        UserError: If it cannot be read, or holds something else.
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
    """The JSON object that follows a flag.

    Raises:
        UserError: If it is none.
    """
    value = _parse_json(flag, text)
    if not isinstance(value, dict):
        raise UserError(f"{flag}: expected a JSON object, such as '{{\"key\": true}}'.")
    return value


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: not JSON: {why}.") from None
