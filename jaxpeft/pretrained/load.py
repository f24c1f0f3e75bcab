"""Loads models from a folder, a hub id or a GGUF file: architecture, weights, tokenizer."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.backend import choices
from jaxpeft.core.errors import UserError
from jaxpeft.core.foreign_names import dtype_advice
from jaxpeft.mesh.layouts import Layout
from jaxpeft.mesh.processes import spans_processes, together
from jaxpeft.models.config import ModelConfig
from jaxpeft.ops.quant import check_quant_type
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.weights.names import name_table
from jaxpeft.pretrained.weights.params import check_tensors, read_params
from jaxpeft.pretrained.weights.source import Source

DTYPES = ("float32", "bfloat16", "float16")


def load_model_config(path: str | os.PathLike, revision: str | None = None) -> ModelConfig:
    """The architecture of a model, without its weights.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: Nothing is there, or the model is not supported or inconsistent.
    """
    from jaxpeft.files import locate
    from jaxpeft.pretrained.gguf import reader
    from jaxpeft.pretrained.hf import folder

    place = locate.locate(path, revision, weights=False)
    if place.suffix == ".gguf":
        return reader.read_gguf_config(place)
    return folder.read_folder_config(place)


def load_tokenizer(path: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a model, as a transformers fast tokenizer.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: Nothing is there, or this library cannot build the tokenizer.
    """
    from jaxpeft.files import locate
    from jaxpeft.pretrained import tokenizer

    return tokenizer.read_tokenizer(locate.locate(path, revision, weights=False))


def check_weights(path: str | os.PathLike, revision: str | None = None) -> None:
    """Checks from headers alone whether a model can be loaded; no weights are read.

    All processes of a run must call it.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: A file is missing, cut short or something else, or tensors are missing,
            unexpected or have another shape. Wrong values are found only when they are read.
    """

    def check() -> None:
        source, _ = _open(path, revision)
        check_tensors(source, name_table(source.config))

    together(check)


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
        dtype: "float32", "bfloat16" or "float16"; None keeps the stored dtype (block-quantised
            tensors become float32).
        mesh: Devices to spread the parameters over, or a `jaxpeft.mesh.layouts.Layout`; None for
            the default device.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers, see
            `jaxpeft.ops.quant`; None for none.
        double_quantization: Quantise their scales to 8 bits too.

    Returns:
        The nested parameter dict, the config, the tokenizer (None if there are no tokenizer
        files), and the fingerprint of the source tensors.

    Raises:
        UserError: A tensor or setting is missing, unexpected, damaged, of another shape, not
            finite or not supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}{dtype_advice(dtype)}")
    check_quant_type(quantization, double_quantization)
    shared = spans_processes(mesh)
    source, found = together(functools.partial(_open, path, revision), shared)
    quantized = None if quantization is None else (quantization, double_quantization)
    loaded = read_params(source, dtype, mesh, quantized)
    return loaded.params, source.config, found, loaded.fingerprint


def load_model(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    compute_dtype: str = "auto",
    mesh: jax.sharding.Mesh | Layout | None = None,
    quantization: str | None = None,
    double_quantization: bool = False,
) -> Model:
    """A model ready to call: parameters, module, tokenizer.

    Args:
        path: A Hugging Face folder, on disk or in a bucket, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.
        dtype: Dtype of the parameters: "float32", "bfloat16", "float16", or None for the stored
            one.
        compute_dtype: Dtype of the activations; "auto" is float32 on CPU and `dtype` elsewhere. In
            bfloat16 on CPU there are first derivatives only, see `jaxpeft.ops.products`.
        mesh: Devices to spread the parameters over, or a `jaxpeft.mesh.layouts.Layout`; None for
            the default device.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers, tensor by tensor while
            they are read; None for none.
        double_quantization: Quantise their scales to 8 bits too.

    Returns:
        The model.

    Raises:
        UserError: A tensor or setting is missing, unexpected, damaged, of another shape, not
            finite or not supported.
    """
    if compute_dtype not in ("auto", *DTYPES):
        raise UserError(f"compute_dtype: {compute_dtype!r} is not one of auto, {', '.join(DTYPES)}")
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


def activation_dtype(compute_dtype: str, params: dict) -> np.dtype:
    """The dtype of activations: "auto" is float32 on CPU, and the embedding's dtype elsewhere."""
    if compute_dtype != "auto":
        return jnp.dtype(compute_dtype)
    if choices().float32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(params["embed_tokens"]["embedding"].dtype)


def _open(path: str | os.PathLike, revision: str | None) -> tuple[Source, Any]:
    """The places of the tensors, and the tokenizer if there is one; no weights are read."""
    from jaxpeft.files import locate
    from jaxpeft.pretrained import tokenizer
    from jaxpeft.pretrained.gguf import reader
    from jaxpeft.pretrained.hf import folder

    place = locate.locate(path, revision, weights=True)
    source = reader.open_gguf(place) if place.suffix == ".gguf" else folder.open_folder(place)
    found = tokenizer.read_tokenizer(place) if tokenizer.has_tokenizer(place) else None
    if found is not None and len(found) > source.config.vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {len(found)} tokens, the embedding only "
            f"{source.config.vocab_size} rows; these files belong to different models"
        )
    return source, found
