"""Finds the folder or file that the user's text means: a path, a bucket or a hub id."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterable

from jaxpeft.core.errors import UserError, nearest
from jaxpeft.files import hub, other_folders, storage
from jaxpeft.files.companions import COMPANIONS
from jaxpeft.files.storage import StoragePath

_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
SMALL = ("config.json", *COMPANIONS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w-]*")
_ENDINGS = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth")


def locate(path: str | os.PathLike, revision: str | None = None, *, weights: bool) -> StoragePath:
    """Finds a model; it downloads from the Hugging Face hub only if given a hub id.

    Args:
        path: A folder, on disk or in a bucket (``gs://``), a ``.gguf`` file, or a hub id such as
            "org/name".
        revision: Branch, tag or commit of a hub id.
        weights: Whether the weights are wanted, or only config and tokenizer.

    Returns:
        An existing folder or ``.gguf`` file.

    Raises:
        UserError: Nothing is there, it is something else, or the hub has no such model.
    """
    text = storage.require_path(path)
    if storage.is_remote(text):
        if text.endswith(".gguf"):
            raise UserError(f"{text}: a .gguf file is read from a disk only; copy it there")
        return _in_bucket(text, revision, ("config.json",))
    local = storage.expanded(text)
    if not text.strip():
        raise UserError(f"model path {text!r}: expected a folder, a .gguf file or a hub id")
    if local.exists():
        if revision is not None:
            raise UserError(
                f"{text}: revision {revision!r} has no meaning for a local path; drop it"
            )
        return _check_local(local)
    if looks_local(text):
        raise UserError(
            f"{text}: no such file or folder (from {pathlib.Path.cwd()}); {_near(local)}"
            "no network access was tried, as this is not a hub id (org/name)"
        )
    return hub.download(text, revision, [*SMALL, *(_WEIGHTS if weights else ())], "model")


def locate_again(path: str | os.PathLike, revision: str | None = None) -> StoragePath | None:
    """Finds a model that was loaded from `path` before, without downloading anything.

    Args:
        path: What `locate` was given.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A folder or a ``.gguf`` file; None if it is no longer there.

    Raises:
        StoreError: The bucket refuses or does not answer.
    """
    text = os.fspath(path)
    if storage.is_remote(text):
        folder = storage.as_path(text)
        return folder if storage.exists(folder / "config.json") else None
    local = pathlib.Path(text).expanduser()
    if local.exists() or looks_local(text):
        return local if local.exists() else None
    import huggingface_hub
    from huggingface_hub import errors

    with contextlib.suppress(errors.HfHubHTTPError, errors.HFValidationError, OSError):
        # LocalEntryNotFoundError is an OSError.
        found = huggingface_hub.snapshot_download(text, revision=revision, local_files_only=True)
        return pathlib.Path(found)
    return None


def locate_adapter(
    path: str | os.PathLike, revision: str | None, files: Iterable[str]
) -> StoragePath:
    """Finds an adapter's folder; it downloads only if given a hub id.

    Args:
        path: A folder, on disk or in a bucket (``gs://``), or a hub id "org/name".
        revision: Branch, tag or commit of a hub id.
        files: Names of the files to download from the hub, the config first.

    Returns:
        An existing folder.

    Raises:
        UserError: Nothing is there, or the hub has no such adapter.
    """
    text, files = storage.require_path(path), tuple(files)
    if storage.is_remote(text):
        return _in_bucket(text, revision, (files[0], f"adapter/{files[0]}"))
    local = storage.expanded(text)
    if local.exists() and revision is not None:
        raise UserError(f"{text}: revision {revision!r} has no meaning for a local path; drop it")
    if text.strip() and local.is_dir():
        return local
    if local.exists() or looks_local(text) or "/" not in text:
        raise UserError(
            f"{text}: no such folder (from {pathlib.Path.cwd()}); no network access was tried, as "
            "this is not a hub id (org/name)"
        )
    return hub.download(text, revision, files, "adapter")


def looks_local(text: str) -> bool:
    """Whether `text` can only be a path, because a hub id does not look like that."""
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.lower().endswith(_ENDINGS)
        or not _HUB_ID.fullmatch(text)
        or ("/" in text and pathlib.Path(text).parent.is_dir())
    )


def _in_bucket(text: str, revision: str | None, names: tuple[str, ...]) -> StoragePath:
    """A folder in a bucket, checked to hold an object with one of these names."""
    if revision is not None:
        raise UserError(f"{text}: revision {revision!r} has no meaning in a bucket; drop it")
    folder = storage.as_path(text)
    with storage.explained(text):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                storage.size(folder / name)
                return folder
    raise UserError(f"{text}: no such bucket, or it has no {' or '.join(names)} there")


def _check_local(local: pathlib.Path) -> pathlib.Path:
    if local.is_dir():
        if not (local / "config.json").is_file():
            if found := other_folders.instead_of_model(local):
                raise UserError(f"{local}: {found}")
            raise UserError(
                f"{local / 'config.json'}: file not found; a Hugging Face model folder has one"
            )
        return local
    if local.suffix.lower() == ".gguf":
        return local if local.suffix == ".gguf" else local.resolve()
    if local.suffix in (".safetensors", ".npz"):
        raise UserError(f"{local}: {other_folders.lone_weights(local)}")
    pickled = local.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    raise UserError(
        f"{local}: expected a Hugging Face folder, a .gguf file or a hub id"
        + ("; pickles can run code and are never opened" if pickled else "")
    )


def _near(local: pathlib.Path) -> str:
    parent = local.parent
    while not parent.is_dir():
        local, parent = parent, parent.parent
    close: list[str] = []
    with contextlib.suppress(OSError):  # listing the folder may be forbidden
        close = nearest(local.name, [p.name for p in parent.iterdir()])
    return f"near names: {', '.join(str(parent / name) for name in close)}; " if close else ""
