"""Explains a failed save in one line: no room, no permission, or another reason."""

import errno
import gc
import logging
import re
import shutil
import traceback
import warnings

from jaxpeft.core.errors import CheckpointError, ResourceError, StoreError, UserError
from jaxpeft.files.storage import StoragePath, is_remote

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EBUSY),
    *(errno.ENOTCONN, errno.EREMOTEIO),
)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def describe(error: BaseException, path: StoragePath, needed_bytes: int) -> UserError:
    """The error to raise for a failed save; call it before cleaning up, while the disk is full.

    Args:
        error: What Orbax, TensorStore or the file system raised.
        path: The step that was being saved.
        needed_bytes: About how many bytes the step takes.

    Returns:
        A `ResourceError` if room or permission is missing or a disk fails, a `StoreError` for a
        failure of a bucket, else a `CheckpointError`.
    """
    missing = isinstance(error.__cause__, FileNotFoundError)
    if isinstance(error, UserError) and not (isinstance(error, StoreError) or missing):
        return error
    where = f"{path}: cannot be saved"
    after = "Earlier steps are untouched"
    if is_remote(path):
        return StoreError(f"{where}: {first_line(error)}. {after}; run the same command to go on.")
    number = _error_number(error)
    if number in _NO_ROOM:
        return ResourceError(
            f"{where}: no room: about {needed_bytes:,} bytes needed, {_free_text(path.parent)}. "
            f"{after}; free some space and run the same command to go on."
        )
    if number in _NOT_ALLOWED:
        return ResourceError(
            f"{where}: not allowed: {first_line(error)}. {after}; make the folder writable and "
            "run the same command to go on."
        )
    if number in _FAILED:
        return ResourceError(
            f"{where}: the disk failed: {first_line(error)}. {after}; once it works run the same "
            "command to go on."
        )
    return CheckpointError(f"{where}: {first_line(error)}. {after}.")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def drop_coroutines(error: BaseException | None) -> None:
    """Frees the coroutines in the frames of a failed save; Python would warn of them at exit."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


def silence_orbax_tracebacks() -> None:
    """Silences Orbax, which logs a failed save's traceback several times; it is raised once."""
    logging.getLogger("absl").addFilter(_is_not_an_orbax_traceback)


def _is_not_an_orbax_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _free_text(directory: StoragePath) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,} free"
    except OSError:
        return "free space unknown"


def _error_number(error: BaseException | None) -> int | None:
    """The errno of an exception; TensorStore gives it in the text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None
