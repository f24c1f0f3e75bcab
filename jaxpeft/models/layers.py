"""Layers of a decoder: weights that may be nodes, linear layers, norms."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpeft.mesh.constraints import gathered
from jaxpeft.ops.linear import CAPTURE, SHARED, give_shared, linear, shape_of
from jaxpeft.ops.products import wide_dtype


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], init: Any, *, gather: bool = True
) -> Any:
    """Fetches a parameter that may be a node; only its logical shape is checked.

    Linen's own ``param`` compares the first raw leaf of a node with the declared shape.

    Args:
        module: The module that owns it, inside its call.
        name: The parameter's name.
        shape: Its logical shape, without the layer axis.
        init: Linen initialiser.
        gather: Gather it for use, see `jaxpeft.mesh.constraints.gathered`; else it stays sharded.

    Returns:
        An array or a node.

    Raises:
        ValueError: If the parameter has another shape.
    """
    if module.is_initializing() or not module.has_variable("params", name):
        return module.param(name, init, shape)
    where = "/".join((*module.path, name))
    value = module.get_variable("params", name)
    value = gathered(where, value) if gather else value
    if module.has_variable(SHARED, name):
        value = give_shared(value, module.get_variable(SHARED, name))
    if shape_of(value) != tuple(shape):
        raise ValueError(f"{where} has shape {shape_of(value)}, the config asks for {shape}.")
    return value


class Weight(nn.Module):
    """Owns one parameter, the embedding table or the head, and returns it without gathering it."""

    leaf: str
    shape: tuple[int, ...]
    stddev: float

    @nn.compact
    def __call__(self) -> Any:
        """The parameter, an array or a node."""
        init = nn.initializers.normal(self.stddev)
        return weight(self, self.leaf, self.shape, init, gather=False)


class Linear(nn.Module):
    """``x @ kernel + bias``."""

    features: int
    use_bias: bool
    stddev: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Applies the kernel, then the bias in the dtype of `x`."""
        if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
            self.sow(CAPTURE, "inputs", x)
        init = nn.initializers.normal(self.stddev)
        y = linear(x, weight(self, "kernel", (x.shape[-1], self.features), init))
        if self.use_bias:
            bias = weight(self, "bias", (self.features,), nn.initializers.zeros)
            y += bias.astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """Root mean square normalisation in float32 (Zhang and Sennrich, 2019, equation 4)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises the last axis and scales it."""
        scale = weight(self, "scale", (x.shape[-1],), nn.initializers.ones)
        wide = x.astype(wide_dtype(x))
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)
