"""The compilation cache of the tests holds whole entries at the start of a run."""

import zlib

import compiled_programs
import pytest


@pytest.fixture
def entries(tmp_path):
    """Writes entries as JAX does; their paths by name."""

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / f"{name}-cache").write_bytes(content)

    return write


def names(folder):
    return {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}


def test_entries_whose_writer_was_killed_are_removed(tmp_path, entries, monkeypatch):
    monkeypatch.setattr("jax._src.compilation_cache.decompress_executable", zlib.decompress)
    whole = zlib.compress(bytes(range(256)) * 100)
    entries(whole=whole, torn=whole[:-1], half=whole[: len(whole) // 2], empty=b"")
    compiled_programs.clean(tmp_path)
    assert names(tmp_path) == {"whole"}
    entries(later=whole[:-1], other=whole)
    compiled_programs.clean(tmp_path)
    assert names(tmp_path) == {"whole", "other"}


def test_what_jax_writes_is_kept(tmp_path, entries):
    from jax._src.compilation_cache import compress_executable

    entries(whole=compress_executable(bytes(1000)), torn=compress_executable(bytes(1000))[:-3])
    compiled_programs.clean(tmp_path)
    assert names(tmp_path) == {"whole"}


def test_an_entry_is_read_once(tmp_path, entries, monkeypatch):
    read = []
    monkeypatch.setattr("jax._src.compilation_cache.decompress_executable", read.append)
    entries(first=b"1", second=b"2")
    compiled_programs.clean(tmp_path)
    assert sorted(read) == [b"1", b"2"]
    entries(third=b"3")
    compiled_programs.clean(tmp_path)
    assert sorted(read) == [b"1", b"2", b"3"]


def test_a_folder_that_has_grown_too_large_is_emptied(tmp_path, entries):
    entries(a=bytes(60), b=bytes(60))
    compiled_programs.clean(tmp_path, most_bytes=100)
    assert names(tmp_path) == set()
