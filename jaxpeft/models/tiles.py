"""Attention in tiles, forward and backward, that visits only tiles with a visible pair.

Queries and keys are cut into blocks; a tile is one block of each. Which tiles hold a visible pair
depends on data (segments, positions, windows), so the tiles to visit are listed first, and a loop
visits them: a row of short packed segments costs less than one long segment. Softmax is accumulated
tile by tile. The backward pass recomputes the weights of each tile from the log-sum-exp of its
queries. Only the list of tiles, one number for every pair of blocks, grows with the square of the
row's length.

All rows of a batch share one list, so every array stays whole along the batch: if rows are spread
over devices, each device works on its own rows. A tile is skipped only if no row needs it, so the
more rows of short segments there are, the less is saved.

Reference:
    Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691, section 3.1 (both passes).
    Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021,
    https://arxiv.org/abs/2112.05682 (blocks of queries and of keys in XLA).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpeft.core import flops
from jaxpeft.ops.products import kept_by_rule, wide_dtype

EVERYONE = -(2**30)
"""The segment of keys that every token sees; segments of data lie between it and ``2**30``."""

KEPT = "attention"
"""Tag of the results that a remat policy may keep, so that no tile is computed a third time."""

_FAR = 2**30
_LOWEST = float(jnp.finfo(jnp.float32).min)


def visible(
    q_positions: Int[Array, "batch rows"],
    k_positions: Int[Array, "batch columns"],
    q_segments: Int[Array, "batch rows"],
    k_segments: Int[Array, "batch columns"],
    window: Int[Array, ""] | None,
) -> Bool[Array, "batch rows columns"]:
    """Which keys each query may see; slots of segment 0 see nothing and are not seen."""
    behind = q_positions[:, :, None] - k_positions[:, None, :]
    ours, theirs = q_segments[:, :, None], k_segments[:, None, :]
    seen = ((ours == theirs) | (theirs == EVERYONE)) & (ours != 0) & (behind >= 0)
    if window is not None:
        seen &= (behind < window) | (window == 0)
    return seen


def earlier(q_first: Any, rows: int, k_first: Any, columns: int, behind: int) -> Any:
    """A mask ``(rows, columns)`` of a tile: True where ``key slot <= query slot + behind``.

    The tile's first query slot is `q_first`, its first key slot `k_first`.
    """
    queries, keys = q_first + jnp.arange(rows), k_first + jnp.arange(columns)
    return keys <= queries[:, None] + behind


class Places(NamedTuple):
    """The positions and segments of queries and keys, which `visible` takes."""

    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    window: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled_attention(
    block: int,
    behind: int | None,
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    places: Places,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention with grouped key/value heads.

    Args:
        block: About how many queries (and keys) are in a block.
        behind: Query ``i`` sees no key after slot ``i + behind``; None for no such limit.
        q: Queries, rotated.
        k: Keys, rotated.
        v: Values.
        places: Positions and segments, which decide the pairs that are visible.

    Returns:
        Values averaged with softmax weights (computed in float32), in the dtype of `q`; zero for
        queries that see nothing. There are first derivatives in reverse mode, and ``jax.jvp`` of
        those (not in bfloat16 on CPU), but there is no forward mode alone.
    """
    return _forward(block, behind, q, k, v, places)[0]


