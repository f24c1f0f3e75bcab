"""Batches in which every row has an adapter of its own, for functions that do not know adapters.

Which axis of an array inside a model belongs to the rows of the batch cannot be seen from outside.
So the function is run for one row, with that row's adapter, under ``jax.vmap`` over the rows. The
base is not mapped: it takes part in one product for all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.errors import UserError
from jaxpeft.lifting.trees import is_node

Rows = int | Sequence[int | None] | None
"""The axis of the rows in all inputs, or one for each positional input, None for those without."""


def index_of(node: Any) -> Any:
    """The adapter of every row, if a node or one under it has others for each row; else None."""
    while is_node(node):
        if hasattr(node, "of_row"):
            return node.shared["index"]
        node = getattr(node, "base", None)
    return None


def map_rows(
    function: Callable[..., Any], rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The function's results, computed row by row.

    Args:
        function: A lifted function whose first argument is the tree of parameters.
        rows: Where the rows are.
        args: Its arguments; nodes in the first may differ by row.
        kwargs: Its keyword arguments.

    Raises:
        UserError: The inputs have other rows than the index, or a result has no rows.
    """
    params, *inputs = args
    nodes, tree = jax.tree.flatten(params, is_leaf=is_node)
    index = next(found for node in nodes if (found := index_of(node)) is not None)
    leaves, shape = jax.tree.flatten((inputs, dict(kwargs)))
    axes = _axes(rows, inputs, kwargs)
    mapped = [
        axis if hasattr(leaf, "shape") else None for leaf, axis in zip(leaves, axes, strict=True)
    ]
    along = [axis for axis in mapped if axis is not None]
    if not along:
        raise UserError("lift: rows: no input has rows.")
    for leaf, axis in zip(leaves, mapped, strict=True):
        if axis is not None and (leaf.ndim <= axis or leaf.shape[axis] != len(index)):
            raise UserError(
                f"lift: rows: an input of shape {tuple(leaf.shape)} has no {len(index)} rows on "
                f"axis {axis}, one for each entry of the index."
            )
    given = [leaf for leaf, axis in zip(leaves, mapped, strict=True) if axis is not None]

    def one(position: Any, chosen: Any, row: list[Any]) -> Any:
        todo = iter(row)
        now = [
            leaf if axis is None else jnp.expand_dims(next(todo), axis)
            for leaf, axis in zip(leaves, mapped, strict=True)
        ]
        own = jax.tree.unflatten(tree, [_of_row(node, position, chosen) for node in nodes])
        inner_inputs, inner_kwargs = jax.tree.unflatten(shape, now)
        return jax.tree.map(_without, function(own, *inner_inputs, **inner_kwargs))

    def _without(result: Any) -> Any:
        if result.ndim <= along[0] or result.shape[along[0]] != 1:
            raise UserError(
                f"lift: rows: a result of shape {result.shape} for a batch of one has no rows on "
                f"axis {along[0]}."
            )
        return jnp.squeeze(result, along[0])

    over = (0, 0, along)
    return jax.vmap(one, over, along[0])(jnp.arange(len(index)), index, given)


def _axes(rows: Rows, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int | None]:
    """The axis of the rows in every leaf of the inputs.

    Raises:
        UserError: There is not one axis for each positional input.
    """
    if rows is None or isinstance(rows, int):
        per_input: Sequence[int | None] = [rows] * len(inputs)
        of_kwargs = rows
    else:
        per_input, of_kwargs = list(rows), None
    if len(per_input) != len(inputs):
        raise UserError(f"lift: rows: {len(per_input)} axes for {len(inputs)} inputs.")
    found: list[int | None] = []
    for value, axis in zip([*inputs, dict(kwargs)], [*per_input, of_kwargs], strict=True):
        found += [axis] * len(jax.tree.leaves(value))
    return found


def _of_row(node: Any, position: Any, index: Any) -> Any:
    """The node with the adapter of one row."""
    if not is_node(node):
        return node
    if hasattr(node, "base"):
        node = node.replace(base=_of_row(node.base, position, index))
    return node.of_row(position, index) if hasattr(node, "of_row") else node
