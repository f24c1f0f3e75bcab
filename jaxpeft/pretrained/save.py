"""Writes Hugging Face model folders, which transformers and vLLM load.

Tensors are streamed to disk one layer at a time, so saving needs no second copy of the model. The
folder is written under a temporary name beside its place and moved there when it is complete.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import notes, paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.companions import TEMPLATES, is_companion
from jaxpeft.files.folders import new_folder, real_path
from jaxpeft.files.storage import StoragePath
from jaxpeft.files.tensors import PLAIN_DTYPES
from jaxpeft.mesh.processes import is_first, to_host
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.chat_settings import chat_of
from jaxpeft.methods.merging import merge
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.hf.config import config_to_hf
from jaxpeft.pretrained.load import DTYPES
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.saved_files import SavedFiles, files_for, join_settings, made_files
from jaxpeft.pretrained.weights.names import Entry, name_table, param_shapes
from jaxpeft.pretrained.weights.stacks import count_nonfinite

SHARD_BYTES = 5_000_000_000
_FILE_DTYPES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


def save_hf(
    path: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    tokenizer: Any = None,
    *,
    saved: SavedFiles | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Args:
        path: The folder to make; it may exist if it is empty.
        config: The architecture.
        params: Plain arrays, as from `jaxpeft.merge`. If a model with a tied table has a separate
            head, the head is written too, with ``tie_word_embeddings`` false.
        tokenizer: The tokenizer to put beside the weights; None writes none.
        saved: All files beside the weights, instead of `tokenizer`, and the base's settings.
        dtype: "float32", "bfloat16" or "float16"; None keeps each parameter's own.
        overwrite: Replace a model folder at `path`, once the new one is complete.
        shard_bytes: The largest number of bytes of weights in one file.

    Raises:
        UserError: Parameters do not fit `config` or are not finite, transformers cannot express
            the architecture, or `path` is taken or cannot be written.
        ResourceError: The disk is full.
    """
    require_place(path, overwrite=overwrite)
    if config.tie_embeddings and paths.get(params, paths.HEAD) is not None:
        config = dataclasses.replace(config, tie_embeddings=False)
    _check_params(config, params)
    leaves = paths.flatten(params)
    settings = config_to_hf(config)
    settings["dtype"] = dtype or str(leaves["embed_tokens/embedding"].dtype)
    saved = made_files(config, tokenizer) if saved is None else saved
    if not is_first():
        _help_to_gather(config, leaves)
        return
    with new_folder(path, last="config.json") as folder:
        _write_weights(folder, config, leaves, dtype, shard_bytes)
        for name, content in saved.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        _write_json(folder / "config.json", join_settings(settings, saved.settings))


def require_place(
    path: str | os.PathLike, *, overwrite: bool = False, source: str | os.PathLike | None = None
) -> None:
    """Checks whether a model folder may be made at `path`, before any work is done for it.

    Args:
        path: The folder to make.
        overwrite: Whether a model folder there may be replaced.
        source: The place that the model was loaded from; it is never replaced.

    Raises:
        UserError: `path` is the source, a file, a folder with other files than a model's, or a
            model folder that may not be replaced.
    """
    place = real_path(path)
    if not storage.exists(place):
        return
    if same_folder(source, place):
        raise UserError(
            f"{place}: is the model that is read, which saving would remove; choose another folder"
        )
    with storage.explained(place):
        ours = place.is_dir() and _is_ours(place)
    if not ours:
        raise UserError(f"{place}: exists and is no saved model; choose a new or empty folder")
    if not overwrite and any(place.iterdir()):
        raise UserError(
            f"{place}: holds a model already; choose another folder, or replace it with "
            "--overwrite (overwrite=True)"
        )


def same_folder(source: str | os.PathLike | None, place: StoragePath) -> bool:
    """Whether a model was loaded from `place`; a source that is no folder is a hub id."""
    if source is None:
        return False
    if storage.is_remote(source) or storage.is_remote(place):
        return os.fspath(source).rstrip("/") == os.fspath(place).rstrip("/")
    origin = storage.expanded(source)
    return storage.exists(place) and origin.exists() and origin.samefile(place)


def _check_params(config: ModelConfig, params: dict) -> None:
    wanted = param_shapes(config)
    found = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params).items()}
    faults = [
        *(f"{path} is missing" for path in wanted.keys() - found.keys()),
        *(f"{path} is unexpected" for path in found.keys() - wanted.keys()),
        *(
            f"{path} is {list(found[path])}, expected {list(shape)}"
            for path, shape in wanted.items()
            if found.get(path, shape) != shape
        ),
    ]
    if faults:
        raise UserError(f"parameters do not fit the config: {first_few(sorted(faults))}")


