"""The GGUF container: metadata and the places of tensors, read without the weights.

The header is parsed here and not by ``gguf.GGUFReader``, which makes several NumPy arrays per
token: 2.9 s and 180 MB for a vocabulary of 49 thousand, and far more for today's large ones. The
gguf package decodes block formats, see `jaxpeft.files.tensors.decode`.

Reference:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError
from jaxpeft.files.tensors import TensorInfo, expected_nbytes

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


def read_gguf(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Reads the metadata and the places of tensors in a GGUF file.

    Args:
        path: The file.

    Returns:
        Metadata by key (arrays of strings as lists, of numbers as NumPy arrays), and the place of
        every tensor by name.

    Raises:
        UserError: The file is something else, cut short, inconsistent, split over several files, or
            holds a tensor of an unsupported type.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start[:4] != b"GGUF":
            from jaxpeft.files.safetensors_file import describe_bytes

            raise UserError(f"{path}: {describe_bytes(start, 'GGUF')}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, entries, position = _Cursor(data).header()
            except _VersionError as error:
                raise UserError(f"{path}: {error}") from None
            except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{path}: the GGUF header is damaged or cut short ({error}); the file has "
                    f"{size} bytes; download it again"
                ) from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a split GGUF; merge them first "
            "with llama.cpp's `gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"{path}: general.alignment: expected a power of two, got {alignment!r}")
    base = -(-position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dims, kind, offset in entries:
        if name in tensors:
            raise UserError(f"{path}: tensor {name} is there twice; download it again")
        tensors[name] = _place(path, size, base, name, dims, kind, offset)
    return metadata, tensors


def _place(
    path: pathlib.Path, size: int, base: int, name: str, dims: list[int], kind: int, offset: int
) -> TensorInfo:
    from gguf import GGMLQuantizationType

    try:
        dtype = GGMLQuantizationType(kind).name
    except ValueError:
        dtype = f"number {kind}"
    if dtype not in SUPPORTED_TYPES:
        raise UserError(
            f"{path}: tensor {name} is of type {dtype}; supported: {', '.join(SUPPORTED_TYPES)}: "
            "take a file quantised that way, for example *.Q8_0.gguf"
        )
    shape = tuple(reversed(dims))
    if not dims or math.prod(dims) == 0:
        raise UserError(f"{path}: tensor {name} is empty, shape {list(shape)}")
    try:
        nbytes = expected_nbytes(dtype, shape)
    except ValueError as error:
        raise UserError(f"{path}: tensor {name} of shape {list(shape)}: {error}") from error
    if base + offset + nbytes > size:
        raise UserError(
            f"{path}: cut short: tensor {name} ends at byte {base + offset + nbytes}, the file has "
            f"{size}; download it again"
        )
    return TensorInfo(path, base + offset, nbytes, dtype, shape)


class _VersionError(Exception):
    """The file has another version of the format; downloading it again would not help."""


class _Cursor:
    """Walks over the header, and checks every length against the bytes that are left."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 4

    def header(self) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]], int]:
        version = self.number("I")
        if version not in (2, 3):
            order = "big-endian, " if version in (2 << 24, 3 << 24) else ""
            raise _VersionError(
                f"{order}GGUF version {version >> 24 if order else version} is not read, versions "
                "2 and 3 are, little-endian; convert the model with today's llama.cpp"
            )
        tensor_count, pair_count = self.number("Q"), self.number("Q")
        for what, count in (("tensors", tensor_count), ("keys", pair_count)):
            if count > limits.GGUF_ITEMS.most:
                raise ValueError(f"{count} {what} announced, at most {limits.GGUF_ITEMS.most:,}")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key!r} is given twice")
            metadata[key] = self.value(self.number("I"))
        entries = []
        for _ in range(tensor_count):
            name, count = self.string(), self.number("I")
            if count > _MAX_DIMS:
                raise ValueError(f"tensor {name!r} has {count} axes")
            dims = [self.number("Q") for _ in range(count)]
            entries.append((name, dims, self.number("I"), self.number("Q")))
        return metadata, entries, self.position

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes announced at byte {self.position}")
        if self.position + count > limits.GGUF_HEADER_BYTES.most:
            raise ValueError(f"more than {limits.GGUF_HEADER_BYTES.most:,} bytes of header")
        found = self.data[self.position : self.position + count]
        self.position += count
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if count > limits.GGUF_ITEMS.most:
                raise ValueError(
                    f"{count} entries announced at byte {self.position}, at most "
                    f"{limits.GGUF_ITEMS.most:,} are read"
                )
            if item == _STRING:
                if count * 8 > len(self.data) - self.position:
                    raise ValueError(f"{count} strings announced at byte {self.position}")
                return [self.string() for _ in range(count)]
            dtype = np.dtype("<" + self.scalar(item))
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return self.number(self.scalar(kind))

    @staticmethod
    def scalar(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        return _SCALARS[kind]
