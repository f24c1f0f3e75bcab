"""A parameter on its way through a traced function: what was done to its axes, and its casts.

A model transposes, reshapes and casts a parameter before it multiplies with it. None of that is
done to a node; a `View` only remembers it. Every axis of a view is a row of parts, and a part is a
digit of an axis of the raw array: with the sizes (3, 4), index ``i`` of an axis of 12 has the
digits ``i // 4`` and ``i % 4``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpeft.lifting.folded import folded, lead
from jaxpeft.ops.linear import materialize


class UnroutableError(Exception):
    """A node cannot answer for what the model does; the text says why, as a clause."""


class Part(NamedTuple):
    """A digit of an axis of the raw array.

    Attributes:
        axis: The axis.
        stride: What one step of the digit is worth.
        size: The number of values of the digit.
    """

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Part, ...], ...]
"""Of every axis of a view, its parts, the most significant one first."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A node, and what was done to it.

    Attributes:
        node: Nodes around a `Folded`.
        path: The parameter's path, for messages.
        dims: The parts of each axis.
        origin: Of every axis of the array that is left, its number in the whole parameter.
        casts: The dtypes to which it was cast, in order.
    """

    node: Any
    path: str
    dims: Dims
    origin: tuple[int, ...]
    casts: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the model sees it."""
        return tuple(math.prod(part.size for part in dim) for dim in self.dims)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of the raw array."""
        return folded(self.node).raw_shape

    @property
    def dtype(self) -> Any:
        """The dtype as the model sees it."""
        return self.casts[-1] if self.casts else folded(self.node).dtype

    def with_dims(self, dims: Iterable[Iterable[Part]]) -> "View":
        """The same node with other axes."""
        return dataclasses.replace(self, dims=tuple(tuple(dim) for dim in dims))

    def cast(self, dtype: Any) -> "View":
        """The view cast to a dtype."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(self, casts=(*self.casts, dtype))

    def axes_of(self, dims: Iterable[int]) -> tuple[int, ...] | None:
        """The axes of the raw array that some of the view's axes are made of, ascending.

        Returns:
            None if an axis of the array is there in part only.
        """
        found: dict[int, int] = {}
        for dim in dims:
            for part in self.dims[dim]:
                found[part.axis] = found.get(part.axis, 1) * part.size
        whole = all(self.raw_shape[axis] == size for axis, size in found.items())
        return tuple(sorted(found)) if whole else None

    def array(self, raw: Any) -> Any:
        """Does to an array of the raw shape what was done to the parameter."""
        parts = [part for dim in self.dims for part in dim]
        order = sorted(parts, key=lambda part: (part.axis, -part.stride))
        turned = raw.reshape([part.size for part in order])
        turned = turned.transpose([order.index(part) for part in parts]).reshape(self.shape)
        for dtype in self.casts:
            turned = turned.astype(dtype)
        return turned

    def materialize(self) -> Any:
        """The weight as the array that the model expects."""
        return self.array(folded(self.node).unfold(materialize(self.node)))


def fresh(node: Any, path: str) -> View:
    """The view of a parameter to which nothing was done."""
    shape = folded(node).raw_shape
    return View(node, path, fresh_dims(shape), tuple(range(len(shape))))


def fresh_dims(shape: Sequence[int]) -> Dims:
    """Axes that are those of an array."""
    return tuple((Part(axis, 1, size),) for axis, size in enumerate(shape))


def transposed(view: View, permutation: Sequence[int]) -> View:
    """The view with its axes in another order."""
    return view.with_dims(view.dims[axis] for axis in permutation)


def squeezed(view: View, axes: Iterable[int]) -> View:
    """The view without some axes of size 1."""
    gone = set(axes)
    return view.with_dims(dim for axis, dim in enumerate(view.dims) if axis not in gone)


def reshaped(view: View, shape: Sequence[int]) -> View:
    """The view in another shape.

    Raises:
        UnroutableError: An axis would have to be cut into pieces that overlap.
    """
    todo = [part for dim in view.dims for part in dim if part.size > 1]
    dims: list[tuple[Part, ...]] = []
    for size in shape:
        dim: list[Part] = []
        missing = size
        while missing > 1:
            part = todo.pop(0)
            if missing % part.size == 0:
                dim.append(part)
                missing //= part.size
                continue
            if part.size % missing:
                raise UnroutableError(f"it is reshaped from {view.shape} to {tuple(shape)}")
            inner = part.size // missing
            dim.append(Part(part.axis, part.stride * inner, missing))
            todo.insert(0, Part(part.axis, part.stride, inner))
            missing = 1
        dims.append(_joined(dim))
    ones = [part for dim in view.dims for part in dim if part.size == 1]
    return view.with_dims(_with_ones(dims, shape, ones))


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbours that are digits of one longer digit become that one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last and last.axis == part.axis and last.stride == part.stride * part.size:
            found[-1] = Part(part.axis, part.stride, last.size * part.size)
        else:
            found.append(part)
    return tuple(found)


def _with_ones(
    dims: Sequence[tuple[Part, ...]], shape: Sequence[int], ones: list[Part]
) -> list[tuple[Part, ...]]:
    """Axes of size 1 get the raw array's axes of size 1, in order."""
    return [
        (ones.pop(0),) if size == 1 and ones else dim for dim, size in zip(dims, shape, strict=True)
    ]


def taken(view: View, dim: int, index: Any) -> View:
    """The view at one index of one of its axes, which must be a stack axis of the node.

    Raises:
        UnroutableError: The axis is no stack axis.
    """
    arrays, rebuild = lead_of(view, dim)
    return rebuild([jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in arrays])


def stack_axis(view: View, dim: int) -> int:
    """The axis of the raw array that one of the view's axes is.

    Raises:
        UnroutableError: It is none of the array's stack axes.
    """
    axes = view.axes_of([dim])
    if axes is None or len(axes) != 1 or axes[0] not in folded(view.node).axes.stack:
        raise UnroutableError("an axis that is no stack axis is cut into slices")
    return axes[0]


def lead_of(view: View, dim: int) -> tuple[list[Any], Callable[[Sequence[Any]], View]]:
    """The arrays of a view with one of its axes in front, and how slices become a view again.

    Raises:
        UnroutableError: The axis is no stack axis.
    """
    axis = stack_axis(view, dim)
    arrays, rebuild = lead(view.node, folded(view.node).axes.stack.index(axis))
    dims = tuple(
        tuple(part._replace(axis=part.axis - (part.axis > axis)) for part in parts)
        for at, parts in enumerate(view.dims)
        if at != dim
    )
    origin = tuple(a for at, a in enumerate(view.origin) if at != axis)

    def again(slices: Sequence[Any]) -> View:
        return dataclasses.replace(view, node=rebuild(slices), dims=dims, origin=origin)

    return arrays, again
