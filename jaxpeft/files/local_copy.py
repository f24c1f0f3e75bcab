"""Copies of small files in a bucket, for packages that read no URLs."""

import contextlib
import fnmatch
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

from jaxpeft.files import storage
from jaxpeft.files.storage import Place


@contextlib.contextmanager
def on_disk(folder: Place, patterns: Iterable[str]) -> Iterator[pathlib.Path]:
    """A folder with its small files on disk, for packages that read no URLs.

    Args:
        folder: A folder on disk, which is given as it stands, or in a bucket.
        patterns: Which files in it are copied from a bucket, such as ``*.json``, or in a folder
            of it, ``more/*.json``.
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
