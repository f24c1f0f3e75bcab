"""Weights from files into a parameter tree, one tensor at a time.

A stacked parameter is one ``(layers, d_in, d_out)`` host buffer in the target dtype, filled layer
by layer (hashed, decoded, transposed, cast), handed to the device and dropped. Host memory holds
the parameters loaded so far where the device is the host, one stacked parameter, and one layer.
"""

import contextlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import storage
from jaxpeft.backend import choices
from jaxpeft.errors import UserError, first_few
from jaxpeft.models.config import ModelConfig
from jaxpeft.models.fingerprint import Fingerprint, read_hashed
from jaxpeft.models.names import Entry, name_table
from jaxpeft.models.source import PLAIN_DTYPES, Source, TensorInfo
from jaxpeft.models.stacks import PlainStack, QuantStack, fill
from jaxpeft.quant import check_kind, is_quantised
from jaxpeft.sharding import Layout, as_layout, leaf_sharding
from jaxpeft.storage import Place

DTYPES = ("float32", "bfloat16", "float16")


def load_config(path: str | os.PathLike, revision: str | None = None) -> ModelConfig:
    """The architecture of a model, without its weights.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: Nothing there, or an unsupported or inconsistent model.
    """
    from jaxpeft.models import gguf, hf, locate

    place = locate.locate(path, revision, weights=False)
    if place.suffix == ".gguf":
        return gguf.read_gguf_config(place)
    return hf.read_folder_config(place)


def load_tokenizer(path: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a model, as a transformers fast tokenizer.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: Nothing there, or a tokenizer this library cannot build.
    """
    from jaxpeft.models import locate, tokenizer

    return tokenizer.read_tokenizer(locate.locate(path, revision, weights=False))


def load_params(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    mesh: jax.sharding.Mesh | Layout | None = None,
    quantization: str | None = None,
    double_quantization: bool = False,
) -> tuple[dict, ModelConfig, Any, str]:
    """Weights, architecture, tokenizer and fingerprint of a model.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.
        dtype: "float32", "bfloat16" or "float16"; None keeps what is stored (block-quantised
            tensors become float32).
        mesh: Devices to spread the parameters over, or a `jaxpeft.sharding.Layout`; default: the
            default device.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers, see
            `jaxpeft.quant`; None for none.
        double_quantization: Quantise their scales to 8 bits too.

    Returns:
        The nested parameter dict, the config, the tokenizer (None where the folder has no
        tokenizer files), and the fingerprint of the source tensors.

    Raises:
        UserError: Anything missing, extra, misshapen, damaged, non-finite or unsupported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}, or none")
    check_kind(quantization, double_quantization)
    from jaxpeft.models import gguf, hf, locate, tokenizer

    place = locate.locate(path, revision, weights=True)
    source = gguf.open_gguf(place) if place.suffix == ".gguf" else hf.open_folder(place)
    found = tokenizer.read_tokenizer(place) if tokenizer.has_tokenizer(place) else None
    if found is not None and len(found) > source.config.vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {len(found)} tokens, the embedding only "
            f"{source.config.vocab_size} rows; these files belong to different models"
        )
    quantized = None if quantization is None else (quantization, double_quantization)
    params, fingerprint = read_params(source, dtype, mesh, quantized)
    return params, source.config, found, fingerprint


def load_model(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    compute_dtype: str = "auto",
    mesh: jax.sharding.Mesh | Layout | None = None,
    quantization: str | None = None,
    double_quantization: bool = False,
) -> Any:
    """A model ready to call: parameters, module, tokenizer.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.
        dtype: Of the parameters: "float32", "bfloat16", "float16", or None for as stored.
        compute_dtype: Of the activations; "auto" is float32 on CPU and `dtype` elsewhere.
        mesh: Devices to spread the parameters over, or a `jaxpeft.sharding.Layout`; default: the
            default device.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers, tensor by tensor while
            they are read; None for none.
        double_quantization: Quantise their scales to 8 bits too.

    Returns:
        A `jaxpeft.Model`.

    Raises:
        UserError: Anything missing, extra, misshapen, damaged, non-finite or unsupported.
    """
    if compute_dtype not in ("auto", *DTYPES):
        raise UserError(f"compute_dtype: {compute_dtype!r} is not one of auto, {', '.join(DTYPES)}")
    from jaxpeft.model import Model
    from jaxpeft.models.transformer import Transformer

    params, config, tokenizer, fingerprint = load_params(
        path,
        revision=revision,
        dtype=dtype,
        mesh=mesh,
        quantization=quantization,
        double_quantization=double_quantization,
    )
    return Model(
        params=params,
        config=config,
        module=Transformer(config, activation_dtype(compute_dtype, params)),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        name=str(path),
        revision=revision or "",
    )


def activation_dtype(compute_dtype: str, params: dict) -> Any:
    """The dtype of activations: "auto" is float32 on CPU, elsewhere that of the embedding."""
    if compute_dtype != "auto":
        return jnp.dtype(compute_dtype)
    if choices().float32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(params["embed_tokens"]["embedding"].dtype)


