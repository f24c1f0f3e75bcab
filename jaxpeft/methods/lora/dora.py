"""Weight-decomposed low-rank adaptation (DoRA): LoRA with a trained length of every column.

A kernel ``W`` of shape ``(d_in, d_out)`` is used as ``g * (W + scale * A @ B)`` with one factor an
output, ``g = m / norm(W + scale * A @ B)``. The trained magnitude ``m`` starts as ``norm(W)``, and
the norm is a constant for differentiation (section 4.3). No sum of full size is formed:

    norm(W + s A B)^2 = norm(W)^2 + 2 s colsum((A^T W) * B) + s^2 colsum((A^T A B) * B)

``norm(W)`` is stored. With B = 0 the formula gives it bit by bit, so g is exactly 1 at first.

Reference:
    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024,
    https://arxiv.org/abs/2402.09353, equations 5 and 6.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.methods.family import Leaf, require_values
from jaxpeft.methods.lora.nodes import drop, low_rank
from jaxpeft.ops.linear import PRODUCT, OnBase, Operation, linear, materialize, through

HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class DoRAKernel(OnBase):
    """A frozen kernel with its low-rank factors and magnitudes.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        a: ``(d_in, rank)``, float32.
        b: ``(rank, d_out)``, float32.
        m: Magnitudes ``(d_out,)``, float32.
        norm: Norms of the base's columns ``(d_out,)``, float32.
        scale: Scalar.
        rank: Scalar; 0 leaves the kernel as it is.
        dropout: Scalar probability; used only with a key.
        key: PRNG key of this step and kernel, or None to drop nothing.
    """

    base: Any
    a: Any
    b: Any
    m: Any
    norm: Any
    scale: Any
    rank: Any
    dropout: Any = 0.0
    key: Any = None

    def factor(self) -> Float[Array, "d_out"]:
        """The factor of every output, ``m`` over the norm; exactly 1 for a new adapter.

        A column whose norm is zero has no direction; its factor is 1.
        """
        a, b = (jax.lax.stop_gradient(leaf) for leaf in (self.a, self.b))
        with jax.default_matmul_precision("highest"):
            cross = jnp.sum(linear(a.T, self.base) * b, axis=0)
            square = jnp.sum((a.T @ a @ b) * b, axis=0)
        change = self.scale * (2 * cross + self.scale * square)
        moved = jnp.sqrt(jnp.maximum(self.norm**2 + change, 0.0))
        norm = jax.lax.stop_gradient(jnp.where(change == 0, self.norm, moved))
        return _over(self.m, norm, self.rank)

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Computes ``x @ (g * (base + scale * a @ b))`` without forming the sum.

        With dropout, ``g - 1`` multiplies the base's result for the dropped input, as in PEFT.

        Args:
            x: Activations, in the compute dtype.

        Returns:
            Activations in the dtype of `x`, computed in float32 and rounded once.
        """
        low = low_rank(self._dropped(x), self.a, self.b, self.scale)
        return self._scaled(x, low, lambda h: linear(h, self.base))

    def through(self, x: Any, operation: Operation) -> Any:
        """As `multiply`, with another operation in the place of the products."""
        low = (operation(self._dropped(x), self.a) * self.scale) @ self.b
        return self._scaled(x, low, lambda h: through(h, self.base, operation))

    def _dropped(self, x: Any) -> Any:
        h = x.astype(self.a.dtype)
        return h if self.key is None else drop(h, self.dropout, self.key)

    def _scaled(self, x: Any, low: Any, with_base: Callable[[Any], Any]) -> Any:
        y, g = with_base(x), self.factor()
        if self.key is None:
            return (g * checkpoint_name(y.astype(low.dtype) + low, PRODUCT)).astype(x.dtype)
        low, again = checkpoint_name(low, PRODUCT), with_base(self._dropped(x).astype(x.dtype))
        return (y.astype(low.dtype) + (g - 1) * again.astype(low.dtype) + g * low).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``g * (base + scale * a @ b)`` in float32, rounded to the base's dtype; also of a stack.

        The norm is computed from the sum itself, and is a constant for differentiation here, too.
        """
        scale = jnp.asarray(self.scale, jnp.float32)[..., None, None]
        total = materialize(self.base).astype(jnp.float32)
        total += scale * jnp.matmul(self.a, self.b, precision=HIGHEST)
        rank = jnp.asarray(self.rank)[..., None]
        norm = jax.lax.stop_gradient(base_norm(total))
        return (_over(self.m, norm, rank)[..., None, :] * total).astype(self.dtype)


def base_norm(kernel: Any) -> Float[Array, "*stack d_out"]:
    """Norms of a kernel's columns, in float32; the kernel is an array or a node, stacked or not."""
    return jnp.sqrt(jnp.sum(jnp.square(materialize(kernel).astype(jnp.float32)), axis=-2))


def _over(m: Any, norm: Any, rank: Any) -> Any:
    """``m / norm``, 1 where the rank or the norm is 0."""
    on = (rank > 0) & (norm > 0)
    return jnp.where(on, m / jnp.where(on, norm, 1.0), 1.0)


def start(kernel: Any, rank: Any) -> Float[Array, "*stack d_out"]:
    """Magnitudes of a new adapter, and the stored norms; both are zero in layers of rank 0.

    Raises:
        UserError: There are only shapes, no values.
    """
    require_values(kernel, "DoRA starts from the norms of the base's kernels")
    return jnp.where(jnp.asarray(rank)[..., None] > 0, base_norm(kernel), 0.0)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel adapted with DoRA."""
    node = DoRAKernel(
        leaf.base,
        leaf.params["a"],
        leaf.params["b"],
        leaf.params["m"],
        norm=leaf.buffers["norm"],
        scale=leaf.buffers["scale"],
        rank=leaf.buffers["rank"],
        dropout=leaf.buffers["dropout"],
        key=leaf.keys(),
    )
    return {leaf.path: node}
