"""Loads tokenizers of Hugging Face folders and GGUF files, always of transformers' fast kind."""

import pathlib
from typing import Any

from jaxpeft.core import limits
from jaxpeft.core.errors import StoreError, UserError
from jaxpeft.files import storage
from jaxpeft.files.json_file import read_json
from jaxpeft.files.local_copy import on_disk
from jaxpeft.files.locate import SMALL
from jaxpeft.files.storage import StoragePath
from jaxpeft.pretrained.quiet_transformers import import_transformers

# A folder's tokenizer is made from one of these files.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(place: StoragePath) -> bool:
    """Whether a folder has tokenizer files; a GGUF file always does."""
    return place.suffix == ".gguf" or any((place / name).is_file() for name in VOCABULARY_FILES)


def read_tokenizer(place: StoragePath) -> Any:
    """Loads the tokenizer of a Hugging Face folder or a GGUF file, without running code from it.

    Args:
        place: A folder, or a ``.gguf`` file.

    Raises:
        UserError: There are no tokenizer files, transformers cannot read them, or a path in them
            leaves the folder.
        StoreError: The store refuses or does not answer.
    """
    if place.suffix == ".gguf":
        from jaxpeft.pretrained.gguf.tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(place)
    if not has_tokenizer(place):
        raise UserError(
            f"{place}: no tokenizer: expected one of {', '.join(VOCABULARY_FILES)}; "
            "copy the tokenizer files of the model into the folder"
        )
    for name in VOCABULARY_FILES:
        if (place / name).is_file():
            limits.require_bytes(place / name, storage.size(place / name), limits.TOKENIZER_BYTES)
    _check_settings(place / "tokenizer_config.json")
    transformers = import_transformers()
    try:
        with on_disk(place, SMALL) as folder:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, use_fast=True
            )
    except StoreError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        hint = (
            "download its tokenizer.json again"
            if (place / "tokenizer.json").is_file() and "custom code" not in reason
            else "code in a model folder is never run, and tokenizer.json is the file that works "
            "without"
        )
        raise UserError(
            f"{place}: the tokenizer files cannot be read: {reason[:300]}; {hint}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{place}: only a slow tokenizer was found; save a fast one with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` where transformers can"
        )
    return tokenizer


def _check_settings(path: StoragePath) -> None:
    if not path.is_file():
        return
    for key, value in read_json(path).items():
        if (
            key.endswith("_file")
            and isinstance(value, str)
            and pathlib.PurePath(value).name != value
        ):
            raise UserError(
                f"{path}: {key}: {value!r} is not a file name inside the folder; remove the key"
            )
