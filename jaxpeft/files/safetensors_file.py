"""Reads the header of a safetensors file: its tensors, and where their bytes lie."""

import struct

from jaxpeft.core import limits, strict_json
from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath
from jaxpeft.files.tensors import PLAIN_DTYPES, TensorInfo, expected_nbytes


def read_header(path: StoragePath) -> dict[str, TensorInfo]:
    """Reads the place of every tensor in a safetensors file.

    Raises:
        UserError: The file is something else or cut short, or its header is inconsistent.
    """
    size = storage.size(path)
    with path.open("rb") as file:
        start = file.read(64)
        if size < 8:
            raise UserError(f"{path}: {describe_bytes(start)}")
        (length,) = struct.unpack("<Q", start[:8])
        if start[8:9] not in (b"{", b"") or length > _PLAUSIBLE:
            raise UserError(f"{path}: {describe_bytes(start)}")
        if 8 + length > size:
            raise UserError(
                f"{path}: cut short: the header alone needs {8 + length} bytes, the file has "
                f"{size}; {_DOWNLOAD_AGAIN}"
            )
        limits.require_bytes(f"{path}: its header", length, limits.HEADER_BYTES)
        file.seek(8)
        text = file.read(length)
    try:
        header = strict_json.loads(text.decode("utf-8"))
        header.pop("__metadata__", None)
        tensors = {
            name: _tensor_info(path, 8 + length, name, entry) for name, entry in header.items()
        }
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: the safetensors header is damaged ({error}); {_DOWNLOAD_AGAIN}"
        ) from error
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if end != size:
        what = "cut short" if end > size else "longer than its header says"
        raise UserError(
            f"{path}: {what}: expected {end} bytes, the file has {size}; {_DOWNLOAD_AGAIN}"
        )
    _check_layout(path, 8 + length, tensors)
    return tensors


def describe_bytes(start: bytes, kind: str = "safetensors") -> str:
    """Describes a file that is not of the expected kind, and names the way out.

    Args:
        start: The first 64 bytes of the file.
        kind: The expected kind: "safetensors" or "GGUF".
    """
    text = start.lstrip().lower()
    if not start:
        return f"the file is empty; {_DOWNLOAD_AGAIN}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"this is a web page (HTML), not a {kind} file; download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-LFS pointer, not the file itself; `git lfs pull` fetches it"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            f"this is a pickle or zip archive, which is never opened here, not a {kind} file; "
            "convert it elsewhere"
        )
    if start.startswith(b"GGUF"):
        return "this is a GGUF file; give its path, with the ending .gguf, instead of the folder"
    if kind == "GGUF" and start[8:9] == b"{":
        return "this is a safetensors file, not a GGUF file; give the folder that holds it"
    if len(start) < 8:
        return f"the file has only {len(start)} bytes; {_DOWNLOAD_AGAIN}"
    return f"this is no {kind} file (it begins with {start[:8]!r}); {_DOWNLOAD_AGAIN}"


_DOWNLOAD_AGAIN = "download it again"
_PLAUSIBLE = 1 << 40  # a greater "length" is the start of another kind of file


def _tensor_info(path: StoragePath, base: int, name: str, entry: dict) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise UserError(f"{path}: {name}: bad shape or offsets in the header; {_DOWNLOAD_AGAIN}")
    if dtype in PLAIN_DTYPES and expected_nbytes(dtype, shape) != end - begin:
        raise UserError(
            f"{path}: {name}: {dtype} {list(shape)} needs {expected_nbytes(dtype, shape)} bytes, "
            f"the header gives it {end - begin}; {_DOWNLOAD_AGAIN}"
        )
    return TensorInfo(path, base + begin, end - begin, dtype, shape)


def _check_layout(path: StoragePath, base: int, tensors: dict[str, TensorInfo]) -> None:
    """Checks that tensors follow one another without overlaps or gaps, as the format requires."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise UserError(
                f"{path}: {name}: the header places it at byte {info.offset}, expected "
                f"{position}: tensors overlap or leave a hole; {_DOWNLOAD_AGAIN}"
            )
        position += info.nbytes
