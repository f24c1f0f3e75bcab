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
        table: Whether rows along `ins` are looked up.
        tied: Whether a table is also a kernel, such as the head.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    stack: tuple[int, ...] = ()
    table: bool = False
    tied: bool = False

    def __str__(self) -> str:
        """The axes in a few words, such as "stack 0, in 1, out 2 3"."""
        parts = {"stack": self.stack, "in": self.ins, "out": self.outs}
        listed = (f"{name} {' '.join(map(str, axes))}" for name, axes in parts.items() if axes)
        return ", ".join(listed)

    def without(self, axis: int) -> "Axes":
        """The meaning of the axes that are left when a stack axis is indexed."""

        axes = (_without(axes, axis) for axes in (self.ins, self.outs, self.stack))
        return Axes(*axes, table=self.table, tied=self.tied)


def _without(axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Axes without one of the array's, which its later ones move up for."""
    return tuple(a - (a > axis) for a in axes if a != axis)


@dataclasses.dataclass(frozen=True)
class Use:
    """How a model multiplies with an array, or looks rows up in it.

    Attributes:
        casts: The dtypes to which the model casts the array, in order.
        x: The dtype of the other operand; None where rows are looked up.
        out: The dtype of the result.
        precision: The precision of the product.
        preferred: The dtype in which the product is summed, as the model asks for it.
        left: Whether the array is the product's left operand.
        seen: The array's axes in the order in which the product has them; empty for their own.
        contracted: The axes that the product contracts, in its order; empty for ascending.
        mode: How rows are looked up that the table does not have.
    """

    casts: tuple[Any, ...] = ()
    x: Any = None
    out: Any = None
    precision: Any = None
    preferred: Any = None
    left: bool = False
    seen: tuple[int, ...] = ()
    contracted: tuple[int, ...] = ()
    mode: Any = "fill"

    def without(self, axis: int) -> "Use":
        """The same use of what is left when a stack axis is indexed."""
        seen, contracted = _without(self.seen, axis), _without(self.contracted, axis)
        return dataclasses.replace(self, seen=seen, contracted=contracted)


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
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of the array as the model has it."""
        return tuple(self.raw.shape)

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
        table = jnp.moveaxis(self._cast(use.casts), axis, 0)
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(ids.ndim, ids.ndim + table.ndim - 1)),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
        )
        sizes = (1, *table.shape[1:])
        rows = jax.lax.gather(table, ids[..., None], numbers, sizes, mode=use.mode)
        return rows.reshape(*ids.shape, math.prod(self.outs))

    def through(self, x: Any, operation: Any) -> Any:
        """The operation with the array as it is; see `jaxpeft.lifting.convolutions`."""
        return operation(x, self)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """The kernel with its inputs and outputs flattened."""
        axes = self.axes
        return self.raw.transpose(*axes.stack, *axes.ins, *axes.outs).reshape(self.shape)

    def whole(self) -> Any:
        """The array as the model has it."""
        return self.raw

    def unfold(self, kernel: Float[Array, "*stack d_in d_out"]) -> Any:
        """A kernel of the flattened shape in the shape of the array; undoes `materialize`."""
        order = (*self.axes.stack, *self.axes.ins, *self.axes.outs)
        turned = kernel.reshape(self._sizes(order))
        return turned.transpose([order.index(axis) for axis in range(len(order))])

    def lead(self, position: int) -> tuple[list[Any], Callable[[Sequence[Any]], "Folded"]]:
        """The array with one stack axis in front, and how a slice of it becomes a node again.

        Args:
            position: The stack axis, as a position in `Axes.stack`.
        """
        axis = self.axes.stack[position]
        axes, use = self.axes.without(axis), self.use and self.use.without(axis)
        return [jnp.moveaxis(self.raw, axis, 0)], lambda slices: Folded(slices[0], axes, use)

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.raw_shape[axis] for axis in axes)

    def _cast(self, casts: Sequence[Any]) -> Any:
        raw = self.raw
        for dtype in casts:
            raw = raw.astype(dtype)
        return raw

    def _product(self, x: Any, contracted: tuple[int, ...], left: tuple[int, ...]) -> Any:
        use = self.use
        if use is None or x.dtype != use.out:  # no product of the model, such as DoRA's of factors
            use, raw, how = Use(), self.raw.astype(x.dtype), {}
        else:
            x, raw = x.astype(use.x), self._cast(use.casts)
            how = {"precision": use.precision, "preferred_element_type": use.preferred}
        batch = x.shape[:-1]
        x = x.reshape(*batch, *self._sizes(contracted))
        # The operands as the model has them: another order of sums would round otherwise.
        seen, order = use.seen or tuple(range(raw.ndim)), contracted
        if sorted(use.contracted) == sorted(contracted):
            order = use.contracted
        of_x = tuple(len(batch) + contracted.index(axis) for axis in order)
        of_raw, raw = tuple(map(seen.index, order)), raw.transpose(seen)
        # The result has the axes that are left in the order of the operand.
        back = [sorted(left, key=seen.index).index(axis) for axis in left]
        if use.left:
            y = jax.lax.dot_general(raw, x, ((of_raw, of_x), ((), ())), **how)
            y = y.transpose(*range(len(left), y.ndim), *back)
        else:
            y = jax.lax.dot_general(x, raw, ((of_x, of_raw), ((), ())), **how)
            y = y.transpose(*range(len(batch)), *(len(batch) + at for at in back))
        return y.reshape(*batch, math.prod(self._sizes(left)))


def raw_shape(leaf: Any) -> tuple[int, ...]:
    """The shape in which a model has a parameter: an array, its shape, or a `Folded`."""
    return leaf.raw_shape if isinstance(leaf, Folded) else tuple(leaf.shape)


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
    parts = [_lead(leaf, position) for leaf in leaves]

    def rebuild(slices: Sequence[Any]) -> Any:
        todo = iter(slices)
        again = [make([next(todo) for _ in arrays]) for arrays, make in parts]
        return give_shared(jax.tree.unflatten(tree, again), shared)

    return [array for arrays, _ in parts for array in arrays], rebuild


def _lead(leaf: Any, position: int) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Does what `lead` does for one part of a node."""
    if isinstance(leaf, Folded):
        return leaf.lead(position)
    if jnp.ndim(leaf) > position:
        return [jnp.moveaxis(leaf, position, 0)], lambda slices: slices[0]
    return [], lambda slices: leaf
