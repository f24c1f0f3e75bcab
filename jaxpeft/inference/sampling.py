"""The choice of the next token: greedy, or by temperature, top-k and top-p.

Reference:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020,
    https://arxiv.org/abs/1904.09751, section 3.1 (top-p).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpeft.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest (greedy).
        top_k: Sample among the k largest only; 0 is off.
        top_p: Sample among the fewest tokens whose probability reaches p; 1 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be at least 0, got {self.temperature!r}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0, got {self.top_k!r}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins, also because float32 rounds the temperature to 0."""
        return self.temperature < float(np.finfo(np.float32).tiny)


def draw(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, "batch"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "batch"]:
    """A token for every row, drawn with the row's own key; `Sampling` explains the numbers."""
    # Below 0, so that a small temperature cannot overflow.
    scores = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    scores = jax.lax.cond(
        (top_k > 0) | (top_p < 1),
        lambda scores: filter_logits(scores, top_k, top_p),
        lambda scores: scores,
        scores,
    )
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Sets logits to -inf outside the top k and outside the nucleus of mass `top_p`.

    Args:
        logits: Logits, already divided by the temperature.
        top_k: How many logits are kept; 0 is off.
        top_p: In (0, 1]; 1 is off. It applies to the logits that top-k keeps.

    Returns:
        The logits. At least the largest of every row is kept, and so is every logit equal to the
        smallest one kept.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    within = (jnp.arange(logits.shape[-1]) < top_k) | (top_k == 0)
    mass = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    within &= (before < top_p) | (top_p >= 1)
    lowest = jnp.where(within, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
