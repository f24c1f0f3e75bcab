"""Rotary position embeddings with the scalings of the supported models.

References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    https://arxiv.org/abs/2104.09864, equation 34 (in the half-split layout of GPT-NeoX).
    Grattafiori et al., "The Llama 3 Herd of Models", 2024, https://arxiv.org/abs/2407.21783
    ("llama3" scaling; the blend is that of Meta's released code).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.models.config import ModelConfig, RopeScaling
from jaxpeft.ops.products import chain_dtype


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """The rotation speed of every pair of channels in radians per position, ``(head_dim / 2,)``."""
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """The `inverse_frequencies` of a model with these settings, in float64.

    Raises:
        ValueError: The kind of scaling is unknown.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    speeds = 1.0 / theta**exponent
    if scaling is None:
        return speeds
    if scaling.kind == "linear":
        return speeds / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(speeds, scaling)
    raise ValueError(f"RopeScaling.kind must be 'linear' or 'llama3', got {scaling.kind!r}.")


def _llama3(speeds: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / speeds
    turns = scaling.original_max_positions / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - keep) * speeds / scaling.factor + keep * speeds


def angles(
    config: ModelConfig, positions: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosines and sines of all rotations, in float32."""
    turn = positions[..., None].astype(jnp.float32) * jnp.asarray(
        inverse_frequencies(config), jnp.float32
    )
    return jnp.cos(turn), jnp.sin(turn)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs ``(x[i], x[i + head_dim / 2])`` by their angles."""
    dtype = chain_dtype(x)
    cos, sin = cos[:, :, None].astype(dtype), sin[:, :, None].astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
