"""Reads and writes files on a disk, or objects in a bucket (``gs://bucket/name``).

`as_path` returns a `pathlib.Path`, or for a URL an `etils.epath.Path`, which has the same methods
and uses gcsfs. Orbax takes such paths, and reads and writes arrays in buckets through TensorStore.
fsspec alone has no paths with these methods; a class of ours would take epath's place. Listings,
ranges and copies go to gcsfs directly, as epath has none, or hides failures.

An object appears completely once it is written, or not at all. Objects cannot be renamed, appended
to or locked. A folder exists as long as the names of some objects begin with its name.
"""

import contextlib
import errno
import importlib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxpeft.core.errors import StoreError, UserError

# The type that `as_path` returns. epath's paths have the methods of `pathlib.Path`, but do not
# inherit from it.
if TYPE_CHECKING:
    StoragePath = pathlib.Path
else:
    StoragePath = pathlib.PurePath

SCHEME = "gs://"
MAX_NAME_BYTES = 255
"""The longest name of a file or folder in the file systems of Linux and macOS."""
MAX_PATH_BYTES = 4095
"""The longest path in Linux (PATH_MAX without the NUL at its end)."""
_CLIENTS = ("aiohttp", "gcsfs", "google.api_core", "google.auth", "google.cloud", "tensorstore")
_MAX_REQUEST_BYTES = 64 << 20
_reached: set[str] = set()  # schemes of the stores that this process has used


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def problem_of(path: str | os.PathLike) -> str:
    """Why no file can have this path, as a clause; "" if one can."""
    text = os.fspath(path)
    if "\0" in text:
        return "a path cannot hold a NUL character"
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return "a path must be text in UTF-8; rename the file or folder"
    longest = max(map(len, data.split(b"/")))
    if longest > MAX_NAME_BYTES and not is_remote(text):
        return f"a name of {longest} bytes in it; file systems take at most {MAX_NAME_BYTES}"
    if len(data) > MAX_PATH_BYTES:
        return f"a path of {len(data)} bytes; at most {MAX_PATH_BYTES} are allowed"
    return ""


def require_path(path: str | os.PathLike) -> str:
    """Checks that a file can have this path, and returns it as text.

    Raises:
        UserError: The path holds a NUL character, is not UTF-8, or is too long.
    """
    if problem := problem_of(path):
        raise UserError(f"{shown(path)}: {problem}")
    return os.fspath(path)


def shown(path: str | os.PathLike) -> str:
    r"""A path for a message: unprintable characters escaped, the middle of a long path left out.

    Example:
        >>> shown("a\0b")
        "'a\\x00b'"
    """
    text = os.fspath(path)
    if len(text) > 120:
        text = f"{text[:60]}...{text[-40:]}"
    return text if text.isprintable() else ascii(text)


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """A path on disk with ``~`` replaced by a home folder.

    Raises:
        UserError: No file can have this path, or there is no user with the name behind the ``~``.
    """
    text = require_path(path)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{text}: no home folder is known for {text.split('/')[0]}; write the path out"
        ) from None


