"""The compilation cache that all tests share, with the processes that they start.

JAX writes an entry in place. Where its writer is killed, the rest of the entry is missing, and JAX
warns at every use and never writes it again. So entries are checked before a run, each once: what
can be decompressed is whole, by the checksum in it.
"""

import concurrent.futures
import os
import pathlib

from places import ROOT

FOLDER = ROOT / ".venv" / "test-cache"
LIST = "checked.txt"
MOST_BYTES = 2 * 2**30
SETTINGS = {
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_COMPILATION_CACHE_DIR": str(FOLDER),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # else the folder's path is in every key
    # A process may read what another one is still writing; then it warns, and compiles.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache",
}
"""Variables of the environment, to be set before JAX is imported; child processes inherit them."""


def clean(folder: pathlib.Path = FOLDER, most_bytes: int = MOST_BYTES) -> None:
    """Removes torn entries, or all of them where they take more than `most_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    checked = folder / LIST
    known = set(checked.read_text().split("\n")) if checked.exists() else set()
    entries = set(folder.glob("*-cache"))
    if sum(_size(path) for path in entries) > most_bytes:
        torn = entries
    else:
        new = [path for path in entries if path.name not in known]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            torn = {path for path, ok in zip(new, pool.map(_is_whole, new), strict=True) if not ok}
    for path in torn:
        path.unlink(missing_ok=True)
    written = checked.with_suffix(f".{os.getpid()}")
    written.write_text("\n".join(sorted(path.name for path in entries - torn)))
    written.replace(checked)


def _size(entry: pathlib.Path) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # another run has removed it
        return 0


def _is_whole(entry: pathlib.Path) -> bool:
    from jax._src.compilation_cache import decompress_executable  # zlib or zstandard

    try:
        decompress_executable(entry.read_bytes())
    except Exception:  # of either's own kind
        return False
    return True
