"""Writes folders completely or not at all.

A new folder is written beside its place, synced, and moved there; only then is an older one
removed. A process killed at any moment leaves the old folder or the new one. Between two renames,
for an instant, it leaves both under hidden names beside the place; the next writer removes the
leftovers, and moves an old folder back if its place is empty. A failed rename moves it back too.

In a bucket (``gs://``) nothing is renamed. Files are written as objects, one after the other, and
the object that marks the folder as complete is written last. The older marker is removed first, so
a process killed meanwhile leaves a folder that is recognisably incomplete.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping

from jaxpeft.core.errors import ResourceError, UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath

_OLD = ".old"


def write_folder(path: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Makes `path` a folder with exactly these files.

    Args:
        path: The folder. It may exist and hold files of these names, but no others.
        files: Content by file name; the last file marks the folder as complete.

    Raises:
        UserError: If `path` is a file, holds other files, or cannot be written.
        ResourceError: If the disk is full.
    """
    folder = real_path(path)
    require_replaceable(folder, files)
    if storage.is_remote(folder):
        storage.write_objects(folder, files)
        return
    with new_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, last: str = "") -> Iterator[pathlib.Path]:
    """Gives an empty folder to fill, and moves it to `path` if the block succeeds.

    Whatever is at `path` is replaced; call `require_replaceable` first.

    Args:
        path: The folder to make, with its parents. A link is followed.
        last: The file that marks the folder as complete if `path` is in a bucket.

    Yields:
        An empty folder on disk, beside `path` if `path` is on disk. After the block it is gone: it
        was moved or copied to `path`, or removed.

    Raises:
        UserError: Something cannot be written, in the block or after it. A `path` on disk is then
            unchanged; one in a bucket may be incomplete.
        ResourceError: The disk is full; `path` is then unchanged.
    """
    folder = real_path(path)
    if storage.is_remote(folder):
        try:
            with tempfile.TemporaryDirectory() as temporary:
                yield pathlib.Path(temporary)
                storage.upload(pathlib.Path(temporary), folder, last)
        except OSError as error:
            where = f"{folder}: {tempfile.gettempdir()}, where it is written first"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"{where}, has no space left; free some, or set TMPDIR to another folder."
                ) from error
            raise UserError(f"{where}: {error.strerror or error}.") from error
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with _sibling(folder) as temporary:
            yield temporary
            _sync_tree(temporary)
            _move_into_place(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{folder}: no space left on the disk to save there.") from error
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}.") from error


def remove_leftovers(path: str | os.PathLike) -> None:
    """Removes what killed writers of a folder left beside it, except where one is still writing.

    Args:
        path: The folder that they wrote. If it is missing and an older version had been moved
            aside, that version is moved back.

    Raises:
        OSError: The disk does not let us look, or move the older version back.
    """
    folder = real_path(path)
    if storage.is_remote(folder) or not folder.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}\.tmp({re.escape(_OLD)})?")
    found = {
        file.name: file
        for file in folder.parent.iterdir()
        if pattern.fullmatch(file.name) and file.is_dir() and not file.is_symlink()
    }
    for name in sorted(found, reverse=True):  # older versions first
        new = folder.parent / name.removesuffix(_OLD)
        with _locked(new if new.exists() else found[name]) as free:
            if free and name.endswith(_OLD) and not folder.exists():
                found[name].rename(folder)
            elif free:
                shutil.rmtree(found[name], ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Locks a folder; gives False if it is locked by others or gone, or the disk has no locks."""
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def real_path(path: str | os.PathLike) -> StoragePath:
    """The absolute path with links resolved: the folder is replaced, not a link to it."""
    text = storage.require_path(path)
    return storage.as_path(text if storage.is_remote(text) else os.path.realpath(text))


def require_replaceable(folder: StoragePath, names: Container[str]) -> None:
    """Checks that saving into a folder replaces nothing but an earlier save.

    Args:
        folder: Where to save.
        names: The files that saving may write.

    Raises:
        UserError: The folder is a file, or holds other files.
    """
    if not storage.exists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a folder.")
    with storage.explained(folder):
        others = sorted(p.name for p in folder.iterdir() if p.name not in names)
    if others:
        raise UserError(
            f"{folder}: holds other files, which saving would remove: {first_few(others)}; "
            "choose a new or empty folder."
        )


@contextlib.contextmanager
def _sibling(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a new folder beside `folder`, and removes it after the block if it is still there."""
    temporary = pathlib.Path(tempfile.mkdtemp(".tmp", f".{folder.name}.", folder.parent))
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    try:
        with _locked(temporary):  # others then see that it is in use
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_tree(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: pathlib.Path) -> None:
    """Makes a file's bytes, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `temporary` to `folder`; an older folder is moved aside, and back if that fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = temporary.with_name(temporary.name + _OLD)
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
