"""Counts the floating-point operations of a program, with the trip counts of its loops.

XLA's ``cost_analysis`` counts the body of a loop once, so under ``nn.scan`` a model of 2 layers and
one of 32 report the same. This module counts products and convolutions in the jaxpr, after dead
code is removed: a product of ``(m, k)`` and ``(k, n)`` takes ``2 m k n`` operations, and every
output of a convolution as many as the product with its window; positions in the padding count,
zeros between dilated inputs do not. Everything else is left out.
"""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core


def count_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the matrix products and convolutions in one call of `function`.

    Args:
        function: A traceable function, jitted or not.
        *args: Its arguments: arrays or ``jax.ShapeDtypeStruct``.
        **kwargs: More of them.

    Returns:
        The count. Of the branches of a ``cond`` the most expensive one is counted. The body of a
        ``while`` loop whose trip count depends on data counts `at_most` times, else once; so the
        count is an upper bound for rows of packed segments, whose attention skips tiles. A kernel's
        body counts `at_most` times, else once per grid point. Work under ``shard_map`` counts for
        every device.
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def at_most(times: int) -> contextlib.AbstractContextManager[Any]:
    """In this context `count_flops` uses `times` as the trip count of loops that depend on data.

    For a kernel, `times` is how often its body does any work, for each element that ``vmap`` maps
    over.
    """
    return jax.named_scope(f"at_most_{times}_times")


def _count(jaxpr: Any, said: int | None = None) -> int:
    from jax.interpreters import partial_eval

    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return sum(_equation(equation, said) for equation in jaxpr.eqns)


def _equation(equation: Any, said: int | None) -> int:
    """The count of one equation; `said` is the trip count of the enclosing `at_most`, if any."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "ragged_dot_general":
        return _ragged(equation)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        out = math.prod(equation.outvars[0].aval.shape)
        return 2 * out * math.prod(kernel) // outputs // math.prod(params["lhs_dilation"])
    if here := re.findall(r"at_most_(\d+)_times", str(equation.source_info.name_stack)):
        said = int(here[-1])
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "cond":
        return max(_count(branch, said) for branch in params["branches"])
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    elif name == "while":
        times, said = said or 1, None
    elif name == "pallas_call":
        mapping = params["grid_mapping"]
        mapped = [mapping.grid[i] for i in mapping.vmapped_dims]
        times, said = math.prod(mapping.grid) if said is None else said * math.prod(mapped), None
    return times * sum(_count(inner, said) for inner in jex_core.jaxprs_in_params(params))


def _ragged(equation: Any) -> int:
    """The count of a product in groups; where the groups split what is summed, each sums a part."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left = equation.invars[0].aval.shape
    groups = equation.invars[2].aval.shape[-1]
    is_split = set(numbers.lhs_ragged_dimensions) & set(contracted)
    products = 2 * math.prod(equation.outvars[0].aval.shape)
    return products * math.prod(left[i] for i in contracted) // (groups if is_split else 1)
