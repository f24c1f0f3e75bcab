"""Products of activations with kernels, and how what they gave is kept for the backward pass.

This is plain JAX but for bfloat16 on CPU (see `Choices.native_bfloat16`). There XLA has quick
products of bfloat16 (AVX-512, AMX) only where the result is float32, forward and backward; it
rounds after every operation of a chain; and it has no stacks of bfloat16: whenever a layer under a
scan writes its part of a stack, all of it is converted to float32 and back. So products give
float32 here and are rounded, chains are computed in float32, and what ``jax.checkpoint`` keeps by
name is kept as bits. All of that has first derivatives in reverse mode and no others; a model that
computes in float32 has them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxpeft.core.backend import choices
from jaxpeft.core.errors import UserError


def wide_dtype(x: Any) -> Any:
    """What sums and softmax of `x` are computed in: float32, or the dtype of `x` if it is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def chain_dtype(x: Any) -> Any:
    """What a chain of operations on `x` is computed in, to be rounded once at its end."""
    return x.dtype if _is_native(x) else wide_dtype(x)


def product(
    x: Float[Array, "*batch d_in"], w: Float[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """``x @ w``, for arrays of one dtype."""
    return x @ w if _is_native(x) else _rounded(x, w)


def scores(
    x: Float[Array, "*batch d"], table: Float[Array, "rows d"]
) -> Float[Array, "*batch rows"]:
    """``x @ table.T`` in float32, or in the dtype of `x` if it is wider; arrays of one dtype.

    Where bfloat16 is not native the gradient that arrives is rounded to it.
    """
    return _scores_of(x, table) if _is_native(x) else _scores(x, table)


def kept(x: Array, name: str) -> Array:
    """`x`, under a name that policies of ``jax.checkpoint`` may keep."""
    return checkpoint_name(x, name) if _is_native(x) else _kept(x, name)


def kept_by_rule(x: Array, name: str) -> Array:
    """`kept` for the forward half of a ``jax.custom_vjp``, which is not differentiated."""
    return checkpoint_name(x, name) if _is_native(x) else _through_bits(x, name)


def kept_input(x: Array, name: str) -> Array:
    """The input of what ``jax.checkpoint`` wraps: kept in any case, see `kept` for how."""
    return x if _is_native(x) else _kept(x, name)


def _is_native(x: Any) -> bool:
    return x.dtype != jnp.bfloat16 or choices().native_bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kept(x: Array, name: str) -> Array:
    del name
    return x


_kept.defvjp(lambda x, name: (_through_bits(x, name), None), lambda name, _, slope: (slope,))


def _through_bits(x: Array, name: str) -> Array:
    """`x`, read from its bits, which have the name. Bits have no derivative: none may be asked."""
    bits = jax.lax.bitcast_convert_type(_constant(x), jnp.uint16)
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


@jax.custom_jvp
def _constant(x: Array) -> Array:
    return x


@_constant.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise UserError(
        "a model that computes in bfloat16 on CPU has first derivatives in reverse mode only: "
        'load it with compute_dtype="float32".'
    )


def _contract(x: Array, y: Array, x_axes: Any, y_axes: Any) -> Array:
    axes = ((tuple(x_axes), tuple(y_axes)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=wide_dtype(x))


def _rounded_of(x: Array, w: Array) -> Array:
    return _contract(x, w, [x.ndim - 1], [0]).astype(x.dtype)


def _scores_of(x: Array, table: Array) -> Array:
    return _contract(x, table, [x.ndim - 1], [1])


def _forward(function: Any, x: Any, w: Any) -> Any:
    """What a product gives, and what it keeps: only what the gradients that are asked for need."""
    return function(x.value, w.value), (
        x.value if w.perturbed else None,
        w.value if x.perturbed else None,
    )


def _backward(out_axis: int, known: Any, slope: Any) -> Any:
    """Gradients of a product whose result has this axis of `w`, which it contracts the other of."""
    if isinstance(slope, SymbolicZero):
        return None, None
    x, w = known
    slope = slope.astype(jnp.bfloat16)
    of_x = of_w = None
    if w is not None:
        of_x = _contract(slope, w, [slope.ndim - 1], [out_axis]).astype(slope.dtype)
    if x is not None:
        batch = range(slope.ndim - 1)
        pair = (slope, x) if out_axis == 0 else (x, slope)
        of_w = _contract(*pair, batch, batch).astype(slope.dtype)
    return of_x, of_w


def _with_rule(function: Any, out_axis: int) -> Any:
    rule = jax.custom_vjp(function)
    rule.defvjp(
        functools.partial(_forward, function),
        functools.partial(_backward, out_axis),
        symbolic_zeros=True,
    )
    return rule


_rounded = _with_rule(_rounded_of, 1)
_scores = _with_rule(_scores_of, 0)
