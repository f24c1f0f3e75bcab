"""Attention on TPUs by JAX's splash kernel, exact for packed rows.

The kernel goes by slots: a query sees the keys of its segment that are not in later slots, and are
less than the window behind. This equals the mask of `jaxpeft.models.attention` where positions
count up slot by slot in every segment. Scores stay on the chip, forward and backward. In main
memory only the list of tiles grows with the square of the row's length, and the kernel leaves out
tiles that causality or the window forbid.

Masks of the kernel are static: layers with different windows are branches of one program.

The kernel comes with JAX. Its successor in tokamax needs Python 3.12 and JAX 0.11.

Reference:
    Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691, section 3.1 (both passes).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from jaxpeft.core import flops
from jaxpeft.mesh.constraints import on_own_heads
from jaxpeft.models.tiles import KEPT, even_block

LANES = 128
"""Width of the chip's vector unit in numbers; blocks are a multiple of it."""


def splash_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *,
    window: Int[Array, ""] | None = None,
    windows: tuple[int, ...] = (0,),
    block: int = 512,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal softmax attention within segments, with grouped key/value heads.

    Args:
        q: Queries, rotated; in float32 or bfloat16.
        k: Keys, rotated.
        v: Values.
        segment_ids: Segment of each slot; 0 is padding.
        window: How many slots back a query sees, itself included; 0 or None for all.
        windows: All values that `window` may take.
        block: About how many queries (and keys) are in a block.
        interpret: Whether the kernel is interpreted, for tests on other backends.

    Returns:
        Values averaged with softmax weights (computed in float32), in the dtype of `q`; zero for
        padding. It has first derivatives in reverse mode.
    """
    seq = q.shape[1]
    windows = (0,) if window is None else windows
    known = tuple(sorted({0 if size >= seq else size for size in windows}))
    which = jnp.int32(0)
    if window is not None:  # A window as long as the row equals none, which is 0 and comes first.
        which = jnp.argmax(jnp.asarray(known) == window).astype(jnp.int32)
    size = even_block(seq, block, LANES)
    # The kernel does not scale scores; the scale itself, in bfloat16, would be off by 1 in 256.
    scaled = (q.astype(jnp.float32) * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    arrays = (_pad(x, size) for x in (scaled, k, v, segment_ids))
    out = on_own_heads(functools.partial(_attend, size, known, interpret), *arrays, which)[:, :seq]
    return jnp.where((segment_ids != 0)[..., None, None], out, 0)


def _attend(
    block: int,
    windows: tuple[int, ...],
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    which: Array,
) -> Array:
    """Attention of the rows and heads on one device; the window is ``windows[which]``."""
    seq, heads, head_dim = q.shape[1:]
    # The chip would pad narrower heads to 128 numbers anyway, and take more than twice the memory.
    kept = KEPT if head_dim % LANES == 0 else None
    blocks = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")

    def within(window: int, *arrays: Array) -> Array:
        mask, tiles = _mask(seq, window, block)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(**dict.fromkeys(blocks, block)),
            residual_checkpoint_name=kept,
            interpret=interpret,
        )

        def attend_row(q: Array, k: Array, v: Array, ids: Array) -> Any:
            return kernel(q, k, v, splash.SegmentIds(ids, ids))

        with flops.at_most(heads * tiles):
            return jax.vmap(attend_row)(*arrays)

    branches = [functools.partial(within, window) for window in windows]
    arrays = (*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids)
    out = branches[0](*arrays) if len(branches) == 1 else jax.lax.switch(which, branches, *arrays)
    return out.swapaxes(1, 2)


def _mask(seq: int, window: int, block: int) -> tuple[Any, int]:
    """The mask of slots, and the number of its tiles that hold a visible pair."""
    first = np.arange(0, seq, block)
    behind = first[:, None] - first
    seen = behind >= 0
    if not window:
        return splash.CausalMask((seq, seq)), int(seen.sum())
    seen &= behind - (block - 1) < window
    return splash.LocalMask((seq, seq), (window - 1, 0), 0), int(seen.sum())


def _pad(x: Array, block: int) -> Array:
    """Pads the row with zeros to whole blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
