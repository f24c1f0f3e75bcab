"""Principal components of rows that arrive batch by batch, for a stack of layers at once.

After ``N`` rows with mean ``M``, components ``V`` and singular values ``S``, and for ``n`` new rows
``X`` with mean ``m``, the rows

    [S V;  X - m;  sqrt(N n / (N + n)) (M - m)]

have the components and singular values of all ``N + n`` rows, except for components that were cut
off before. They are computed by a few steps of subspace iteration, as in HF PEFT, which starts from
the components so far.

References:
    Ross et al., "Incremental Learning for Robust Visual Tracking", 2008, section 3.1.
    Halko et al., "Finding structure with randomness", 2011, https://arxiv.org/abs/0909.4061,
    algorithm 4.4.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

STEPS = 4
"""Steps of subspace iteration."""


@flax.struct.dataclass
class Components:
    """The principal components so far of the inputs of a stack of kernels.

    Attributes:
        v: Components, largest first: ``(layers, k, d_in)``.
        s: Singular values of the centred inputs, ``(layers, k)``.
        mean: ``(layers, d_in)``.
        total: Sum of the squared distances from the mean, ``(layers,)``.
        count: Number of tokens, ``(layers,)``.
        settled: Whether a component did not change in the last update, ``(layers, k)``.
    """

    v: Any
    s: Any
    mean: Any
    total: Any
    count: Any
    settled: Any

    @classmethod
    def none(cls, layers: int, k: int, d_in: int) -> "Components":
        """The components before the first token."""
        return cls(
            v=jnp.zeros((layers, k, d_in)),
            s=jnp.zeros((layers, k)),
            mean=jnp.zeros((layers, d_in)),
            total=jnp.zeros(layers),
            count=jnp.zeros(layers),
            settled=jnp.zeros((layers, k), bool),
        )

    def shares(self) -> np.ndarray:
        """Each component's share of the variance, ``(layers, k)``."""
        square, total = np.square(np.asarray(self.s)), np.asarray(self.total)[:, None]
        return square / np.where(total > 0, total, 1.0)


def update(
    old: Components,
    x: Float[Array, "layers tokens d_in"],
    learned: Bool[Array, "tokens"],
    active: Bool[Array, "layers"],
    key: jax.Array,
    tau: float,
) -> Components:
    """The components after one more batch of inputs, in layers that are active."""
    k, d_in = old.v.shape[1:]
    noise = jax.random.normal(key, (d_in, min(2 * k, d_in)))
    weights = learned.astype(jnp.float32)

    def one(args: Any) -> Components:
        part, inputs, on = args
        new = _update_one(part, inputs.astype(jnp.float32), weights, noise, tau)
        on &= new.count > part.count
        return jax.tree.map(lambda a, b: jnp.where(on, a, b), new, part)

    return jax.lax.map(one, (old, x, active))


def _update_one(old: Components, x: Any, weights: Any, noise: Any, tau: float) -> Components:
    k, count = len(old.s), weights.sum()
    mean = weights @ x / jnp.maximum(count, 1.0)
    centred = (x - mean) * weights[:, None]
    both = jnp.maximum(old.count + count, 1.0)
    shift = jnp.sqrt(old.count * count / both) * (old.mean - mean)
    rows = jnp.concatenate([old.s[:, None] * old.v, centred, shift[None]])
    guess = jnp.concatenate([old.v.T, noise[:, k:]], axis=1)
    s, v = leading(rows, jnp.where(old.count > 0, guess, noise), k)
    return Components(
        v=v,
        s=s,
        mean=(old.count * old.mean + count * mean) / both,
        total=old.total + jnp.sum(centred**2) + jnp.sum(shift**2),
        count=old.count + count,
        settled=jnp.sum(v * old.v, axis=-1) >= tau,
    )


def leading(
    rows: Float[Array, "n d"], guess: Float[Array, "d q"], k: int
) -> tuple[Float[Array, "k"], Float[Array, "k d"]]:
    """The largest singular values and their right vectors, by subspace iteration from a guess.

    As in PEFT, the entry of each vector with the largest absolute value is positive.
    """
    basis = guess
    for _ in range(STEPS):
        basis, _ = jnp.linalg.qr(rows.T @ (rows @ basis))
    _, s, v = jnp.linalg.svd(jnp.linalg.qr(rows @ basis, mode="r"), full_matrices=False)
    v = (v @ basis.T)[:k]
    largest = jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), axis=1, keepdims=True), axis=1)
    return s[:k], v * jnp.where(largest < 0, -1.0, 1.0)
