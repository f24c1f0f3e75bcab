"""Hugging Face folders read: ``config.json`` and safetensors files, single or sharded.

The safetensors header is parsed here (8 bytes of length, then JSON), so that every fault is told
with the name of its file: a page of HTML, a git-LFS pointer, a file cut short. Only headers are
read; the bytes of tensors stay on disk until `jaxpeft.pretrained.weights.reading` asks for them.
"""

import dataclasses
import json
import pathlib
import struct
from typing import Any

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files import other_folders, storage
from jaxpeft.files.storage import Place
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.hf.config import config_from_hf
from jaxpeft.pretrained.weights.source import PLAIN_DTYPES, Source, TensorInfo, expected_nbytes

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_folder_config(folder: Place) -> ModelConfig:
    """The architecture in ``config.json``, with the end tokens of ``generation_config.json``.

    Raises:
        UserError: A file is missing, no JSON object, or describes something unsupported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: file not found; a Hugging Face model folder has one")
    config = config_from_hf(read_json(path), str(path))
    extra = folder / "generation_config.json"
    if not extra.is_file():
        return config
    eos = read_json(extra).get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in eos:
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise UserError(
                f"{extra}: eos_token_id: expected token ids below {config.vocab_size}, "
                f"got {token!r}"
            )
    ids = tuple(dict.fromkeys((*config.eos_token_ids, *eos)))
    return dataclasses.replace(config, eos_token_ids=ids)


def open_folder(folder: Place) -> Source:
    """The config and every tensor's place in a Hugging Face folder.

    Raises:
        UserError: The folder's files are missing, damaged or contradict each other.
    """
    config = read_folder_config(folder)
    tensors: dict[str, TensorInfo] = {}
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        tensors = read_header(single)
    elif index.is_file():
        tensors = _read_shards(folder, index)
    else:
        raise UserError(f"{folder}: {_no_weights(folder)}")
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in tensors:
        ignored.add("lm_head.weight")
    return Source(
        path=folder, config=config, tensors=tensors, style="hf", ignored=frozenset(ignored)
    )


def read_header(path: Place) -> dict[str, TensorInfo]:
    """Every tensor's place in one safetensors file.

    Raises:
        UserError: The file is something else, cut short, or its header is inconsistent.
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
        header = json.loads(text, object_pairs_hook=_no_doubles)
        header.pop("__metadata__", None)
        tensors = {
            name: _tensor_info(path, 8 + length, name, entry) for name, entry in header.items()
        }
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    """Says in words what a file is that begins with `start`, and the way out.

    Args:
        start: Its first 64 bytes.
        kind: What it should be: "safetensors" or "GGUF".
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


def read_json(path: Place) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: Not UTF-8, not JSON, not an object, or a key given twice.
        StoreError: The store refuses or does not answer.
    """
    try:
        limits.require_bytes(path, storage.size(path), limits.JSON_BYTES)
        text = storage.read_bytes(path).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_doubles)
    except json.JSONDecodeError as error:
        text = "the file is empty" if not storage.size(path) else f"not valid JSON: {error.msg}"
        raise UserError(f"{path}:{error.lineno}:{error.colno}: {text}") from error
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


_DOWNLOAD_AGAIN = "download it again"
_PLAUSIBLE = 1 << 40  # a length beyond it is no length, but the start of another file


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} is given twice")
    return found


def _tensor_info(path: Place, base: int, name: str, entry: dict) -> TensorInfo:
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


def _check_layout(path: Place, base: int, tensors: dict[str, TensorInfo]) -> None:
    """Tensors must follow one another without overlaps or holes, as the format says."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise UserError(
                f"{path}: {name}: the header places it at byte {info.offset}, expected "
                f"{position}: tensors overlap or leave a hole; {_DOWNLOAD_AGAIN}"
            )
        position += info.nbytes


def _read_shards(folder: Place, index: Place) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: expected an object from tensor to file name")
    for name, file in weight_map.items():
        if not _is_shard_name(file):
            raise UserError(
                f"{index}: weight_map: {name}: {file!r} is not a file name inside the folder "
                "(expected *.safetensors)"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} of {len(files)} shards are not there: {first_few(missing)}; "
            "download them into the folder"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found = read_header(folder / file)
        listed = {name for name, place in weight_map.items() if place == file}
        if found.keys() != listed:
            raise UserError(
                f"{folder / file}: its tensors are not those the index lists; "
                f"missing: {first_few(sorted(listed - found.keys())) or 'none'}; "
                f"not listed: {first_few(sorted(found.keys() - listed)) or 'none'}"
            )
        tensors |= found
    return tensors


def _is_shard_name(file: Any) -> bool:
    return (
        isinstance(file, str)
        and pathlib.PurePath(file).name == file
        and file.endswith(".safetensors")
        and not storage.problem_of(file)
    )


def _no_weights(folder: Place) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    found = "" if storage.is_remote(folder) else other_folders.no_weights(pathlib.Path(folder))
    if found:
        return found
    if pickles:
        return (
            f"no safetensors, only {first_few(pickles)}; pickles can run code and are never "
            "opened: convert them elsewhere, with `save_pretrained(..., "
            "safe_serialization=True)` of transformers"
        )
    return "no weights: expected model.safetensors or model.safetensors.index.json"