def _forward(block: int, behind: int | None, q: Any, k: Any, v: Any, places: Places) -> Any:
    cut = _cut(block, behind, q, k, places)
    queries, keys, values = cut.queries(q), cut.keys(k), cut.keys(v)

    def visit(i: Array, j: Array, sums: Any) -> Any:
        highest, total, out = (_at(x, i) for x in sums)
        seen, scores = cut.scores(queries, keys, i, j)
        higher = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(highest - higher)
        more = _dot("bkrc,bkcd->bkrd", weights.astype(q.dtype), _at(values, j))
        new = (
            higher,
            total * shrink + weights.sum(axis=-1),
            out * shrink[..., None] + more,
        )
        return tuple(_put(x, y, i) for x, y in zip(sums, new, strict=True))

    rows = queries.shape[:-1]
    wide = wide_dtype(queries)
    start = (
        jnp.full(rows, _LOWEST, wide),
        jnp.zeros(rows, wide),
        jnp.zeros(queries.shape, wide),
    )
    highest, total, out = cut.visit_all(visit, start)
    total = jnp.where(total > 0, total, 1.0)
    out = cut.whole_queries((out / total[..., None]).astype(q.dtype))
    out, log_total = (kept_by_rule(x, KEPT) for x in (out, highest + jnp.log(total)))
    return out, (q, k, v, places, out, log_total)


def _backward(block: int, behind: int | None, known: Any, slope: Any) -> Any:
    q, k, v, places, out, log_total = known
    cut = _cut(block, behind, q, k, places)
    queries, keys, values, slopes = cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(slope)
    means = (slopes.astype(wide_dtype(slopes)) * cut.queries(out)).sum(axis=-1)

    def visit(i: Array, j: Array, grads: Any) -> Any:
        seen, scores = cut.scores(queries, keys, i, j)
        weights = jnp.where(seen, jnp.exp(scores - _at(log_total, i)[..., None]), 0.0)
        of_weights = _dot("bkrd,bkcd->bkrc", _at(slopes, i), _at(values, j))
        of_scores = weights * (of_weights - _at(means, i)[..., None]) * cut.scale
        of_scores, weights = of_scores.astype(q.dtype), weights.astype(q.dtype)
        more = (
            (i, _dot("bkrc,bkcd->bkrd", of_scores, _at(keys, j))),
            (j, _dot("bkrc,bkrd->bkcd", of_scores, _at(queries, i))),
            (j, _dot("bkrc,bkrd->bkcd", weights, _at(slopes, i))),
        )
        return tuple(_put(x, _at(x, n) + y, n) for x, (n, y) in zip(grads, more, strict=True))

    start = tuple(jnp.zeros(x.shape, wide_dtype(x)) for x in (queries, keys, values))
    of_q, of_k, of_v = cut.visit_all(visit, start)
    grads = cut.whole_queries(of_q), cut.whole_keys(of_k), cut.whole_keys(of_v)
    return *(x.astype(y.dtype) for x, y in zip(grads, (q, k, v), strict=True)), None


tiled_attention.defvjp(_forward, _backward)


def _dot(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=wide_dtype(x))


def _at(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: Array, y: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)


