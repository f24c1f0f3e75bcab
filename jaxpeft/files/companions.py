"""The files in a model folder beside its weights and its ``config.json``.

They describe tokenization and generation. When a model is saved again they are copied byte by byte,
so that other programs find what they found in the base.
"""

import fnmatch
import pathlib

from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
TEMPLATES = "additional_chat_templates"
COMPANIONS = (
    GENERATION,
    TOKENIZER,
    "tokenizer.*.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    TEMPLATE,
    TEMPLATE_JSON,
    f"{TEMPLATES}/*.jinja",
)
"""Patterns, relative to the folder, of all files from which a tokenizer is read."""

_MORE = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.model.v*",
)
"""Vocabularies that some tokenizer classes look for. They are copied, but never downloaded."""


def is_companion(name: str) -> bool:
    """Whether a file with this name in a model folder is one of the files beside the weights."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in (*COMPANIONS, *_MORE)
    )


def find_companions(folder: StoragePath) -> dict[str, StoragePath]:
    """Finds the files beside the weights of a folder.

    Args:
        folder: A folder on disk or in a bucket.

    Returns:
        A sorted dict from names within the folder to places.

    Raises:
        UserError: A file is a link out of the folder that does not lead to a file of a model.
        StoreError: The store refuses or does not answer.
    """
    found = {}
    with storage.explained(folder):
        for child in folder.iterdir():
            if is_companion(child.name) and child.is_file():
                found[child.name] = child
        templates = folder / TEMPLATES
        if templates.is_dir():
            for child in templates.iterdir():
                if is_companion(f"{TEMPLATES}/{child.name}") and child.is_file():
                    found[f"{TEMPLATES}/{child.name}"] = child
    if not storage.is_remote(folder):
        for name, file in found.items():
            _require_inside(pathlib.Path(folder), name, pathlib.Path(file))
    return dict(sorted(found.items()))


def read_companions(folder: StoragePath) -> dict[str, bytes]:
    """Reads the files beside the weights; a dict from names within the folder to contents.

    Raises:
        UserError: A file cannot be read, or is refused by `find_companions`.
        StoreError: The store refuses or does not answer.
    """
    contents = {}
    for name, place in find_companions(folder).items():
        try:
            contents[name] = storage.read_bytes(place)
        except OSError as error:
            raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    return contents


def _require_inside(folder: pathlib.Path, name: str, file: pathlib.Path) -> None:
    """Refuses a link that leads out of the folder, unless it leads to a file of a model.

    Such a file is a blob in the hub's cache, or a file with the same name in another model's
    folder.
    """
    root, target = folder.resolve(), file.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if target.parent.name == "blobs" and target.parent.parent.name.startswith("models--"):
        roots.append(target.parent)
    roots += [place for place in target.parents if _is_model_with(place, name, target)]
    if not any(target.is_relative_to(one) for one in roots):
        raise UserError(
            f"{folder / name}: is a link to {target}, outside the model's folder, and is not "
            "copied into another model; put the file itself into the folder"
        )


def _is_model_with(folder: pathlib.Path, name: str, file: pathlib.Path) -> bool:
    """Whether `folder` is a model folder in which `file` has this name."""
    return file == folder / name and (folder / "config.json").is_file()
