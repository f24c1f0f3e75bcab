"""Products of activations with kernels, and how what they gave is kept for the backward pass.

This is plain JAX but for bfloat16 on CPU (see `Choices.native_bfloat16`). There XLA has quick
products of bfloat16 (AVX-512, AMX) only where the result is float32, forward and backward; it
rounds after every operation of a chain; and it has no stacks of bfloat16: whenever a layer under a
scan writes its part of a stack, all of it is converted to float32 and back. So products give
float32 here and are rounded, chains are computed in float32, and stacks hold bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.backend import choices


def wide_dtype(x: Any) -> Any:
    """What sums and softmax of `x` are computed in: float32, or the dtype of `x` if it is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def chain_dtype(x: Any) -> Any:
    """What a chain of operations on `x` is computed in, to be rounded once at its end."""
    return jnp.dtype(jnp.float32) if _is_foreign(x) else x.dtype


def product(
    x: Float[Array, "*batch d_in"], w: Float[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """``x @ w``, for arrays of one dtype.

    Of bfloat16 that is not native it has first derivatives in reverse mode alone.
    """
    return _rounded(x, w) if _is_foreign(x) else x @ w


def scores(
    x: Float[Array, "*batch d"], table: Float[Array, "rows d"]
) -> Float[Array, "*batch rows"]:
    """``x @ table.T`` in float32, or in the dtype of `x` if it is wider; arrays of one dtype.

    Of bfloat16 that is not native it has first derivatives in reverse mode alone, and the gradient
    that arrives is rounded to bfloat16.
    """
    return _scores(x, table) if _is_foreign(x) else _scores_of(x, table)


def kept(x: Array, name: str) -> Array:
    """`x`, under a name that policies of ``jax.checkpoint`` may keep."""
    if not _is_foreign(x):
        return checkpoint_name(x, name)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint16)
    return _read(x, checkpoint_name(bits, name))


def kept_input(x: Array, name: str) -> Array:
    """The input of what ``jax.checkpoint`` wraps: kept in any case, see `kept` for how."""
    return kept(x, name) if _is_foreign(x) else x


def _is_foreign(x: Any) -> bool:
    return x.dtype == jnp.bfloat16 and not choices().native_bfloat16


def _number_of(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


@jax.custom_vjp
def _read(x: Array, bits: Array) -> Array:
    """The number of which these are the bits; its gradient is that of `x`, where they are from."""
    del x
    return _number_of(bits)


_read.defvjp(lambda x, bits: (_number_of(bits), None), lambda _, slope: (slope, None))


def _contract(x: Array, y: Array, x_axes: Any, y_axes: Any) -> Array:
    axes = ((tuple(x_axes), tuple(y_axes)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=wide_dtype(x))


def _forward(value: Any, x: Any, w: Any) -> Any:
    """What a product keeps: only what the gradients that are asked for need."""
    return value(x.value, w.value), (
        x.value if w.perturbed else None,
        w.value if x.perturbed else None,
    )


@jax.custom_vjp
def _rounded(x: Array, w: Array) -> Array:
    return _contract(x, w, [x.ndim - 1], [0]).astype(x.dtype)


def _rounded_backward(known: Any, slope: Any) -> Any:
    (x, w), batch = known, range(slope.ndim - 1)
    of_x = None if w is None else _contract(slope, w, [slope.ndim - 1], [1]).astype(slope.dtype)
    of_w = None if x is None else _contract(x, slope, batch, batch).astype(slope.dtype)
    return of_x, of_w


_rounded.defvjp(lambda x, w: _forward(_rounded, x, w), _rounded_backward, symbolic_zeros=True)


def _scores_of(x: Array, table: Array) -> Array:
    return _contract(x, table, [x.ndim - 1], [1])


_scores = jax.custom_vjp(_scores_of)


def _scores_backward(known: Any, slope: Any) -> Any:
    (x, table), batch, slope = known, range(slope.ndim - 1), slope.astype(jnp.bfloat16)
    of_x = (
        None
        if table is None
        else _contract(slope, table, [slope.ndim - 1], [0]).astype(slope.dtype)
    )
    of_table = None if x is None else _contract(slope, x, batch, batch).astype(slope.dtype)
    return of_x, of_table


_scores.defvjp(lambda x, t: _forward(_scores, x, t), _scores_backward, symbolic_zeros=True)
