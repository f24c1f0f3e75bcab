"""Makes sure that only one run at a time uses a folder.

The lock is `flock` on `<folder>/.lock`. The kernel frees it when the process ends, in whatever way,
so a killed run never blocks the next. The file names its holder, for messages. A run that ends
before it begins to write removes the file that it made.

In a bucket (``gs://``) nothing can be locked, and nobody sees whether a run has ended. There the
newest run owns the folder: it writes its name into an object before it changes anything, and an
older run that finds another name in it stops before it saves.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpeft.core import notes
from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.files import storage

NAME = ".lock"
OWNER = "run.json"


def hold(output_dir: str | os.PathLike[str]) -> "RunLock | RunOwner":
    """The lock of a folder on disk, or the owner of a folder in a bucket."""
    return RunOwner(output_dir) if storage.is_remote(output_dir) else RunLock(output_dir)


class RunOwner:
    """Owns a folder in a bucket from its call of `begin` until another run takes the folder.

    Args:
        output_dir: The run's folder.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        self.path = storage.as_path(output_dir) / OWNER
        self._text = ""

    def __enter__(self) -> "RunOwner":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def begin(self) -> None:
        """Takes the folder. Call it just before the first change there, because an older run stops.

        Raises:
            UserError: Nothing can be written there.
        """
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "begun": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "run": uuid.uuid4().hex,
        }
        self._text = json.dumps(holder)
        storage.write_objects(self.path.parent, {OWNER: self._text.encode()})

    def check(self) -> None:
        """Checks that no other run has taken the folder.

        Raises:
            UserError: Another run has; the text names its pid and host, and when it began.
        """
        with storage.explained(self.path):
            text = self.path.read_text()
        if text != self._text:
            raise UserError(
                f"{self.path.parent}: another run is writing here now ({_describe(_parse(text))}); "
                "this one stops and saves nothing more. Stop that one, or choose another output_dir"
            )


class RunLock:
    """Holds a folder for one process while its ``with`` block runs; forked children do not.

    Args:
        output_dir: The run's folder; made if missing.
        note: Called with one line if an ended run had left its lock; prints to stderr by default.

    Raises:
        UserError: On entering: another process holds the folder; the text names its pid and host.
        ResourceError: On entering: the folder cannot be made or written.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], note: Callable[[str], None] = notes.note
    ):
        self.path = Path(output_dir) / NAME
        self._note = note
        self._file: int | None = None
        self._made = self._begun = False

    def __enter__(self) -> "RunLock":
        file = self._lock()
        while not self._is_there(file):  # its maker has removed it meanwhile
            os.close(file)
            file = self._lock()
        if left := _holder(file):
            self._note(f"{self.path.parent}: taken over from a run that ended ({_describe(left)})")
        self._write(file, {"pid": os.getpid(), "host": socket.gethostname()})
        self._file = file
        os.register_at_fork(after_in_child=self._forget)
        return self

    def _lock(self) -> int:
        """Opens and locks the lock's file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._made = not self.path.exists()
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ResourceError(
                f"{self.path.parent}: cannot be written: {error.strerror}; make it writable or "
                "choose another output_dir"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _describe(_holder(file))
            os.close(file)
            raise UserError(
                f"{self.path.parent}: another run is writing here ({holder}); wait for it, stop "
                "it, or choose another output_dir"
            ) from error
        except OSError as error:
            os.close(file)
            raise ResourceError(f"{self.path}: cannot be locked: {error.strerror}") from error
        return file

    def _is_there(self, file: int) -> bool:
        """Whether the locked file is still the one under the lock's name."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __exit__(self, *_: Any) -> None:
        if self._file is None:
            return
        if self._made and not self._begun:
            with contextlib.suppress(OSError):
                self.path.unlink()
        else:
            self._write(self._file, {})
        self._forget()

    def begin(self) -> None:
        """Keeps the lock's file; the folder is locked since the ``with`` block was entered."""
        self._begun = True

    def check(self) -> None:
        """Does nothing: no other process can get the lock while this one lives."""

    def _write(self, file: int, holder: dict[str, Any]) -> None:
        """Writes the holder's name; a full disk must not stop a run, which needs no name there."""
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(holder).encode() if holder else b"", 0)
        except OSError as error:
            self._note(f"{self.path}: {error.strerror}")

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _holder(file: int) -> dict[str, Any]:
    return _parse(os.pread(file, 4096, 0))


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        holder = json.loads(text)
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "unknown process"
    begun = f", begun {holder['begun']}" if "begun" in holder else ""
    return f"pid {holder.get('pid')} on {holder.get('host')}{begun}"
