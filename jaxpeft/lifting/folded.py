"""Raw arrays of any rank that answer as kernels and tables.

A model may keep a kernel as ``(d_model, heads, head_dim)``, turned, or stacked over layers on any
axis. `Folded` holds such an array as it is, and the axes that its products contract. It answers as
a kernel ``(*stack, d_in, d_out)`` whose inputs and outputs are flattened in the order of the axes.
So the nodes of all methods work on it, and no turned copy is made.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpeft.ops.linear import Node, give_shared, take_field


@dataclasses.dataclass(frozen=True)
class Axes:
    """The meaning of the axes of an array.

    Attributes:
        ins: Axes that products contract; for a table, the axis of its rows.
        outs: Axes that results have.
        stack: Axes over which several kernels are stacked, such as layers or experts.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    stack: tuple[int, ...] = ()

    def without(self, axis: int) -> "Axes":
        """The meaning of the axes that are left when a stack axis is indexed."""

        def keep(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a - (a > axis) for a in axes if a != axis)

        return Axes(keep(self.ins), keep(self.outs), keep(self.stack))


@dataclasses.dataclass(frozen=True)
class Use:
    """How a model multiplies with an array, or looks rows up in it.

    Attributes:
        casts: The dtypes to which the model casts the array, in order.
        x: The dtype of the other operand; None where rows are looked up.
        out: The dtype of the result.
        precision: The precision of the product.
        preferred: The dtype in which the product is summed, as the model asks for it.
        mode: How rows are looked up that the table does not have.
    """

    casts: tuple[Any, ...] = ()
    x: Any = None
    out: Any = None
    precision: Any = None
    preferred: Any = None
    mode: Any = "fill"


@flax.struct.dataclass
class Folded(Node):
    """An array that answers as a kernel ``(*stack, d_in, d_out)``, or as a table of ``d_in`` rows.

    Attributes:
        raw: The array as the model has it.
        axes: What its axes mean.
        use: How the model uses it here; None outside of a lifted function.
    """

    raw: Any
    axes: Axes = flax.struct.field(pytree_node=False)
    use: Use | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, d_in, d_out)``."""
        return (*self.stack, math.prod(self._sizes(self.axes.ins)), math.prod(self.outs))

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes over which kernels are stacked."""
        return self._sizes(self.axes.stack)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.raw.dtype

    @property
    def outs(self) -> tuple[int, ...]:
        """The sizes of the axes that results have."""
        return self._sizes(self.axes.outs)

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x`` times the array, by the product that the model itself would do."""
        return self._product(x, self.axes.ins, self.axes.outs)

    def attend(self, x: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_in"]:
        """``x`` times the turned array."""
        return self._product(x, self.axes.outs, self.axes.ins)

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_out"]:
        """Rows of a table, by the model's own rule for ids that it does not have."""
        use = self.use or Use()
        (axis,) = self.axes.ins
        rows = jnp.take(self._cast(use.casts), ids, axis=axis, mode=use.mode)
        # `take` puts the axes of the ids where the axis of the rows was.
        rows = jnp.moveaxis(rows, range(axis, axis + ids.ndim), range(ids.ndim))
        return rows.reshape(*ids.shape, math.prod(self.outs))

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """The kernel with its inputs and outputs flattened."""
        axes = self.axes
        return self.raw.transpose(*axes.stack, *axes.ins, *axes.outs).reshape(self.shape)

    def unfold(self, kernel: Float[Array, "*stack d_in d_out"]) -> Any:
        """A kernel of the flattened shape in the shape of the array; undoes `materialize`."""
        order = (*self.axes.stack, *self.axes.ins, *self.axes.outs)
        turned = kernel.reshape(self._sizes(order))
        return turned.transpose([order.index(axis) for axis in range(len(order))])

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.raw.shape[axis] for axis in axes)

    def _cast(self, casts: Sequence[Any]) -> Any:
        raw = self.raw
        for dtype in casts:
            raw = raw.astype(dtype)
        return raw

    def _product(self, x: Any, contracted: tuple[int, ...], left: tuple[int, ...]) -> Any:
        use = self.use
        if use is None or x.dtype != use.out:  # no product of the model, such as DoRA's of factors
            raw, how = self.raw.astype(x.dtype), {}
        else:
            x, raw = x.astype(use.x), self._cast(use.casts)
            how = {"precision": use.precision, "preferred_element_type": use.preferred}
        batch = x.shape[:-1]
        x = x.reshape(*batch, *self._sizes(contracted))
        pairs = tuple(range(len(batch), x.ndim)), contracted
        y = jax.lax.dot_general(x, raw, (pairs, ((), ())), **how)
        # The result has the axes that are left in the order of the array.
        order = [sorted(left).index(axis) + len(batch) for axis in left]
        y = y.transpose(*range(len(batch)), *order)
        return y.reshape(*batch, math.prod(self._sizes(left)))


def bottom(node: Any) -> Any:
    """What is under nested nodes: a `Folded`, another node without a base, or an array."""
    while not isinstance(node, Folded) and hasattr(node, "base"):
        node = node.base
    return node


def folded(node: Any) -> Folded:
    """The `Folded` under nested nodes.

    Raises:
        TypeError: There is none.
    """
    found = bottom(node)
    if not isinstance(found, Folded):
        raise TypeError(f"{type(found).__name__} is no array of a model with its axes")
    return found


def refold(node: Any, **changes: Any) -> Any:
    """The same nodes around a changed `Folded`."""
    if isinstance(node, Folded):
        return node.replace(**changes)  # pyright: ignore[reportAttributeAccessIssue]
    return node.replace(base=refold(node.base, **changes))


def lead(node: Any, position: int) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a stacked node with one stack axis in front, and how to rebuild the node.

    Args:
        node: Nodes around a `Folded`.
        position: The stack axis, as a position in `Axes.stack`.

    Returns:
        The arrays, and a function from one slice of each to the node without that axis. Arrays that
        the whole stack shares are not among them.
    """
    inner, shared = take_field(node)
    leaves, tree = jax.tree.flatten(inner, is_leaf=lambda leaf: isinstance(leaf, Folded))
    axis = folded(node).axes.stack[position]
    arrays, stacked = [], []
    for leaf in leaves:
        if isinstance(leaf, Folded):
            arrays.append(jnp.moveaxis(leaf.raw, axis, 0))
        elif jnp.ndim(leaf) > position:
            arrays.append(jnp.moveaxis(leaf, position, 0))
        stacked.append(isinstance(leaf, Folded) or jnp.ndim(leaf) > position)

    def rebuild(slices: Sequence[Any]) -> Any:
        todo, parts = iter(slices), []
        for leaf, is_stacked in zip(leaves, stacked, strict=True):
            part = next(todo) if is_stacked else leaf
            if isinstance(leaf, Folded):
                part = Folded(part, leaf.axes.without(axis), leaf.use)
            parts.append(part)
        return give_shared(jax.tree.unflatten(tree, parts), shared)

    return arrays, rebuild
