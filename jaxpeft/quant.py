"""Quantisation of kernels: the 4-bit NormalFloat of QLoRA.

Every block of 64 neighbours along the contracting axis is divided by its largest magnitude, and
each number becomes the nearest of 16 values.

Reference:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
    https://arxiv.org/abs/2305.14314, equation 4 and appendix E.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of NF4, appendix E."""

BLOCK = 64


def nf4_round_trip(kernel: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack d_in d_out"]:
    """A kernel as it is after quantisation to NF4 and back, in float32.

    Blocks run along ``d_in``; the last one of a column may be shorter. Scales stay float32.

    Example:
        >>> nf4_round_trip(jnp.array([[2.0], [0.3], [-2.0]]))[:, 0]
        Array([ 2.       ,  0.3218604, -2.       ], dtype=float32)
    """
    *stack, d_in, d_out = kernel.shape
    count = -(-d_in // BLOCK)
    pad = [(0, 0)] * len(stack) + [(0, count * BLOCK - d_in), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), pad).reshape(*stack, count, BLOCK, d_out)
    scale = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = jnp.searchsorted(middles, blocks / jnp.where(scale == 0, 1.0, scale))
    values = jnp.asarray(NF4)[codes] * scale
    return values.reshape(*stack, count * BLOCK, d_out)[..., :d_in, :]
