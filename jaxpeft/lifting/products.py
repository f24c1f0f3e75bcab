"""How a node answers for the products and look-ups of a model that does not know it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.lifting.convolutions import convolution
from jaxpeft.lifting.folded import Use, folded, lead, refold
from jaxpeft.lifting.grouped import by_group
from jaxpeft.lifting.views import Part, UnroutableError, View
from jaxpeft.ops.linear import Node


def product(eqn: Any, values: list[Any]) -> list[Any]:
    """The result of a ``dot_general`` with one view.

    Raises:
        UnroutableError: Both operands are views, or other axes are contracted than the node's.
    """
    if all(isinstance(value, View) for value in values):
        raise UnroutableError("it is multiplied with another adapted parameter")
    left = isinstance(values[0], View)
    view, x = values if left else values[::-1]
    pairs, batches = eqn.params["dimension_numbers"]
    of_view, of_x = (0, 1) if left else (1, 0)
    contracted, batch = pairs[of_view], batches[of_view]
    bottom = folded(view.node)
    turned = _is_turned(view, contracted)
    _require_stack(view, batch)
    use = Use(
        casts=view.casts,
        x=x.dtype,
        out=eqn.outvars[0].aval.dtype,
        precision=eqn.params["precision"],
        preferred=eqn.params["preferred_element_type"],
        left=left,
        **_orders(view, contracted),
    )
    node = refold(view.node, use=use)
    inputs, outputs = bottom.axes.ins, bottom.axes.outs
    if turned:
        inputs, outputs = outputs, inputs
    h = _canonical(x, batches[of_x], pairs[of_x], view, contracted, inputs).astype(use.out)
    positions = [bottom.axes.stack.index(view.axes_of([dim])[0]) for dim in batch]  # pyright: ignore
    y = _multiply(node, h, positions, turned)
    return [_arranged(y, view, contracted, batch, outputs, left)]


def ragged(eqn: Any, values: list[Any]) -> list[Any]:
    """The result of a ``ragged_dot`` with a stack of nodes, one for each group of rows.

    Raises:
        UnroutableError: The view is not the stack, or its axes are not those of the node.
    """
    x, view, sizes = values
    if not isinstance(view, View) or isinstance(x, View) or isinstance(sizes, View):
        raise UnroutableError("it is not what rows are multiplied with")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (of_x, contracted), batches = numbers.dot_dimension_numbers
    group = tuple(numbers.rhs_group_dimensions)
    free = [axis for axis in range(x.ndim) if axis not in of_x]
    if any(batches) or list(numbers.lhs_ragged_dimensions) != free or not group:
        raise UnroutableError("groups of rows are multiplied in a form that is not known")
    turned = _is_turned(view, contracted)
    _require_stack(view, group)
    axes = folded(view.node).axes
    inputs, outputs = (axes.outs, axes.ins) if turned else (axes.ins, axes.outs)
    use = Use(
        casts=view.casts,
        x=x.dtype,
        out=eqn.outvars[0].aval.dtype,
        precision=eqn.params["precision"],
        preferred=eqn.params["preferred_element_type"],
    )
    h = _canonical(x, (), of_x, view, contracted, inputs).astype(use.out)
    arrays, rebuild = lead(refold(view.node, use=use), 0)
    y = by_group(lambda one, row: _multiply(rebuild(one), row, [], turned), arrays, h, sizes)
    return [_arranged(y, view, contracted, group, outputs, left=False)]


def lookup(eqn: Any, values: list[Any]) -> list[Any]:
    """The result of a ``gather`` of whole rows from a table.

    Raises:
        UnroutableError: It gathers something else.
    """
    table, indices = values
    if not isinstance(table, View):
        raise UnroutableError("it is an index")
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes = folded(table.node).axes
    rows = table.axes_of([0])
    batch = indices.ndim - 1
    whole = (
        rows == axes.ins
        and not axes.stack
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and tuple(sizes) == (1, *table.shape[1:])
        and not getattr(numbers, "operand_batching_dims", ())
        and numbers.offset_dims == tuple(range(batch, batch + len(sizes) - 1))
        and table.axes_of(range(1, len(table.dims))) == tuple(sorted(axes.outs))
    )
    if not whole:
        raise UnroutableError("something other than rows of a table is gathered")
    use = Use(casts=table.casts, out=table.dtype, mode=_mode(eqn.params["mode"]))
    node = refold(table.node, use=use)
    found = _supported(node, "lookup")(jnp.asarray(indices)[..., 0]).astype(table.dtype)
    return [_unfolded(found, table, range(1, len(table.dims)), axes.outs)]


def _mode(mode: Any) -> str:
    """The mode of `jnp.take` for a mode of ``gather``."""
    name = str(getattr(mode, "name", mode)).lower()
    known = {"fill_or_drop": "fill", "clip": "clip", "promise_in_bounds": "promise_in_bounds"}
    if name not in known:
        raise UnroutableError(f"rows are gathered in the mode {name}")
    return known[name]


def _orders(view: View, contracted: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The array's axes as a product has them, see `Use`; none where one is cut up or lost."""
    seen, order = (
        tuple(part.axis for dim in dims for part in view.dims[dim])
        for dims in (range(len(view.dims)), contracted)
    )
    whole = sorted(seen) == list(range(len(view.raw_shape)))
    return {"seen": seen, "contracted": order} if whole else {}


