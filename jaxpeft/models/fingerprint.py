"""The identity of base weights: sha256 over what the files hold, before any cast.

A tensor is hashed in chunks of 16 MiB; its hash covers its name, dtype, shape and the digests of
its chunks; the fingerprint covers the sorted hashes of all tensors. The tree lets processes share
the work, and the result depends neither on shards nor on the order of reading.
"""

import hashlib
import json

import numpy as np

from jaxpeft.storage import Ranges

CHUNK_BYTES = 16 * 2**20


class Fingerprint:
    """Collects tensors and gives their common hash."""

    def __init__(self):
        self._tensors: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], chunks: list[str]) -> None:
        """Adds one tensor by the hex digests of its chunks."""
        text = json.dumps([name, dtype, list(shape), chunks], separators=(",", ":"))
        self._tensors[name] = hashlib.sha256(text.encode()).hexdigest()

    def hexdigest(self) -> str:
        """The fingerprint of all tensors added so far."""
        lines = "\n".join(sorted(self._tensors.values()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_hashed(file: Ranges, offset: int, nbytes: int) -> tuple[np.ndarray, list[str]]:
    """Reads bytes of a file once, hashing every chunk on the way.

    Args:
        file: Where to read.
        offset: Where to start in the file.
        nbytes: How much to read.

    Returns:
        The bytes as uint8, and the hex digest of every chunk.

    Raises:
        EOFError: The file ends too early.
    """
    buffer = np.empty(nbytes, np.uint8)
    view = buffer.data
    digests = []
    for start in range(0, nbytes, CHUNK_BYTES):
        chunk = view[start : start + CHUNK_BYTES]
        done = 0
        while done < len(chunk):
            count = file.read_into(chunk[done:], offset + start + done)
            if count == 0:
                raise EOFError(f"file ends {nbytes - start - done} bytes early")
            done += count
        digests.append(hashlib.sha256(chunk).hexdigest())
    return buffer, digests
