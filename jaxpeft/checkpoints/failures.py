"""What went wrong in a save, in one line: no room, no permission, or something else."""

import errno
import gc
import logging
import re
import shutil
import traceback
import warnings

from jaxpeft.core.errors import CheckpointError, ResourceError, StoreError, UserError
from jaxpeft.files.storage import Place, is_remote

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EBUSY),
    *(errno.ENOTCONN, errno.EREMOTEIO),
)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def describe(error: BaseException, path: Place, needed_bytes: int) -> UserError:
    """The error a user gets for a failed save; call it before cleaning up, while the disk is full.

    Args:
        error: What Orbax, TensorStore or the file system raised.
        path: The step that was being saved.
        needed_bytes: About how much it takes.

    Returns:
        A `ResourceError` that names the room or the permission missing, or a disk that fails; a
        `StoreError` for what goes wrong in a bucket, else a `CheckpointError`.
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
    """The first line of an error's text, at most 300 characters of it."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def drop_coroutines(error: BaseException | None) -> None:
    """Frees what a failed save left in its frames: Python warns of its coroutines at exit."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


def silence_orbax_tracebacks() -> None:
    """Orbax logs the traceback of a failed save several times over; we raise it once."""
    logging.getLogger("absl").addFilter(_is_not_an_orbax_traceback)


def _is_not_an_orbax_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _free_text(directory: Place) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,} free"
    except OSError:
        return "free space unknown"


def _error_number(error: BaseException | None) -> int | None:
    """The errno behind an error; TensorStore has it in the text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None
