"""The manifest of a checkpoint folder, which fixes its content to the bit.

`manifest.json` lists size and sha256 of every file beside it, the shape and dtype of every saved
leaf, and the config and environment of the run. For objects in a bucket it has the store's CRC-32C
instead of a sha256, which is known without reading them back. The manifest is written last, so a
folder without one is no checkpoint, and a folder that differs from its manifest in a single bit is
damaged. The manifest protects itself: it holds the sha256 of its own other fields, and must be byte
for byte what `write` makes.
"""

import base64
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

from jaxpeft.files import storage
from jaxpeft.files.folders import sync
from jaxpeft.files.storage import StoragePath

NAME = "manifest.json"
FORMAT = 1


class DamageError(ValueError):
    """The folder differs from its manifest; the text names the file and what is wrong."""


def write(folder: StoragePath, fields: dict[str, Any]) -> None:
    """Makes every file of `folder` durable, then commits the folder by writing its manifest.

    Files and folders are fsynced before they are hashed. The manifest is written under a temporary
    name, fsynced, and renamed. In a bucket it is one object, written last. A crash at any moment
    leaves the folder either without a manifest or with a complete one.

    Args:
        folder: The folder to commit.
        fields: JSON values to keep in it (`format`, `files` and `sha256` are added).

    Raises:
        OSError: The disk is full or does not let us write.
    """
    files = _objects(folder) if storage.is_remote(folder) else _sync_and_hash(folder)
    body = {**fields, "format": FORMAT, "files": files}
    body = json.loads(json.dumps(body))  # keys as text, so that `read` sorts them alike
    if storage.is_remote(folder):
        storage.write_objects(folder, {NAME: _encode(body)})
        return
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "wb") as file:
        file.write(_encode(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    sync(folder)
    sync(folder.parent)


def read(folder: StoragePath) -> dict[str, Any]:
    """Reads a manifest and checks that it is intact; `verify` checks the files too.

    Returns:
        The fields given to `write`, with `format` and `files`.

    Raises:
        DamageError: The manifest is missing, cut, altered, or of a newer format.
        StoreError: The store does not let us read it, so nothing is known about it.
    """
    try:
        data = storage.read_bytes(folder / NAME)
    except OSError as error:
        raise DamageError(f"{NAME}: cannot be read: {error.strerror}") from error
    if not data:
        raise DamageError(f"{NAME}: is empty")
    try:
        body = json.loads(data)
        body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamageError(f"{NAME}: is not a manifest ({len(data)} bytes)") from error
    if _encode(body) != data:
        raise DamageError(f"{NAME}: does not match its own sha256")
    if body.get("format") != FORMAT:
        raise DamageError(f"{NAME}: has format {body.get('format')}, this version reads {FORMAT}")
    return body


def verify(folder: StoragePath) -> dict[str, Any]:
    """Reads a manifest and checks size and sha256 of every file it lists.

    Returns:
        The fields, as `read` returns them.

    Raises:
        DamageError: A file is missing, cut or altered.
        StoreError: The store does not answer.
    """
    body = read(folder)
    stored = _objects(folder) if storage.is_remote(folder) else None
    for name, expected in body["files"].items():
        path, kind = folder / name, "sha256" if "sha256" in expected else "crc32c"
        try:
            if stored is not None and name not in stored:
                raise FileNotFoundError
            size = stored[name]["bytes"] if stored else path.stat().st_size
            if size != expected["bytes"]:
                raise DamageError(f"{name}: has {size} bytes, expected {expected['bytes']}")
            digest = stored[name].get(kind) if stored else None
            if not digest:
                with storage.explained(path):
                    digest = _DIGESTS[kind](path)
        except FileNotFoundError as error:
            raise DamageError(f"{name}: is missing") from error
        except OSError as error:
            raise DamageError(f"{name}: cannot be read: {error.strerror}") from error
        if digest != expected[kind]:
            raise DamageError(f"{name}: its {kind} differs from the one saved")
    return body


def _encode(body: dict[str, Any]) -> bytes:
    """The exact bytes that a manifest with these fields must have."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def _sync_and_hash(folder: StoragePath) -> dict[str, dict[str, Any]]:
    files = {}
    for root, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(root, name)
            if path.parent == folder and name in (NAME, NAME + ".tmp"):
                continue
            sync(path)
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
        sync(Path(root))
    return files


def _sha256(path: StoragePath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32c(path: StoragePath) -> str:
    """The CRC-32C in the form of stores, for a checkpoint that was copied from a bucket to disk."""
    try:
        module = importlib.import_module("google_crc32c")
    except ImportError as error:
        raise DamageError(
            f"{path.name}: was saved in a bucket; to check it pip install 'jaxpeft[gcs]'"
        ) from error
    with path.open("rb") as file:
        checksum = module.Checksum()
        while data := file.read(1 << 20):
            checksum.update(data)
    return base64.b64encode(checksum.digest()).decode()


_DIGESTS = {"sha256": _sha256, "crc32c": _crc32c}


def _objects(folder: StoragePath) -> dict[str, dict[str, Any]]:
    return {name: file for name, file in storage.objects(folder).items() if name != NAME}
