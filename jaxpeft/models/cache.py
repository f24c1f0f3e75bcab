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
        k: ``(layers, batch, slots, kv_heads, head_dim)``, rotated; or one such array a layer.
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
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.zeros((), jnp.int32)
    )


def append(cache: Cache, axis: int, **new: Any) -> Cache:
    """The cache with `new` values of its fields written behind the used slots, along `axis`."""

    def put(old: Any, value: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(old, value.astype(old.dtype), cache.used, axis)

    changes = {name: jax.tree.map(put, getattr(cache, name), value) for name, value in new.items()}
    return dataclasses.replace(cache, **changes)


def by_layer(cache: Cache) -> Cache:
    """The same with keys and values of the layers one by one."""
    return dataclasses.replace(cache, k=tuple(cache.k), v=tuple(cache.v))