def _write_weights(
    folder: pathlib.Path,
    config: ModelConfig,
    leaves: dict[str, Any],
    dtype: str | None,
    shard_bytes: int,
) -> None:
    shards: list[list[tuple[Entry, int, str, np.dtype]]] = [[]]
    sizes = [0]
    for entry in name_table(config):
        target = jnp.dtype(dtype) if dtype else jnp.dtype(leaves[entry.path].dtype)
        if target not in _FILE_DTYPES:
            raise UserError(f"{entry.path}: dtype {target.name} has no place in a model folder")
        nbytes = math.prod(entry.shape) * target.itemsize
        for layer, name in enumerate(entry.file_names("hf", config.num_layers)):
            if shards[-1] and sizes[-1] + nbytes > shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((entry, layer, name, target))
            sizes[-1] += nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, leaves, shard)
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for _, _, name, _ in shard
        }
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map},
        )


def _write_shard(
    path: pathlib.Path, leaves: dict[str, Any], shard: list[tuple[Entry, int, str, np.dtype]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry, _, name, dtype in shard:
        end = position + math.prod(entry.shape) * dtype.itemsize
        header[name] = {
            "dtype": _FILE_DTYPES[dtype],
            "shape": list(entry.file_shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry, layer, name, dtype in shard:
            leaf = leaves[entry.path]
            value = to_host(_layer(leaf, layer) if entry.stacked else leaf)
            with np.errstate(over="ignore"):  # counted below
                value = value.astype(dtype, copy=False)
            if bad := count_nonfinite(value):
                raise UserError(
                    f"{name}: {bad} of {value.size} values are not finite as {dtype.name}; "
                    "nothing was saved"
                )
            value = np.ascontiguousarray(value.T if entry.transposed else value)
            file.write(value.reshape(-1).view(np.uint8).data)


def _help_to_gather(config: ModelConfig, leaves: dict[str, Any]) -> None:
    """Takes part, in the same order, in the gathering of whole arrays by the first process."""
    for entry in name_table(config):
        leaf = leaves[entry.path]
        for layer, _ in enumerate(entry.file_names("hf", config.num_layers)):
            to_host(_layer(leaf, layer) if entry.stacked else leaf)


def _layer(leaf: Any, layer: int) -> Any:
    """One layer as a separate array, so that no host copy of the whole leaf is kept."""
    if isinstance(leaf, np.ndarray):
        return leaf[layer]
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _is_ours(place: StoragePath) -> bool:
    """Whether a folder is empty or holds only the files of a Hugging Face model."""
    return all(
        _is_model_file(child)
        if child.is_file()
        else child.name == TEMPLATES
        and all(
            file.is_file() and is_companion(f"{TEMPLATES}/{file.name}") for file in child.iterdir()
        )
        for child in place.iterdir()
    )


def _is_model_file(file: StoragePath) -> bool:
    return (
        file.suffix == ".safetensors"
        or file.name in ("config.json", "model.safetensors.index.json")
        or is_companion(file.name)
        # Files that earlier versions of transformers may have written beside them.
        or file.name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab"))
    )


def save_model(
    path: str,
    base: Model,
    *,
    adapter: Adapter | Sequence[Adapter] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder that transformers loads.

    If the base was loaded from such a folder, the files of its tokenizer, its generation settings
    and the further keys of its ``config.json`` are copied unchanged, with two exceptions. If the
    adapter learned to end its turns with other tokens, generation stops at those too, which is
    reported on standard error. And a chat template that overrides the base's replaces it.

    Args:
        path: The folder to make; it may exist if it is empty.
        base: The model.
        adapter: Merged into the weights if given; `base` itself is not changed.
        dtype: Dtype of the saved weights: "float32", "bfloat16" or "float16"; None keeps the
            base's.
        overwrite: Replace a model folder at `path`, once the new one is complete (in a bucket the
            old one is removed first). The folder that `base` was loaded from is never replaced.

    Raises:
        UserError: The dtype is unknown, the adapter cannot be merged, a file of the base is a link
            out of its folder, or `path` is taken or cannot be written.
        ResourceError: The disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    require_place(path, overwrite=overwrite, source=base.name or None)
    saved = files_for(base, chat_of(adapter))
    params = base.params if adapter is None else merge(base.params, adapter)
    save_hf(path, base.config, params, saved=saved, dtype=dtype, overwrite=overwrite)
    if is_first():
        for text in saved.notes:
            notes.note(text)