def as_path(path: str | os.PathLike) -> StoragePath:
    """The path of a file or folder, on disk or in a bucket, without looking whether it exists.

    Raises:
        UserError: No file can have this path, the URL is of another kind or names no bucket, or
            gcsfs is not installed.
    """
    text = require_path(path)
    if not is_remote(text):
        return pathlib.Path(text)
    if not text.startswith(SCHEME):
        raise UserError(f"{text}: of object stores only {SCHEME} is supported")
    if not text.removeprefix(SCHEME).partition("/")[0]:
        raise UserError(f"{text}: names no bucket; expected {SCHEME}bucket/name")
    _client(text)
    from etils import epath

    return epath.Path(text)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turns exceptions about a bucket in its block into errors with an explanation.

    Exceptions about paths on disk are left as they are.

    Args:
        path: The bucket, folder or object, for messages.

    Raises:
        UserError: The object or bucket does not exist.
        StoreError: The store refuses or does not answer.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        kind = UserError if isinstance(error, FileNotFoundError) else StoreError
        raise kind(f"{os.fspath(path)}: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """What an exception of the store means, in one line."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "nothing is there, or there is no such bucket"
    code = str(getattr(error, "code", ""))
    if code in ("401", "403") or _is_forbidden(error):
        return (
            f"not allowed ({text}); log in with `gcloud auth application-default login`, or give "
            "this machine's service account access to the bucket"
        )
    return f"the store cannot be reached or refuses ({type(error).__name__}: {text})"


def _is_forbidden(error: BaseException) -> bool:
    """Whether an exception is the plain OSError that gcsfs raises for a forbidden request."""
    return isinstance(error, OSError) and str(error).startswith("Forbidden")


def is_store_error(error: BaseException) -> bool:
    """Whether an exception comes from a client of an object store."""
    module = type(error).__module__ + "."
    known = any(module.startswith(f"{name}.") for name in _CLIENTS)
    return bool(_reached) and (known or _is_forbidden(error))


def read_bytes(path: StoragePath) -> bytes:
    """The content of a file or object.

    Raises:
        FileNotFoundError: It is not there.
        StoreError: The store refuses or does not answer.
        OSError: The disk does not let us read it.
    """
    with explained(path), contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


def size(path: StoragePath) -> int:
    """Bytes of a file or object."""
    stat: Any = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def exists(path: StoragePath) -> bool:
    """Whether a file, folder or object exists.

    The `exists` of epath's paths returns False for a failed request; this function raises.

    Raises:
        UserError: A package that buckets need is not installed.
        StoreError: The store does not answer.
    """
    if not is_remote(path):
        return path.exists()
    with explained(path):
        try:
            _client(os.fspath(path)).info(os.fspath(path))
        except FileNotFoundError:
            return False
    return True


class Ranges:
    """A file or object that is read at any offset; it keeps no position.

    An object is read by range requests, and nothing of it is stored on disk.
    """

    def __init__(self, path: StoragePath):
        self._path = os.fspath(path)
        self._client = _client(self._path) if is_remote(path) else None
        self._file = -1 if self._client else os.open(path, os.O_RDONLY)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fills `view`, or a part of it, from `offset` on; gives the number of bytes, 0 at the end.

        The answer to a request is in memory a second time, so one request does not ask for
        everything.
        """
        if self._client is None:
            return os.preadv(self._file, [view], offset)
        end = offset + min(len(view), _MAX_REQUEST_BYTES)
        with explained(self._path):
            try:
                data = self._client.cat_file(self._path, start=offset, end=end)
            except Exception as error:
                if getattr(error, "code", None) != 416:  # the object ends before this range
                    raise
                return 0
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)


def write_objects(folder: StoragePath, files: Mapping[str, bytes]) -> None:
    """Writes objects under `folder` one after the other; readers look for the last one.

    If there are several, an older object with the last one's name is removed first, so that it
    never marks a mixture of old and new objects as complete.
    """
    *others, last = files
    with explained(folder):
        if others:
            (folder / last).unlink(missing_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def upload(local: pathlib.Path, folder: StoragePath, last: str) -> None:
    """Writes the files of a folder on disk as objects, in place of the objects there.

    Args:
        local: The folder on disk.
        folder: The folder in the bucket; objects with other names are removed.
        last: The file that readers look for first. It is removed before anything else changes, and
            written last.

    Raises:
        UserError: A package that buckets need is not installed.
        StoreError: The store refuses or does not answer.
    """
    client, target = _client(os.fspath(folder)), os.fspath(folder)
    found = [file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file()]
    names = sorted(found, key=lambda name: (name == last, name))
    with explained(folder):
        for name in sorted(objects(folder), key=lambda name: name != last):
            if name == last or name not in names:
                (folder / name).unlink()
        for name in names:
            client.put_file(str(local / name), f"{target}/{name}")


def objects(folder: StoragePath) -> dict[str, dict[str, Any]]:
    """A dict from the name of every object under a folder to its size and the store's CRC-32C.

    Raises:
        UserError: A package that buckets need is not installed.
        StoreError: The store refuses or does not answer.
    """
    client = _client(os.fspath(folder))
    root = os.fspath(folder).removeprefix(SCHEME).rstrip("/") + "/"
    with explained(folder):
        found = client.find(root, detail=True)
    return {
        name.removeprefix(root): {"bytes": int(info["size"]), "crc32c": info.get("crc32c", "")}
        for name, info in found.items()
    }


def remove(folder: StoragePath) -> None:
    """Removes all objects under a folder, if there are any.

    Raises:
        UserError: A package that buckets need is not installed.
        StoreError: The store refuses or does not answer.
    """
    with explained(folder), contextlib.suppress(FileNotFoundError):
        _client(os.fspath(folder)).rm(os.fspath(folder), recursive=True)


def move(folder: StoragePath, target: StoragePath, first: str) -> None:
    """Copies all objects under a folder, then removes the originals, `first` before the others.

    A process killed meanwhile leaves the originals complete, or without `first`.

    Raises:
        UserError: A package that buckets need is not installed.
        StoreError: The store refuses or does not answer.
    """
    client = _client(os.fspath(folder))
    with explained(folder):
        client.copy(os.fspath(folder), os.fspath(target), recursive=True)
        (folder / first).unlink(missing_ok=True)
    remove(folder)


def _client(url: str) -> Any:
    """The file system of gcsfs, without its cache of listings: other processes write too."""
    try:
        import fsspec
        from fsspec.config import conf

        importlib.import_module("gcsfs")
    except ImportError as error:
        raise UserError(f"{url}: needs pip install 'jaxpeft[gcs]' ({error})") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs every error with a trace
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    _reached.add(SCHEME)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # with the arguments that epath uses
