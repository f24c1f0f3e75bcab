"""Copies small files from a bucket to disk, for packages that do not read URLs."""

import contextlib
import fnmatch
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath


@contextlib.contextmanager
def on_disk(folder: StoragePath, patterns: Iterable[str]) -> Iterator[pathlib.Path]:
    """Gives a folder on disk that holds some files of `folder`.

    Args:
        folder: A folder on disk, which is given as it is, or a folder in a bucket.
        patterns: Which files to copy from a bucket, such as ``*.json``, or ``more/*.json`` for
            files in a folder inside it.

    Yields:
        The folder on disk; a copy is removed after the block.
    """
    if not storage.is_remote(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        with storage.explained(folder):
            for parent, name in sorted({os.path.split(pattern) for pattern in patterns}):
                source, target = folder / parent, pathlib.Path(copy, parent)
                if parent and not source.is_dir():
                    continue
                target.mkdir(exist_ok=True)
                for file in source.iterdir():
                    if fnmatch.fnmatch(file.name, name):
                        (target / file.name).write_bytes(file.read_bytes())
        yield pathlib.Path(copy)
