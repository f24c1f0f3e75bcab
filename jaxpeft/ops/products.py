"""Products of activations with kernels, and how their results are kept for the backward pass.

This is plain JAX except for bfloat16 on CPU (see `Choices.native_bfloat16`). There XLA has three
weaknesses. It has fast products of bfloat16 (AVX-512, AMX) only if the result is float32, forward
and backward. It rounds after every operation of a chain. It cannot update a stack of bfloat16 in
place: whenever a layer under a scan writes its part of a stack, the whole stack is converted to
float32 and back.

So on CPU products return float32 and are then rounded, chains of operations run in float32, and
arrays that ``jax.checkpoint`` keeps by name are kept as bits. These functions have first
derivatives in reverse mode only. A model that computes in float32 has all derivatives.
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
    """The dtype for sums and softmax of `x`: float32, or the dtype of `x` if that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def chain_dtype(x: Any) -> Any:
    """The dtype for a chain of operations on `x`, whose result is rounded once at its end."""
    return x.dtype if _is_native(x) else wide_dtype(x)


def product(
    x: Float[Array, "*batch d_in"], w: Float[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """``x @ w`` for arrays of the same dtype."""
    return x @ w if _is_native(x) else _rounded(x, w)


def scores(
    x: Float[Array, "*batch d"], table: Float[Array, "rows d"]
) -> Float[Array, "*batch rows"]:
    """``x @ table.T`` in float32, or in the dtype of `x` if that is wider.

    Both arrays have the same dtype. Where bfloat16 is not native, the incoming cotangent is rounded
    to bfloat16.
    """
    return _scores_of(x, table) if _is_native(x) else _scores(x, table)


def kept(x: Array, name: str) -> Array:
    """`x`, tagged with a name that policies of ``jax.checkpoint`` may keep."""
    return checkpoint_name(x, name) if _is_native(x) else _kept(x, name)


def kept_by_rule(x: Array, name: str) -> Array:
    """`kept` for the forward half of a ``jax.custom_vjp``, which JAX does not differentiate."""
    return checkpoint_name(x, name) if _is_native(x) else _through_bits(x, name)


def kept_input(x: Array, name: str) -> Array:
    """The input of a function that ``jax.checkpoint`` wraps. It is always kept; `kept` says how."""
    return x if _is_native(x) else _kept(x, name)


def _is_native(x: Any) -> bool:
    return x.dtype != jnp.bfloat16 or choices().native_bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kept(x: Array, name: str) -> Array:
    del name
    return x


_kept.defvjp(lambda x, name: (_through_bits(x, name), None), lambda name, _, slope: (slope,))


def _through_bits(x: Array, name: str) -> Array:
    """`x` read back from its bits, which carry the tag; bits have no derivative."""
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
    """A product, and the operands that the requested gradients need."""
    return function(x.value, w.value), (
        x.value if w.perturbed else None,
        w.value if x.perturbed else None,
    )


def _backward(out_axis: int, known: Any, slope: Any) -> Any:
    """Gradients of a product; `out_axis` is the axis of `w` that the result has."""
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
