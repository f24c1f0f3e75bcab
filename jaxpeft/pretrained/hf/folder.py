"""Reads Hugging Face folders: ``config.json`` and safetensors files, single or sharded.

The safetensors header is parsed here (8 bytes of length, then JSON), so that every fault is
reported with the name of its file: a page of HTML, a git-LFS pointer, a file cut short. Only
headers are read; the bytes of tensors stay on disk until `jaxpeft.pretrained.weights.reading` reads
them.
"""

import dataclasses
import pathlib
from typing import Any

from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files import other_folders, storage
from jaxpeft.files.json_file import read_json
from jaxpeft.files.safetensors_file import read_header
from jaxpeft.files.storage import StoragePath
from jaxpeft.files.tensors import TensorInfo
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.hf.config import config_from_hf
from jaxpeft.pretrained.weights.source import Source

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_folder_config(folder: StoragePath) -> ModelConfig:
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


def open_folder(folder: StoragePath) -> Source:
    """The config of a Hugging Face folder and the place of every tensor.

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


def _read_shards(folder: StoragePath, index: StoragePath) -> dict[str, TensorInfo]:
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


def _no_weights(folder: StoragePath) -> str:
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
