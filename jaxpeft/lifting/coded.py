"""Quantised kernels of models that are not ours."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpeft.lifting.folded import Folded
from jaxpeft.ops.quant import QuantTensor


@flax.struct.dataclass
class Coded(Folded):
    """A quantised array that answers as a kernel ``(*stack, d_in, d_out)``.

    Attributes:
        raw: The codes and scales of the folded kernel, with the stack axes in front.
        sizes: The shape of the array as the model had it.
    """

    raw: QuantTensor
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of the array as the model had it."""
        return self.sizes

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """The kernel with its inputs and outputs flattened, in the dtype that it had."""
        return self.raw.materialize()

    def whole(self) -> Any:
        """The array as the model had it, dequantised."""
        return self.unfold(self.materialize())

    def attend(self, x: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_in"]:
        """``x`` times the turned kernel."""
        zeros = jnp.zeros((*x.shape[:-1], self.raw.d_in), x.dtype)
        return jax.vjp(self.multiply, zeros)[1](x)[0]

    def lead(self, position: int) -> tuple[list[Any], Callable[[Sequence[Any]], "Coded"]]:
        """See `Folded.lead`; codes and scales have the stack axes in front."""
        axis = self.axes.stack[position]
        leaves, tree = jax.tree.flatten(self.raw)
        sizes = tuple(size for at, size in enumerate(self.sizes) if at != axis)

        def rebuild(slices: Sequence[Any]) -> "Coded":
            raw = jax.tree.unflatten(tree, list(slices))
            return Coded(raw, self.axes.without(axis), self.use, sizes)

        return [jnp.moveaxis(leaf, position, 0) for leaf in leaves], rebuild

    def _product(self, x: Any, contracted: tuple[int, ...], left: tuple[int, ...]) -> Any:
        """``x`` times the kernel, which is read in the dtype in which the model multiplies."""
        del contracted, left
        use = self.use
        inner = x if use is None or x.dtype != use.out else x.astype(use.x)
        return self.raw.multiply(inner).astype(x.dtype)