class _Cut(NamedTuple):
    """Arrays cut into blocks, blocks first; the heads of a group share one product."""

    q_block: int
    k_block: int
    seq: int
    slots: int
    kv_heads: int
    behind: int | None
    scale: float
    window: Any
    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any

    def queries(self, x: Any) -> Array:
        """``(batch, seq, heads, d)`` as ``(blocks, batch, kv_heads, group * block, d)``."""
        batch, _, heads, d = x.shape
        x = _blocks(x, self.q_block).reshape(
            -1, batch, self.q_block, self.kv_heads, heads // self.kv_heads, d
        )
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(x.shape[0], batch, self.kv_heads, -1, d)

    def whole_queries(self, x: Array) -> Array:
        """Undoes `queries`."""
        blocks, batch, kv_heads, rows, d = x.shape
        x = x.reshape(blocks, batch, kv_heads, rows // self.q_block, self.q_block, d)
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(batch, blocks * self.q_block, -1, d)[:, : self.seq]

    def keys(self, x: Any) -> Array:
        """``(batch, slots, kv_heads, d)`` as ``(blocks, batch, kv_heads, block, d)``."""
        return _blocks(x, self.k_block).swapaxes(2, 3)

    def whole_keys(self, x: Array) -> Array:
        """Undoes `keys`."""
        blocks, batch, kv_heads, rows, d = x.shape
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(batch, blocks * rows, kv_heads, d)[:, : self.slots]

    def scores(self, queries: Array, keys: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """The mask and the scores of a tile; masked scores are the lowest number."""
        mask = visible(
            _at(self.q_positions, i),
            _at(self.k_positions, j),
            _at(self.q_segments, i),
            _at(self.k_segments, j),
            self.window,
        )
        if self.behind is not None:
            q_first, k_first = i * self.q_block, j * self.k_block
            mask &= earlier(q_first, self.q_block, k_first, self.k_block, self.behind)
        scores = _dot("bkrd,bkcd->bkrc", _at(queries, i), _at(keys, j)) * self.scale
        batch, kv_heads, rows, columns = scores.shape
        shape = (batch, kv_heads, rows // self.q_block, self.q_block, columns)
        mask = jnp.broadcast_to(mask[:, None, None], shape).reshape(scores.shape)
        return mask, jnp.where(mask, scores, _LOWEST)

    def visit_all(self, visit: Any, start: Any) -> Any:
        """Calls ``visit(query block, key block, carry)`` for all tiles with a visible pair."""
        q_blocks, k_blocks = self.q_positions.shape[0], self.k_positions.shape[0]
        reached = np.ones((q_blocks, k_blocks), bool)
        if self.behind is not None:
            ends = np.arange(1, q_blocks + 1) * self.q_block + self.behind
            reached = np.arange(k_blocks) * self.k_block < ends[:, None]
        needed = (self.needed() & reached).reshape(-1)
        i, j = jnp.divmod(jnp.argsort(~needed, stable=True), k_blocks)
        with flops.at_most(int(reached.sum())):
            return jax.lax.fori_loop(0, needed.sum(), lambda n, x: visit(i[n], j[n], x), start)

    def needed(self) -> Bool[Array, "q_blocks k_blocks"]:
        """Which tiles may hold a visible pair in some row of the batch."""
        real = self.q_segments != 0
        first, last = _range(self.q_segments, real)
        early, late = _range(self.q_positions, real)
        real, every = self.k_segments != 0, self.k_segments == EVERYONE
        k_first, k_last = _range(self.k_segments, real & ~every)
        k_first = jnp.where(every.any(axis=-1), -_FAR, k_first)
        k_last = jnp.where(every.any(axis=-1), _FAR - 1, k_last)
        k_early, k_late = _range(self.k_positions, real)
        meet = (first[:, None] <= k_last) & (k_first <= last[:, None]) & (k_early <= late[:, None])
        if self.window is not None:
            meet &= (self.window == 0) | (early[:, None] - k_late < self.window)
        return meet.any(axis=-1)


def _range(x: Int[Array, "n batch rows"], real: Bool[Array, "n batch rows"]) -> tuple[Any, Any]:
    """The smallest and largest value that is real; without any, a range that overlaps no other."""
    return jnp.where(real, x, _FAR).min(axis=-1), jnp.where(real, x, -_FAR).max(axis=-1)


def _cut(block: int, behind: int | None, q: Any, k: Any, places: Places) -> _Cut:
    q_block, k_block = even_block(q.shape[1], block), even_block(k.shape[1], block)
    return _Cut(
        q_block,
        k_block,
        q.shape[1],
        k.shape[1],
        k.shape[2],
        behind,
        1 / math.sqrt(q.shape[-1]),
        places.window,
        _blocks(places.q_positions, q_block),
        _blocks(places.k_positions, k_block),
        _blocks(places.q_segments, q_block),
        _blocks(places.k_segments, k_block),
    )


def even_block(length: int, block: int, unit: int = 8) -> int:
    """The multiple of `unit`, at most `block`, that wastes little padding."""
    return -(-length // (-(-length // block) * unit)) * unit


def _blocks(x: Any, block: int) -> Array:
    """``(batch, length, ...)`` as ``(blocks, batch, block, ...)``, padded with zeros."""
    pad = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
