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
        packed segments, whose attention skips tiles, take less than is counted. The body of a
        kernel counts as often as `at_most` says, else once for every point of its grid; what
        every device does of its own, for all of them.
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def at_most(times: int) -> contextlib.AbstractContextManager[Any]:
    """A context for a loop whose trip count is data: `count_flops` takes it for `times`.

    For a kernel it is how often its body does anything, for each of what ``vmap`` maps over.
    """
    return jax.named_scope(f"at_most_{times}_times")


def _count(jaxpr: Any, said: int | None = None) -> int:
    from jax.interpreters import partial_eval

    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return sum(_equation(equation, said) for equation in jaxpr.eqns)


def _equation(equation: Any, said: int | None) -> int:
    """The count of one equation; `said` is what `at_most` says about what it is part of."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
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
