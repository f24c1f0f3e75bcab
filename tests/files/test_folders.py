"""Folders are replaced whole or left as they were."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from places import ROOT

from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.files.folders import new_folder, remove_leftovers, write_folder


def old_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "old").write_text("kept")
    return folder


def state(tmp_path: pathlib.Path) -> dict[str, str]:
    """Every file below `tmp_path` with its text; hidden leftovers would show up here."""
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    return {str(path.relative_to(tmp_path)): path.read_text() for path in files}


def test_a_block_that_succeeds_replaces_the_folder_whole(tmp_path):
    with new_folder(old_folder(tmp_path)) as folder:
        (folder / "new").write_text("text")
        (folder / "sub").mkdir()
        (folder / "sub" / "deep").write_text("deep")
        assert state(tmp_path / "place") == {"old": "kept"}
    assert state(tmp_path) == {"place/new": "text", "place/sub/deep": "deep"}


def test_missing_parents_are_made_and_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    with new_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert state(tmp_path) == {"a/b/new": "text"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    def fill() -> None:
        with new_folder(old_folder(tmp_path)) as folder:
            (folder / "new").write_text("text")
            raise error

    with pytest.raises(error):
        fill()
    assert state(tmp_path) == {"place/old": "kept"}


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), KeyboardInterrupt()])
def test_a_second_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch, error):
    folder, rename, calls = old_folder(tmp_path), pathlib.Path.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", second_fails)
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_folder(folder, {"old": b"new"})
    assert calls[1:] == [folder, folder]
    assert state(tmp_path) == {"place/old": "kept"}


def test_every_file_and_folder_is_synced_before_the_move(tmp_path, monkeypatch):
    folder, fsync, synced = old_folder(tmp_path), os.fsync, []

    def note(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), state(tmp_path / "place")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with new_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "deep").write_text("deep")
    before = {path for path, at_place in synced if at_place == {"old": "kept"}}
    assert before == {str(temporary / name) for name in (".", "sub", "sub/deep")}
    assert synced[-1] == (str(tmp_path), {"sub/deep": "deep"})


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "place: no space left on the disk"),
        (errno.EDQUOT, ResourceError, "place: no space left on the disk"),
        (errno.EROFS, UserError, "place: cannot be written: Read-only file system"),
    ],
)
def test_what_the_system_refuses_is_said_of_the_place(tmp_path, number, kind, words):
    def fill() -> None:
        with new_folder(tmp_path / "place"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=words):
        fill()
    assert state(tmp_path) == {}


KILLED = """
import os, pathlib, shutil, signal, sys
from jaxpeft.files import folders

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

count = int(sys.argv[2])
rename, renamed = pathlib.Path.rename, []

def renaming(path, target):
    if len(renamed) == count:
        die()
    renamed.append(path)
    return rename(path, target)

pathlib.Path.rename = renaming
shutil.rmtree = die
if count < 0:
    folders._sync_tree = die
folders.write_folder(sys.argv[1], {"a": b"new", "b": b"new"})
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders whose writer was killed: before each rename, and before and after them."""
    found = {}
    for count in (-1, 0, 1, 2):
        root = tmp_path_factory.mktemp("killed")
        write_folder(root / "x", {"a": b"old"})
        command = [sys.executable, "-c", KILLED, str(root / "x"), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found[count] = root
    return found


@pytest.mark.parametrize("count", [-1, 0, 1, 2])
def test_the_next_writer_clears_away_what_a_killed_one_left_and_nothing_else(
    killed, tmp_path, count
):
    root = tmp_path / "root"
    shutil.copytree(killed[count], root)
    assert len(list(root.iterdir())) == 2
    mine = [".x.original", ".x.abcdefgh", ".x.abcdefgh.tmp.mine", ".y.abcdefgh.tmp"]
    for name in mine:
        (root / name).mkdir()
    (root / ".x.bcdefghi.tmp").write_text("a file")
    mine.append(".x.bcdefghi.tmp")
    remove_leftovers(root / "x")
    assert sorted(path.name for path in root.iterdir()) == sorted([*mine, "x"])
    assert (root / "x" / "a").read_bytes() == (b"new" if count == 2 else b"old")
    write_folder(root / "x", {"a": b"newer", "b": b""})
    assert sorted(path.name for path in root.iterdir()) == sorted([*mine, "x"])


def test_a_writer_that_still_lives_is_left_alone(tmp_path):
    with new_folder(tmp_path / "x") as first:
        (first / "a").write_text("first")
        write_folder(tmp_path / "x", {"a": b"second"})
        assert (first / "a").read_text() == "first"
    assert {path.name: path.read_text() for path in (tmp_path / "x").iterdir()} == {"a": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
