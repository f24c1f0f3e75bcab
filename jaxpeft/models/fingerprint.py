"""The identity of base weights: sha256 over what the files hold, before any cast.

The rows of a matrix are cut into 256 parts, as even as whole rows allow (some are empty where there
are fewer rows); a vector is one part. Each part that is not empty is hashed. The hash of a tensor
covers its name, dtype, shape and the digests of its parts; the fingerprint covers the sorted hashes
of all tensors. It depends neither on shards nor on the order of reading, and processes that each
read some parts find it together.

Version 2. The first version, without a prefix, hashed chunks of 16 MiB, which processes that read
some rows each could not share; the two do not compare.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

PARTS = 256
VERSION = "v2:"


@dataclasses.dataclass
class _Tensor:
    """What is known of a tensor: digests by the number of the part, written as text for JSON."""

    dtype: str
    shape: tuple[int, ...]
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


class Fingerprint:
    """Collects digests of parts and gives their common hash."""

    def __init__(self):
        self._tensors: dict[str, _Tensor] = {}

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], digests: Mapping[int, str]
    ) -> None:
        """Adds parts of one tensor: hex digests by the number of the part."""
        tensor = self._tensors.setdefault(name, _Tensor(dtype, tuple(shape)))
        tensor.digests.update({str(part): digest for part, digest in digests.items()})

    def export(self) -> bytes:
        """What was added so far, for `merge` in another process."""
        tensors = {name: dataclasses.astuple(tensor) for name, tensor in self._tensors.items()}
        return json.dumps(tensors, separators=(",", ":")).encode()

    def merge(self, exported: bytes) -> list[str]:
        """Adds what another process has found.

        Returns:
            The names of tensors of which both have read a part, and found other bytes.
        """
        other = []
        for name, (dtype, shape, digests) in json.loads(exported).items():
            known = self._tensors.setdefault(name, _Tensor(dtype, tuple(shape))).digests
            if any(known.setdefault(part, digest) != digest for part, digest in digests.items()):
                other.append(name)
        return other

    def hexdigest(self) -> str:
        """The fingerprint of all tensors added so far, of each of which all parts are known."""
        hashes = []
        for name, tensor in self._tensors.items():
            edges = [part_rows(tensor.shape, part) for part in range(PARTS + 1)]
            parts = [str(part) for part in range(PARTS) if edges[part] < edges[part + 1]]
            digests = [tensor.digests[part] for part in parts]
            record = [name, tensor.dtype, list(tensor.shape), digests]
            text = json.dumps(record, separators=(",", ":"))
            hashes.append(hashlib.sha256(text.encode()).hexdigest())
        return VERSION + hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def part_rows(shape: tuple[int, ...], part: int) -> int:
    """The first row of a part of a tensor; part `PARTS` begins behind the last row."""
    rows = shape[0]
    return rows * part // PARTS if len(shape) > 1 else rows * min(part, 1)


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same version, so that other ones mean other weights."""
    return one.startswith(VERSION) == other.startswith(VERSION)
