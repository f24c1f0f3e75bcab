"""Cayley's transform: orthogonal matrices from skew-symmetric ones.

With a skew-symmetric ``Q`` the matrix ``(I + Q)^-1 (I - Q)`` is orthogonal.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def cayley(
    q: Float[Array, "*stack width"], exact: bool, terms: int
) -> Float[Array, "*stack size size"]:
    """Orthogonal matrices from upper triangles.

    Args:
        q: Entries above the diagonal, row by row.
        exact: Whether to solve a linear system instead of summing the series.
        terms: Terms of the series. As in PEFT, the last power counts once and those between twice,
            so three terms are the same as four.
    """
    size = (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*q.shape[:-1], size, size), q.dtype).at[..., rows, columns].set(q)
    skew, eye = upper - jnp.swapaxes(upper, -1, -2), jnp.eye(size, dtype=q.dtype)
    if exact:  # the two factors commute
        return jnp.linalg.solve(eye + skew, eye - skew)
    result = eye + 2.0 * skew
    if terms > 2:
        power = jnp.matmul(skew, skew, precision=HIGHEST)
        result += 2.0 * power
        for _ in range(3, terms - 1):
            power = jnp.matmul(power, skew, precision=HIGHEST)
            result += 2.0 * power
        result += jnp.matmul(power, skew, precision=HIGHEST)
    return result
