"""The identity of base weights: a sha256 over the content of the files, before any cast.

The rows of a matrix are cut into 1024 parts if it holds 4 Mi numbers or more, else into 256, as
evenly as whole rows allow (some are empty if there are fewer rows); a vector is one part. Processes
read whole parts: many parts make even shares, but cost time in small matrices. Each part that is
not empty is hashed. The hash of a tensor covers its name, dtype, shape and the digests of its
parts; the fingerprint covers the sorted hashes of all tensors. It depends neither on shards nor on
the order of reading, and processes that each read some parts compute it together.

This is version 2. The first version, without a prefix, hashed chunks of 16 MiB, which processes
that each read some rows could not share. The two versions cannot be compared.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping

VERSION = "v2:"
_LARGE = 4 << 20  # numbers


@dataclasses.dataclass
class _Tensor:
    """The known digests of a tensor, by the number of the part, written as text for JSON."""

    dtype: str
    shape: tuple[int, ...]
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


class Fingerprint:
    """Collects digests of parts and computes their common hash."""

    def __init__(self):
        self._tensors: dict[str, _Tensor] = {}

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], digests: Mapping[int, str]
    ) -> None:
        """Adds parts of one tensor: hex digests by the number of the part."""
        tensor = self._tensors.setdefault(name, _Tensor(dtype, tuple(shape)))
        tensor.digests.update({str(part): digest for part, digest in digests.items()})

    def export(self) -> bytes:
        """Everything added so far, for `merge` in another process."""
        tensors = {name: dataclasses.astuple(tensor) for name, tensor in self._tensors.items()}
        return json.dumps(tensors, separators=(",", ":")).encode()

    def merge(self, exported: bytes) -> list[str]:
        """Adds the digests that another process has found.

        Returns:
            The names of tensors of which both processes read a part and found different bytes.
        """
        other = []
        for name, (dtype, shape, digests) in json.loads(exported).items():
            known = self._tensors.setdefault(name, _Tensor(dtype, tuple(shape))).digests
            if any(known.setdefault(part, digest) != digest for part, digest in digests.items()):
                other.append(name)
        return other

    def hexdigest(self) -> str:
        """The fingerprint of all tensors added so far; all parts of each must be known."""
        hashes = []
        for name, tensor in self._tensors.items():
            edges = [part_rows(tensor.shape, part) for part in range(num_parts(tensor.shape) + 1)]
            full = [part for part, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]
            digests = [tensor.digests[str(part)] for part in full]
            record = [name, tensor.dtype, list(tensor.shape), digests]
            text = json.dumps(record, separators=(",", ":"))
            hashes.append(hashlib.sha256(text.encode()).hexdigest())
        return VERSION + hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def num_parts(shape: tuple[int, ...]) -> int:
    """The number of parts into which the rows of a tensor are cut."""
    if len(shape) < 2:
        return 1
    return 1024 if math.prod(shape) >= _LARGE else 256


def part_rows(shape: tuple[int, ...], part: int) -> int:
    """The first row of a part of a tensor, or the number of rows for the part after the last."""
    return shape[0] * part // num_parts(shape)


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints have the same version; only then they can be compared."""
    return one.startswith(VERSION) == other.startswith(VERSION)
