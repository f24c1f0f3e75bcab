"""The key/value cache of a decoder: what earlier tokens leave behind for later ones."""

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
        k: ``(layers, batch, kv_heads, slots, head_dim)``, rotated; or as `by_layer` gives it.
        v: The same shape.
        positions: ``(batch, slots)``.
        segment_ids: ``(batch, slots)``; 0 marks padding and slots not written yet.
        used: Scalar: slots written so far; the next tokens go there in every row.
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
    """The cache with places of new tokens, ``(batch, new)``, written behind the used slots."""
    places = (cache.positions, cache.segment_ids)
    positions, segment_ids = _write(places, (positions, segment_ids), cache.used, axis=1)
    return dataclasses.replace(cache, positions=positions, segment_ids=segment_ids)


def append_slots(old: Any, new: Any, used: Any) -> tuple[Any, ...]:
    """Keys and values ``(..., slots, head_dim)`` with those of new tokens behind the used slots."""
    return _write(old, new, used, axis=-2)


def _write(old: Any, new: Any, used: Any, axis: int) -> tuple[Any, ...]:
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), used, axis)
        for x, y in zip(old, new, strict=True)
    )


def by_layer(cache: Cache) -> Cache:
    """The same with keys and values of the layers one by one, and rows and heads on one axis.

    So a product takes them as they lie. With an axis for each, XLA on CPU copies a layer's part
    four times a token.
    """
    return dataclasses.replace(cache, k=merge_heads(cache.k), v=merge_heads(cache.v))


def merge_heads(arrays: Any) -> tuple[Any, ...]:
    """Each of some ``(batch, kv_heads, slots, head_dim)`` with its first two axes made one."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
