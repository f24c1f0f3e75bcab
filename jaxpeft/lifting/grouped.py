"""How a stack of nodes answers for ``ragged_dot``: every row has one node of the stack.

The rows are sorted by their group, and each group has a node. What one node does with one row is
traced, and the trace runs for all rows at once, with three kinds of values: one for each row, one
for each group, and the same one for all. Products of a row's value with a group's become ragged
products themselves, so no weight is copied for each row, and every class of nodes is served.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxpeft.lifting import dialect
from jaxpeft.lifting.interpreter import run


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A value of each row, on the first axis of an array."""

    array: Any


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A value of each group, on the first axis of an array."""

    array: Any


def by_group(
    function: Callable[[Sequence[Any], Any], Any], arrays: Sequence[Any], x: Any, sizes: Any
) -> Any:
    """A function of a group's arrays and a row of that group, for all rows.

    Args:
        function: From the arrays of one group and one row ``(d_in,)`` to one result.
        arrays: The arrays, each with an axis of groups in front.
        x: Rows ``(rows, d_in)``, sorted by group.
        sizes: The number of rows of each group.

    Returns:
        The results, with an axis of rows in front.
    """
    groups = _Grouping(sizes, x.shape[0])
    one = [jax.eval_shape(lambda array: array[0], array) for array in arrays]
    closed = jax.make_jaxpr(function)(one, jax.eval_shape(lambda x: x[0], x))
    inputs = [*(groups.stored(array) for array in arrays), _Rows(x)]
    (result,) = groups.interpret(closed.jaxpr, closed.consts, inputs)
    return groups.rows(result)


class _Grouping:
    """Runs a jaxpr for all rows of all groups."""

    def __init__(self, sizes: Any, rows: int):
        self._sizes, self._rows = sizes, rows
        ends = jnp.cumsum(sizes)
        found = jnp.searchsorted(ends, jnp.arange(rows), side="right")
        self._of_row = jnp.minimum(found, len(sizes) - 1)

    def stored(self, array: Any) -> Any:
        """A value of each group; keys are given out to rows, which draw numbers of their own."""
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return _Groups(array)
        return _Rows(jax.vmap(jax.random.fold_in)(array[self._of_row], jnp.arange(self._rows)))

    def rows(self, value: Any) -> Any:
        """An array with a value for each row."""
        if isinstance(value, _Rows):
            return value.array
        if isinstance(value, _Groups):
            return jnp.take(value.array, self._of_row, axis=0)
        return jnp.broadcast_to(value, (self._rows, *jnp.shape(value)))

    def interpret(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr for values of the three kinds."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            values = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            known.update(zip(eqn.outvars, self._equation(eqn, values), strict=True))
        return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        kinds = {type(value) for value in values} & {_Rows, _Groups}
        if not kinds:
            return run(eqn, values)
        if len(kinds) == 1:
            (kind,) = kinds
            return self._mapped(eqn, values, kind)
        if eqn.primitive.name in dialect.INLINED:
            closed = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            return self.interpret(closed.jaxpr, closed.consts, values)
        if eqn.primitive.name == "dot_general":
            return [_Rows(self._product(eqn, values))]
        return self._mapped(
            eqn, [_Rows(self.rows(v)) if isinstance(v, _Groups) else v for v in values], _Rows
        )

    def _mapped(self, eqn: Any, values: Sequence[Any], kind: Any) -> list[Any]:
        """An equation for each row, or for each group."""
        mapped = [value.array for value in values if isinstance(value, kind)]

        def one(slices: Sequence[Any]) -> list[Any]:
            todo = iter(slices)
            given = [next(todo) if isinstance(value, kind) else value for value in values]
            results = run(eqn, given)
            # A result that nobody reads is None; it needs a place all the same.
            return [jnp.zeros(()) if result is None else result for result in results]

        return [kind(result) for result in jax.vmap(one)(mapped)]

    def _product(self, eqn: Any, values: Sequence[Any]) -> Any:
        """The product of a value of each row with one of each group, in the order of `eqn`."""
        of_row = 0 if isinstance(values[0], _Rows) else 1
        pairs, batches = eqn.params["dimension_numbers"]
        contracted, batch = pairs[of_row], batches[of_row]
        left = _ordered(values[of_row].array, [batch, None, contracted])
        right = _ordered(values[1 - of_row].array, [batches[1 - of_row], pairs[1 - of_row], None])
        # `left` is (rows, batch, free, contracted), `right` is (groups, batch, contracted, free).
        count = left.shape[2]
        rows = jnp.moveaxis(left, 1, 0).reshape(left.shape[1], -1, left.shape[-1])
        weights = jnp.moveaxis(right, 1, 0)

        def ragged(rows: Any, weights: Any) -> Any:
            return jax.lax.ragged_dot(
                rows,
                weights,
                self._sizes * count,
                precision=eqn.params["precision"],
                preferred_element_type=eqn.params["preferred_element_type"],
            )

        if rows.shape[0] == 1:
            y = ragged(rows[0], weights[0])[None]
        else:
            y = jnp.stack([ragged(*pair) for pair in zip(rows, weights, strict=True)])
        y = jnp.moveaxis(y.reshape(rows.shape[0], self._rows, count, -1), 0, 1)
        if of_row == 1:  # the group's own axes come before those of the row
            y = jnp.swapaxes(y, 2, 3)
        return y.reshape(self._rows, *eqn.outvars[0].aval.shape)


def _ordered(array: Any, parts: Sequence[Sequence[int] | None]) -> Any:
    """An operand with one axis for each part of its axes; its first axis stays, uncounted.

    Args:
        array: The operand.
        parts: Axes that become one, in this order; None for those that are in no other part.
    """
    named = [axis for part in parts if part is not None for axis in part]
    free = [axis for axis in range(array.ndim - 1) if axis not in named]
    full = [free if part is None else part for part in parts]
    order = [0, *(axis + 1 for part in full for axis in part)]
    sizes = [math.prod(array.shape[axis + 1] for axis in part) for part in full]
    return array.transpose(order).reshape(array.shape[0], *sizes)