def read_params(
    source: Source,
    dtype: str | None = "float32",
    mesh: jax.sharding.Mesh | Layout | None = None,
    quantization: tuple[str, bool] | None = None,
) -> tuple[dict, str]:
    """Reads every tensor of `source` into a nested parameter dict.

    Args:
        source: Where the tensors lie.
        dtype: Target dtype; None keeps what is stored.
        mesh: Devices to spread the parameters over, or a layout.
        quantization: Kind of the layers' kernels, and whether scales are quantised too.

    Returns:
        The parameters and the fingerprint of the tensors read.

    Raises:
        UserError: Missing, extra, misshapen or non-finite tensors, or a file that ends early.
    """
    table = name_table(source.config)
    check_tensors(source, table)
    fingerprint = Fingerprint()
    layout = None if mesh is None else as_layout(mesh, source.config)
    params: dict = {}
    with contextlib.ExitStack() as stack:
        files = _OpenFiles(stack)
        _check_tied_head(source, files)
        for entry in table:
            host = _read_entry(source, entry, dtype, quantization, files, fingerprint)
            leaf = _put(entry.path, host, layout)
            del host
            *parents, last = entry.path.split("/")
            node = params
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = leaf
    return params, fingerprint.hexdigest()


def check_tensors(source: Source, table: tuple[Entry, ...]) -> None:
    """Compares the names, shapes and dtypes of `source` with what its config needs.

    Raises:
        UserError: Lists everything missing, extra, misshapen or of another dtype.
    """
    wanted = {
        name: entry.file_shape
        for entry in table
        for name in entry.file_names(source.style, source.config.num_layers)
    }
    missing = [name for name in wanted if name not in source.tensors]
    extra = [n for n in source.tensors if n not in wanted and n not in source.ignored]
    shapes = [
        f"{name} is {list(source.tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    dtypes = [
        f"{name} is {source.tensors[name].dtype}"
        for name in wanted
        if source.style == "hf"
        and name in source.tensors
        and source.tensors[name].dtype not in PLAIN_DTYPES
    ]
    faults = [
        f"{len(items)} {what}: {first_few(items)}"
        for what, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
            (f"of an unsupported dtype (supported: {', '.join(PLAIN_DTYPES)})", dtypes),
        )
        if items
    ]
    if faults:
        raise UserError(
            f"{source.path}: tensors do not fit the {source.config.model_type} config; "
            + "; ".join(faults)
        )


def _read_entry(
    source: Source,
    entry: Entry,
    dtype: str | None,
    quantization: tuple[str, bool] | None,
    files: "_OpenFiles",
    fingerprint: Fingerprint,
) -> Any:
    """One parameter of ours in host memory, layers stacked: an array, or codes and scales."""
    names = entry.file_names(source.style, source.config.num_layers)
    infos = [source.tensors[name] for name in names]
    target = jnp.dtype(dtype) if dtype else _stored_dtype(infos)
    layers = len(names) if entry.stacked else None
    if quantization is not None and is_quantised(entry.path):
        stack = QuantStack(entry.shape, layers, target, *quantization)
    else:
        stack = PlainStack(entry.shape, layers, target)
    for layer, (name, info) in enumerate(zip(names, infos, strict=True)):
        raw, digests = files.read(info)
        fingerprint.add(name, info.dtype, info.shape, digests)
        heads = entry.heads if source.interleaved else 0
        bad = fill(stack.buffer(layer), raw, info, entry.transposed, heads)
        if bad:
            raise UserError(
                f"{info.file}: {name}: {bad} of {math.prod(info.shape)} values are not finite "
                f"as {target.name}; the weights are damaged, or too large for this dtype"
            )
        stack.done(layer)
    return stack.result


def _stored_dtype(infos: list[TensorInfo]) -> np.dtype:
    stored = {PLAIN_DTYPES.get(info.dtype, np.dtype(np.float32)) for info in infos}
    return stored.pop() if len(stored) == 1 else np.dtype(np.float32)


def _put(path: str, host: Any, layout: Layout | None) -> Any:
    """Copies to the device; the copy is the device's own, so donation stays possible."""
    if layout is None:
        return jax.block_until_ready(jax.device_put(host, may_alias=False))

    def place(array: np.ndarray, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.block_until_ready(jax.tree.map(place, host, leaf_sharding(path, host, layout)))


def _check_tied_head(source: Source, files: "_OpenFiles") -> None:
    """A head stored although tied must be the embedding, byte for byte."""
    head, table = source.tensors.get("lm_head.weight"), "model.embed_tokens.weight"
    if "lm_head.weight" not in source.ignored or head is None:
        return
    embedding = source.tensors[table]
    if head == embedding or files.read(head)[1] == files.read(embedding)[1]:
        return
    raise UserError(
        f"{head.file}: lm_head.weight differs from {table} although config.json says "
        '"tie_word_embeddings": true; set it to false if the model has its own head'
    )


class _OpenFiles:
    """Files, opened once and closed by the caller's stack."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self._files: dict[Place, storage.Ranges] = {}

    def read(self, info: TensorInfo) -> tuple[np.ndarray, list[str]]:
        if info.file not in self._files:
            file = storage.Ranges(info.file)
            self._stack.callback(file.close)
            self._files[info.file] = file
        try:
            return read_hashed(self._files[info.file], info.offset, info.nbytes)
        except EOFError as error:
            raise UserError(f"{info.file}: cut short while reading: {error}") from error
