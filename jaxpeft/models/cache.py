"""The key/value cache of a decoder: keys and values of earlier tokens."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpeft.models.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Keys and values of earlier tokens, for decoding.

    Attributes:
        k: ``(layers, batch, kv_heads, slots, head_dim)``, rotated; or in the form of `by_layer`.
        v: The same shape.
        positions: ``(batch, slots)``.
        segment_ids: ``(batch, slots)``; 0 marks padding and slots that are not written yet.
        used: Scalar: the number of slots written so far; in every row the next tokens follow them.
    """

    k: Any
    v: Any
    positions: Any
    segment_ids: Any
    used: Any


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.zeros((), jnp.int32)
    )


def append(cache: Cache, positions: Any, segment_ids: Any) -> Cache:
    """The cache with positions and segments of new tokens, ``(batch, new)``, behind used slots."""
    places = (cache.positions, cache.segment_ids)
    positions, segment_ids = _write(places, (positions, segment_ids), cache.used, axis=1)
    return dataclasses.replace(cache, positions=positions, segment_ids=segment_ids)


def append_slots(old: Any, new: Any, used: Any) -> tuple[Any, ...]:
    """Keys or values ``(..., slots, head_dim)`` with those of new tokens behind the used slots."""
    return _write(old, new, used, axis=-2)


def _write(old: Any, new: Any, used: Any, axis: int) -> tuple[Any, ...]:
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), used, axis)
        for x, y in zip(old, new, strict=True)
    )


def by_layer(cache: Cache) -> Cache:
    """The cache with separate arrays for each layer, and one axis for rows and heads.

    Products can then read the arrays as they are. With two axes, XLA on CPU copies a layer's arrays
    four times per token.
    """
    return dataclasses.replace(cache, k=merge_heads(cache.k), v=merge_heads(cache.v))


def merge_heads(arrays: Any) -> tuple[Any, ...]:
    """Merges the first two axes of ``(batch, kv_heads, slots, head_dim)`` arrays."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
