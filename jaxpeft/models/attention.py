"""Causal attention over packed rows.

All callers use the same mask. A query sees a key if both are in the same segment, the key's
position is not later, and it is less than the layer's window behind. Without a cache, a query also
sees no later slot, whatever its position, and those keys are not read at all. A prefix stands in
front of all keys, and every segment sees it.

With few queries (decoding, short rows) all queries are multiplied with all keys in one product.
Longer rows are computed in tiles, or by a kernel if the backend has one that is exact.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpeft.core.backend import choices, platform
from jaxpeft.core.errors import UserError
from jaxpeft.mesh.constraints import keep_heads, knows_devices, on_mesh
from jaxpeft.models.tiles import EVERYONE, Places, earlier, tiled_attention, visible
from jaxpeft.ops.products import wide_dtype


@flax.struct.dataclass
class Prefix:
    """Keys and values that stand in front of every segment, at positions 0 to n - 1.

    Attributes:
        k: ``(n, kv_heads, head_dim)``, or ``(batch, n, kv_heads, head_dim)`` if rows differ; not
            rotated again. Outside of a layer there is an axis of layers in front.
        v: The same shape.
        used: ``(batch,)`` booleans: which rows have a prefix; None for every row. Outside of a
            layer there is an axis of layers in front.
    """

    k: Any
    v: Any
    used: Any = None

    @property
    def length(self) -> int:
        """The number of positions that it takes."""
        return self.k.shape[-3]

    def shift(self, positions: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
        """Moves positions behind the prefixes of all layers.

        Raises:
            UserError: If the batch has another number of rows than `used`.
        """
        if self.used is None:
            return positions + self.length
        if self.used.shape[-1] != positions.shape[0]:
            raise UserError(
                f"index: {self.used.shape[-1]} adapters for a batch of {positions.shape[0]} rows."
            )
        return positions + jnp.where(self.used[0], self.length, 0)[:, None]


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    *,
    q_positions: Int[Array, "batch seq"],
    k_positions: Int[Array, "batch slots"],
    q_segments: Int[Array, "batch seq"],
    k_segments: Int[Array, "batch slots"],
    window: Int[Array, ""] | None = None,
    windows: tuple[int, ...] = (),
    prefix: Prefix | None = None,
    in_order: bool = False,
    block: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention with grouped key/value heads; head ``i`` reads ``i // (heads/kv_heads)``.

    Args:
        q: Queries, rotated.
        k: Keys, rotated; `slots` equals `seq` unless they come from a cache.
        v: Values.
        q_positions: Position of each query within its segment.
        k_positions: Position of each key within its segment.
        q_segments: Segment of each query; 0 is padding.
        k_segments: Segment of each key; 0 is padding or an empty slot of a cache.
        window: How many positions back a query sees, itself included; 0 or None for all.
        windows: All values that `window` may take, where they are known.
        prefix: Keys and values in front of all others; positions of `q` and `k` begin behind it.
        in_order: Whether queries and keys are the same tokens and their positions count up slot by
            slot in every segment. A kernel may be used then, see `_kernel_serves`.
        block: Queries (and keys) in a tile; None for the backend's choice.

    Returns:
        Values averaged with softmax weights (computed in float32), in the dtype of `q`; zero for
        queries that see nothing.
    """
    fit, ahead = choices(), 0
    if fit.splash and in_order and prefix is None and _kernel_serves(q, window, windows):
        from jaxpeft.models.splash import splash_attention  # Pallas takes time to import

        k, v = (keep_heads(x, q.shape[2]) for x in (k, v))
        return splash_attention(
            q,
            k,
            v,
            q_segments,
            window=window,
            windows=windows or (0,),
            block=block or fit.tile,
            interpret=platform() != "tpu",
        )
    if prefix is not None:
        ahead, batch = prefix.length, q.shape[0]
        k, v = _in_front(prefix.k, k), _in_front(prefix.v, v)
        used = True if prefix.used is None else prefix.used[:, None]
        segments = jnp.where(used, EVERYONE, jnp.zeros((batch, ahead), jnp.int32))
        positions = jnp.broadcast_to(jnp.arange(ahead), (batch, ahead))
        k_segments = jnp.concatenate([segments, k_segments], axis=1)
        k_positions = jnp.concatenate([positions, k_positions], axis=1)
    k, v = (keep_heads(x, q.shape[2]) for x in (k, v))
    places = Places(q_positions, k_positions, q_segments, k_segments, window)
    block = block or fit.tile
    behind = ahead if k.shape[1] == q.shape[1] + ahead else None  # no cache
    if q.shape[1] > min(block, fit.dense):
        return tiled_attention(block, behind, q, k, v, places)
    mask = visible(*places)
    if behind is not None:
        mask &= earlier(0, q.shape[1], 0, k.shape[1], behind)
    return _attend(q, k, v, mask)


def positions_of(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """The position of every token within its segment."""
    place = jnp.arange(segment_ids.shape[1])
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return place - jax.lax.cummax(jnp.where(segment_ids != before, place, 0), axis=1)


def _kernel_serves(q: Any, window: Any, windows: tuple[int, ...]) -> bool:
    """Whether the kernel can compute this attention.

    The kernel goes by slots, has static windows and takes two dtypes. XLA cannot partition it, so
    where arrays may be on several devices there must be a layout. Short rows are faster without it.
    """
    return (
        q.shape[1] > choices().dense
        and (window is None or bool(windows))
        and q.dtype in (jnp.float32, jnp.bfloat16)
        and knows_devices()
    )


def _in_front(
    first: Float[Array, "*batch n kv_heads head_dim"],
    then: Float[Array, "batch slots kv_heads head_dim"],
) -> Float[Array, "batch more kv_heads head_dim"]:
    """Concatenates both along the axis of slots, in the dtype of the second."""
    first = jnp.broadcast_to(first.astype(then.dtype), (then.shape[0], *first.shape[-3:]))
    return jnp.concatenate([first, then], axis=1)


def _attend(
    q: Float[Array, "batch rows heads head_dim"],
    k: Float[Array, "batch columns kv_heads head_dim"],
    v: Float[Array, "batch columns kv_heads head_dim"],
    mask: Bool[Array, "batch rows columns"],
) -> Float[Array, "batch rows heads head_dim"]:
    """All queries with all keys; the query heads of a key/value head share one product."""
    batch, rows, heads, head_dim = q.shape
    kv_heads, columns = k.shape[2], k.shape[1]
    group = heads // kv_heads
    # In decoding rows and heads share an axis, so that products read the cache without copying it.
    lead = (batch * kv_heads,) if rows == 1 and not on_mesh() else (batch, kv_heads)
    q = q.reshape(batch, rows, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(*lead, group * rows, head_dim)
    k, v = (x.swapaxes(1, 2).reshape(*lead, columns, head_dim) for x in (k, v))
    wide = wide_dtype(q)
    scores = jnp.einsum("...rd,...cd->...rc", q, k, preferred_element_type=wide)
    scores = scores.reshape(batch, kv_heads, group, rows, columns) / math.sqrt(head_dim)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = jnp.where(mask[:, None, None], weights, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    weights = weights.reshape(*lead, group * rows, columns).astype(q.dtype)
    out = jnp.einsum("...rc,...cd->...rd", weights, v, preferred_element_type=wide)
    out = out.reshape(batch, kv_heads, group, rows, head_dim) / total
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, rows, heads, head_dim)
