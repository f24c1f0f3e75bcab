"""LoRA's kernel node: a frozen kernel with its low-rank factors.

Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685, equation 3.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.core.backend import choices
from jaxpeft.ops.linear import PRODUCT, OnBase, Operation, linear, materialize, through


@flax.struct.dataclass
class LoRAKernel(OnBase):
    """A frozen kernel with its low-rank factors.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        a: ``(d_in, rank)``, float32.
        b: ``(rank, d_out)``, float32.
        scale: Scalar.
        dropout: Scalar probability; used only with a key.
        key: PRNG key of this step and kernel, or None to drop nothing.
        bias: ``(d_out,)``, float32, added to the result of ``b``; None for none.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    dropout: Any = 0.0
    key: Any = None
    bias: Any = None

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Computes ``x @ (base + scale * a @ b) + scale * bias`` without forming the sum.

        Args:
            x: Activations, in the compute dtype.

        Returns:
            Activations in the dtype of `x`. The branch and the sum are computed in the
            factors' dtype (float32) and rounded once, as PEFT does.

        Example:
            >>> kernel = LoRAKernel(base=jnp.eye(2), a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=2.0)
            >>> kernel.multiply(jnp.array([1.0, 0.0]))
            Array([3., 2.], dtype=float32)
        """  # noqa: E501
        y = linear(x, self.base)
        return self._sum(x, y, low_rank(self._dropped(x), self.a, self.b, self.scale))

    def through(self, x: Any, operation: Operation) -> Any:
        """``operation`` with the base and with A; B then multiplies the result."""
        y = through(x, self.base, operation)
        low = checkpoint_name(operation(self._dropped(x), self.a), PRODUCT)
        return self._sum(x, y, (low * self.scale) @ self.b)

    def _dropped(self, x: Any) -> Any:
        h = x.astype(self.a.dtype)
        return h if self.key is None else drop(h, self.dropout, self.key)

    def _sum(self, x: Any, y: Any, low: Any) -> Any:
        low = low if self.bias is None else low + self.bias * self.scale
        return (y.astype(low.dtype) + low).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``base + scale * a @ b`` in float32, rounded to the base's dtype; also of a stack.

        The bias is not part of it.
        """
        scale = jnp.asarray(self.scale, jnp.float32)[..., None, None]
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        total = materialize(self.base).astype(jnp.float32) + scale * product
        return total.astype(self.dtype)

    def product(self) -> tuple[np.ndarray, np.ndarray] | None:
        """See `OnBase.product`; None with a bias, which is not part of a product."""
        return None if self.bias is not None else product_of(self.a, self.b, self.scale)


def low_rank(
    x: Float[Array, "*batch d_in"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
    scale: Any,
) -> Float[Array, "*batch d_out"]:
    """``scale * x @ a @ b``, arranged so that the products of the backward pass are fast too."""
    # With two dimensions the factors' gradients contract one dimension, as plain products. The
    # scale multiplies the small array between the factors, in the backward pass too.
    flat = x.reshape(-1, x.shape[-1])
    # The barrier keeps XLA from undoing the transpose. For 2 or 3 rows XLA cannot compile the
    # gradient of such a product under vmap for CPU: it aborts the process.
    if choices().turn_a and flat.shape[0] >= 4:
        turned = jax.lax.optimization_barrier(a.T)
        narrow = jax.lax.dot_general(flat, turned, (((1,), (1,)), ((), ())))
    else:
        narrow = flat @ a
    wide = (checkpoint_name(narrow, PRODUCT) * scale) @ b
    return wide.reshape(*x.shape[:-1], b.shape[-1])


def product_of(a: Any, b: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    """``a`` and ``scale * b`` in float64, stacked or not."""
    a, b, scale = (np.asarray(x, np.float64) for x in (a, b, scale))
    return a, scale[..., None, None] * b


def drop(x: Float[Array, "..."], rate: Any, key: jax.Array) -> Float[Array, "..."]:
    """Inverted dropout: zeros with probability `rate`, other numbers divided by ``1 - rate``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
