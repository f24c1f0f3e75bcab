"""A chat template in a file, which overrides the tokenizer's own (``model.chat_template``).

Its text is stored in the folder of a run and with the adapter, so both can be used after the file
is changed or removed.
"""

import copy
import dataclasses
import pathlib
from typing import Any

from jaxpeft.core.errors import UserError, nearest
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.chat_settings import chat_of

MAX_BYTES = 1_000_000
"""The longest file; templates in use have up to 40,000 characters."""


def read_template(path: str, what: str = "model.chat_template") -> str:
    """Reads a chat template and checks its syntax.

    Args:
        path: A file, on disk or in a bucket (``gs://``), relative to the working directory.
        what: The key or flag that names it, for messages.

    Raises:
        UserError: The file is missing, too large, empty or not UTF-8, or its syntax is wrong.
        StoreError: The bucket refuses or does not answer.
    """
    name = f"{what}: {storage.shown(path)}"
    place = storage.as_path(path) if storage.is_remote(path) else storage.expanded(path)
    data = _read(place, name)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start}; save "
            "it as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{name}: the file is empty; expected a chat template in Jinja")
    _check_syntax(text, name)
    return text


def override_template(tokenizer: Any, template: str) -> Any:
    """A copy of a tokenizer with another chat template; for "" the tokenizer itself.

    Args:
        tokenizer: A transformers tokenizer, which is not changed.
        template: The text, or "".
    """
    if not template or tokenizer is None or tokenizer.chat_template == template:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def override_in_adapter(adapter: Adapter, template: str) -> Adapter:
    """An adapter that chats with another template than in its training; for "" itself."""
    if not template:
        return adapter
    chat = dataclasses.replace(chat_of(adapter), template=template)
    return dataclasses.replace(adapter, chat=chat.label())


def _read(place: StoragePath, name: str) -> bytes:
    try:
        with storage.explained(place):
            if place.is_dir():
                raise UserError(f"{name}: is a folder; give a file in it")
            if storage.exists(place) and storage.size(place) > MAX_BYTES:
                size = storage.size(place)
                raise UserError(f"{name}: has {size:,} bytes, more than {MAX_BYTES:,}")
        return storage.read_bytes(place)
    except FileNotFoundError:
        folder, close = place.parent, []
        if folder.is_dir():
            close = nearest(place.name, sorted(entry.name for entry in folder.iterdir()))
        hint = f"; near names: {', '.join(close)}" if close else ""
        where = "" if storage.is_remote(place) else f" (from {pathlib.Path.cwd()})"
        raise UserError(f"{name}: no such file{where}{hint}") from None
    except OSError as error:
        if storage.is_remote(place):
            raise
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None


def _check_syntax(text: str, name: str) -> None:
    """Refuses a template that cannot be compiled."""
    import jinja2

    from jaxpeft.data.templates.sandbox import BoundedEnvironment

    try:
        BoundedEnvironment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{name}:{error.lineno}: not a chat template in Jinja: {error.message}"
        ) from None
    except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: not a chat template in Jinja: {reason}") from None