def _is_turned(view: View, contracted: Sequence[int]) -> bool:
    """Whether a product contracts the node's outputs instead of its inputs.

    Raises:
        UnroutableError: It contracts neither.
    """
    axes, found = folded(view.node).axes, view.axes_of(contracted)
    shape = view.raw_shape

    def long(chosen: Sequence[int] | None) -> list[int]:
        return sorted(axis for axis in chosen or () if shape[axis] > 1)

    if found is not None and long(found) == long(axes.ins):
        return False
    if found is not None and long(found) == long(axes.outs):
        return True
    names = [view.origin[axis] for axis in found or ()]
    raise UnroutableError(
        f"a product contracts its axes {names}, and the adapter was made for products that "
        f"contract {[view.origin[axis] for axis in axes.ins]}"
        if found is not None
        else "a product contracts a part of an axis"
    )


def _require_stack(view: View, batch: Sequence[int]) -> None:
    stack = set(folded(view.node).axes.stack)
    found = view.axes_of(batch)
    if found is None or set(found) != stack or any(len(view.dims[dim]) != 1 for dim in batch):
        raise UnroutableError("a product does not treat its stack axes as axes of a batch")


def _canonical(
    x: Any,
    batch: Sequence[int],
    contracted: Sequence[int],
    view: View,
    of_view: Sequence[int],
    order: Sequence[int],
) -> Any:
    """The other operand as ``(*batch, *free, d)``, its last axis in the order of the node's."""
    free = [axis for axis in range(x.ndim) if axis not in batch and axis not in contracted]
    x = jnp.asarray(x).transpose(*batch, *free, *contracted)  # a constant may be NumPy's
    parts = [part for dim in of_view for part in view.dims[dim]]
    front = x.shape[: len(batch) + len(free)]
    x = x.reshape(*front, *(part.size for part in parts))
    moved = [parts.index(part) + len(front) for part in _in_order(parts, order)]
    width = math.prod(part.size for part in parts)
    return x.transpose(*range(len(front)), *moved).reshape(*front, width)


def _arranged(
    y: Any,
    view: View,
    contracted: Sequence[int],
    batch: Sequence[int],
    outputs: Sequence[int],
    left: bool,
) -> Any:
    """A product ``(*batch, *free of x, d_out)`` as the model expects it."""
    own = [axis for axis in range(len(view.dims)) if axis not in contracted and axis not in batch]
    y = _unfolded(y, view, own, outputs)
    if not left:
        return y
    begin, end = len(batch), y.ndim - len(own)
    return y.transpose(*range(begin), *range(end, y.ndim), *range(begin, end))


def _unfolded(y: Any, view: View, dims: Any, outputs: Sequence[int]) -> Any:
    """A result whose last axis is all of the node's outputs, with the view's axes `dims` there."""
    dims = list(dims)
    parts = [part for dim in dims for part in view.dims[dim]]
    ordered, front = _in_order(parts, outputs), y.shape[:-1]
    y = y.reshape(*front, *(part.size for part in ordered))
    back = [ordered.index(part) + len(front) for part in parts]
    y = y.transpose(*range(len(front)), *back)
    return y.reshape(*front, *(view.shape[dim] for dim in dims))


def _in_order(parts: Sequence[Part], axes: Sequence[int]) -> list[Part]:
    """Parts in the order in which a node flattens some axes."""
    place = {axis: at for at, axis in enumerate(axes)}
    return sorted(parts, key=lambda part: (place.get(part.axis, len(place)), -part.stride))


def _multiply(node: Any, x: Any, positions: list[int], turned: bool) -> Any:
    """The node times `x`, whose first axes belong to stack axes of the node."""
    if not positions:
        return _turned(node, x) if turned else _supported(node, "multiply")(x)
    first, *rest = positions
    arrays, rebuild = lead(node, first)
    rest = [position - (position > first) for position in rest]
    return jax.vmap(lambda slices, h: _multiply(rebuild(slices), h, rest, turned))(arrays, x)


def _turned(node: Any, x: Any) -> Any:
    """``x`` times the transpose of the node."""
    if type(node).attend is not Node.attend:
        return node.attend(x).astype(x.dtype)
    zeros = jnp.zeros((*x.shape[:-1], node.shape[-2]), x.dtype)
    return jax.vjp(_supported(node, "multiply"), zeros)[1](x)[0]


def _supported(node: Any, operation: str) -> Any:
    """A method of the node.

    Raises:
        UnroutableError: Its class does not have it.
    """
    if getattr(type(node), operation) is getattr(Node, operation):
        text = {"multiply": "a table is used as a kernel", "lookup": "rows of a kernel are read"}
        raise UnroutableError(text[operation])
    return getattr(node, operation)


USES = {
    "dot_general": product,
    "ragged_dot_general": ragged,
    "gather": lookup,
    "conv_general_dilated": convolution,
}
"""What nodes answer for, by name of the primitive."""
