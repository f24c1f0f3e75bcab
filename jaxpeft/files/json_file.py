"""Reads JSON files that hold one object, strictly; every error names the file."""

import json
from collections.abc import Mapping
from typing import Any

from jaxpeft.core import limits, strict_json
from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A JSON object as the content of a file, keys in order."""
    text = json.dumps(dict(values), indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode()


def read_json(path: StoragePath) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        UserError: The file is not UTF-8, not JSON or not an object, or has a key twice.
        StoreError: The store refuses or does not answer.
    """
    try:
        limits.require_bytes(path, storage.size(path), limits.JSON_BYTES)
        text = storage.read_bytes(path).decode("utf-8")
        value = strict_json.loads(text, constants=True)
    except json.JSONDecodeError as error:
        text = "the file is empty" if not storage.size(path) else f"not valid JSON: {error.msg}"
        raise UserError(f"{path}:{error.lineno}:{error.colno}: {text}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
