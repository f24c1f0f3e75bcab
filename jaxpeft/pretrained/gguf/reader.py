"""Reads GGUF files as models: llama.cpp's metadata as a config, its tensors as a `Source`.

Mistral models have the architecture "llama", which has no sliding window.
"""

import math
import pathlib
from typing import Any

import numpy as np

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError
from jaxpeft.files.tensors import TensorInfo, decode
from jaxpeft.models.config import ModelConfig, RopeScaling
from jaxpeft.models.rope import frequencies
from jaxpeft.pretrained.gguf.file import read_gguf
from jaxpeft.pretrained.hf.config import check_config
from jaxpeft.pretrained.weights.source import Source

SUPPORTED = ("llama", "qwen2", "qwen3")
OURS = {
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
}
"""Names of sizes in `ModelConfig`."""
# Not used by the model; the scaling is read from rope_freqs once, for the config.
IGNORED = ("rope_freqs.weight",)


def read_gguf_config(path: pathlib.Path) -> ModelConfig:
    """The architecture that a GGUF file describes.

    Raises:
        UserError: The file is damaged, the architecture or a setting is not supported, or metadata
            is missing.
    """
    return _config(path, *read_gguf(path))


def open_gguf(path: pathlib.Path) -> Source:
    """The config of a GGUF file and the place of every tensor.

    Raises:
        UserError: The file is damaged, or an architecture, setting or tensor type is not supported.
    """
    metadata, tensors = read_gguf(path)
    config = _config(path, metadata, tensors)
    return Source(
        path=path,
        config=config,
        tensors=tensors,
        style="gguf",
        interleaved=config.model_type == "llama",
        ignored=frozenset(IGNORED),
    )


def _config(
    path: pathlib.Path, metadata: dict[str, Any], tensors: dict[str, TensorInfo]
) -> ModelConfig:
    arch = metadata.get("general.architecture")
    if arch not in SUPPORTED:
        raise UserError(
            f"{path}: general.architecture: {arch!r} is not supported; supported: "
            f"{', '.join(SUPPORTED)} (SmolLM2 and Mistral files are llama)"
        )
    if metadata.get(f"{arch}.expert_count", 0):
        raise UserError(f"{path}: {arch}.expert_count: mixtures of experts are not supported")

    def size(key: str, default: int | None = None) -> int:
        value, most = (
            metadata.get(f"{arch}.{key}", default),
            limits.size_of_model(OURS.get(key, key)),
        )
        if isinstance(value, int) and value > most:
            raise UserError(f"{path}: {arch}.{key}: at most {most:,} is supported, got {value}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{path}: {arch}.{key}: expected a positive whole number, got {_short(value)}"
            )
        return value

    heads, d_model = size("attention.head_count"), size("embedding_length")
    if f"{arch}.attention.key_length" not in metadata and d_model % heads:
        raise UserError(
            f"{path}: {arch}.attention.head_count: {heads} does not divide the "
            f"embedding_length {d_model}"
        )
    head_dim = size("attention.key_length", d_model // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise UserError(
                f"{path}: {arch}.{key}: {size(key)} differs from the head size {head_dim}; "
                "not supported"
            )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing; is this a language model?")
    rope_theta = float(metadata.get(f"{arch}.rope.freq_base", 10000.0))
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = ModelConfig(
        model_type=arch,
        vocab_size=tensors["token_embd.weight"].shape[0],
        d_model=d_model,
        d_ff=size("feed_forward_length"),
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        tie_embeddings="output.weight" not in tensors,
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(path, arch, metadata, tensors, rope_theta, head_dim),
        rms_eps=_epsilon(path, metadata.get(f"{arch}.attention.layer_norm_rms_epsilon")),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        windows=(),
        max_positions=size("context_length"),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    return check_config(config, str(path), {})


def _epsilon(path: pathlib.Path, value: float | None) -> float:
    if value is None:
        raise UserError(f"{path}: attention.layer_norm_rms_epsilon is missing")
    # Stored as float32, so 1e-5 would be read as 9.999999747378752e-06; this finds 1e-5 again.
    return float(str(np.float32(value)))


def _rope_scaling(
    path: pathlib.Path,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, TensorInfo],
    theta: float,
    head_dim: int,
) -> RopeScaling | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UserError(
            f"{path}: {arch}.rope.scaling.type: {kind!r} is not supported; "
            "supported: none, linear, and Llama 3's factors"
        )
    info = tensors.get("rope_freqs.weight")
    if info is not None:
        if kind == "linear":
            raise UserError(f"{path}: rope_freqs.weight beside linear scaling is not supported")
        return _llama3_scaling(path, info, theta, head_dim)
    if kind == "none":
        return None
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear"))
    if not isinstance(factor, float) or not 0 < factor < math.inf:
        raise UserError(f"{path}: {arch}.rope.scaling.factor: expected a number, got {factor!r}")
    return RopeScaling(kind="linear", factor=factor)


def _llama3_scaling(
    path: pathlib.Path, info: TensorInfo, theta: float, head_dim: int
) -> RopeScaling | None:
    """Finds the Llama 3 settings from the stored divisors of the rotary frequencies.

    llama.cpp stores a divisor for every frequency. Released models use low and high factors 1 and 4
    on 8192 positions with a factor of 8 or 32, which are also the defaults of `RopeScaling`. The
    factor is the largest divisor, and the settings must reproduce all others.
    """
    with path.open("rb") as file:
        file.seek(info.offset)
        raw = np.frombuffer(file.read(info.nbytes), np.uint8)
    stored = decode(raw, info).astype(np.float64).reshape(-1)
    if stored.shape != (head_dim // 2,) or not np.all((stored > 0) & np.isfinite(stored)):
        raise UserError(f"{path}: rope_freqs.weight: expected {head_dim // 2} positive numbers")
    scaling = RopeScaling(kind="llama3", factor=float(stored.max()))
    if np.allclose(stored, 1.0):
        return None
    expected = frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)
    if not np.allclose(stored, expected, rtol=1e-4):
        worst = int(np.argmax(np.abs(stored - expected)))
        raise UserError(
            f"{path}: rope_freqs.weight: entry {worst} is {stored[worst]:.6g}, Llama 3's scaling "
            f"by {scaling.factor:g} gives {expected[worst]:.6g}; other scalings are not supported"
        )
    return scaling


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
