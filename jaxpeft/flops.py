"""Counts the floating-point operations of a program, loops with their trip counts.

XLA's ``cost_analysis`` counts the body of a loop once, so under ``nn.scan`` a model of 2 and one
of 32 layers report the same. Here matrix products are counted from the jaxpr, after dead code is
removed: a product of ``(m, k)`` and ``(k, n)`` is ``2 m k n``; everything else is left out.
"""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core


def count_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the matrix products in one call of `function`.

    Args:
        function: A traceable function, jitted or not.
        *args: Its arguments: arrays or ``jax.ShapeDtypeStruct``.
        **kwargs: More of them.

    Returns:
        The count. Of the branches of a ``cond`` the most expensive one counts; the body of a
        ``while`` whose trip count is data counts as often as `at_most` says, else once. So rows of
        packed segments, whose attention skips tiles, take less than is counted.
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def at_most(times: int) -> contextlib.AbstractContextManager[Any]:
    """A context for a loop whose trip count is data: `count_flops` takes it for `times`."""
    return jax.named_scope(f"at_most_{times}_times")


def _count(jaxpr: Any) -> int:
    from jax.interpreters import partial_eval

    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"])
    if name == "cond":
        return max(_count(branch) for branch in params["branches"])
    times = 1
    if name == "while":
        said = re.findall(r"at_most_(\d+)_times", str(equation.source_info.name_stack))
        times = int(said[-1]) if said else 1
    return times * sum(_count(inner) for inner in jex_core.jaxprs_in_params(params))
