"""`metrics.jsonl`: one JSON object per line, appended during a run and cut back on resume.

Objects in a bucket (``gs://``) cannot be appended to. There the lines stay in memory, and `keep`
writes the whole object again.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpeft.core import notes
from jaxpeft.core.errors import ResourceError
from jaxpeft.files import storage


def open_log(path: storage.StoragePath) -> "MetricsLog | ObjectLog":
    """The log for a file, or for an object in a bucket."""
    return ObjectLog(path) if storage.is_remote(path) else MetricsLog(path)


class ObjectLog:
    """Lines of metrics in memory; the object in the bucket has the lines of the last `keep`.

    Args:
        path: The object.

    Raises:
        UserError: The object cannot be read.
    """

    def __init__(self, path: storage.StoragePath):
        self.path = path
        self._lines: list[bytes] = []
        with storage.explained(path), contextlib.suppress(FileNotFoundError):
            self._lines = path.read_bytes().splitlines(keepends=True)

    def append(self, line: dict[str, Any]) -> None:
        """Appends one line, see `MetricsLog.append`."""
        self._lines.append(_encode(line))

    def truncate_after(self, step: int) -> None:
        """Drops lines, see `MetricsLog.truncate_after`, and writes the object at once."""
        whole = list(itertools.takewhile(lambda data: _belongs(data, step), self._lines))
        if len(whole) < len(self._lines):
            self._lines = whole
            self.keep()

    def keep(self) -> None:
        """Writes the object; call it before the checkpoint that these lines belong to.

        Raises:
            UserError: The object cannot be written.
        """
        storage.write_objects(self.path.parent, {self.path.name: b"".join(self._lines)})

    def __enter__(self) -> "ObjectLog":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class MetricsLog:
    """Appends lines of metrics to a file. If the disk is full, lines are lost but the run goes on.

    Args:
        path: The file; made if missing.
        warn: Called once when a line could not be written; prints to stderr by default.

    Raises:
        ResourceError: The file cannot be opened at the start.
    """

    def __init__(self, path: str | os.PathLike[str], warn: Callable[[str], None] = notes.warn):
        self.path = Path(path)
        self._warn = warn
        self._failed = False
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written: {error.strerror}") from error

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line, visible to readers on return; NaN and infinity become null.

        Args:
            line: Names and numbers, strings or None; 0-d arrays count as numbers.

        Raises:
            TypeError: A value has another type.
        """
        data = _encode(line)
        try:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, data)
                if written < len(data):
                    os.write(self._file, data[written:])
            except OSError:
                os.ftruncate(self._file, size)
                raise
        except OSError as error:
            if not self._failed:
                self._warn(f"{self.path}: lines are lost: {error.strerror}; training goes on")
            self._failed = True

    def truncate_after(self, step: int) -> None:
        """Cuts the file at the first line that is torn or belongs to a larger step.

        Args:
            step: The step a run resumes from.

        Raises:
            ResourceError: The file cannot be read or cut.
        """
        try:
            with open(self.path, "rb") as file:
                size = 0
                for data in file:
                    if not _belongs(data, step):
                        break
                    size += len(data)
            os.ftruncate(self._file, size)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be cut: {error.strerror}") from error

    def keep(self) -> None:
        """Does nothing, because the lines are in the file already."""

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _encode(line: dict[str, Any]) -> bytes:
    text = json.dumps({name: _plain(value) for name, value in line.items()}, allow_nan=False)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _belongs(data: bytes, step: int) -> bool:
    """Whether a line is complete and not after `step`."""
    try:
        line = json.loads(data)
    except ValueError:
        return False
    if not data.endswith(b"\n") or not isinstance(line, dict):
        return False
    reached = line.get("step", 0)
    return isinstance(reached, int) and reached <= step
