"""Standard output and error as files on a disk that may be full; lost lines do no harm."""

import errno
import io
import os
import sys
from typing import Any

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Lossy(io.RawIOBase):
    """A file descriptor whose disk may be full. Closing this object does not close it."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return len(data)


def open_lossy(descriptor: int, like: Any) -> io.TextIOWrapper:
    """A line-buffered text stream to a file descriptor; lines that a full disk refuses are lost.

    Args:
        descriptor: The file descriptor; it stays open.
        like: The stream whose encoding is used.
    """
    stream = io.BufferedWriter(_Lossy(descriptor))
    return io.TextIOWrapper(stream, like.encoding, "backslashreplace", line_buffering=True)


def survive_full_disks() -> None:
    """Lets this program go on if standard output or error is a file on a full disk.

    This is for programs whose result is elsewhere, such as a training run. Terminals are unchanged.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not stream.isatty():
            stream.flush()
            setattr(sys, name, open_lossy(stream.fileno(), stream))
