"""Rules of the interpreter for operations that only move the axes of a view, or cast it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.lifting import views
from jaxpeft.lifting.interpreter import Context, Rule
from jaxpeft.lifting.views import UnroutableError, View


def _transpose(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    return [views.transposed(values[0], eqn.params["permutation"])]


def _reshape(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    if eqn.params.get("dimensions") is not None:
        raise UnroutableError("it is reshaped in another order of its axes")
    return [views.reshaped(values[0], eqn.params["new_sizes"])]


def _squeeze(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    return [views.squeezed(values[0], eqn.params["dimensions"])]


def _expand(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    """``broadcast_in_dim`` that only adds axes of size 1."""
    view, shape = values[0], eqn.params["shape"]
    target = eqn.params["broadcast_dimensions"]
    if any(view.shape[at] != shape[axis] for at, axis in enumerate(target)) or any(
        size != 1 for axis, size in enumerate(shape) if axis not in target
    ):
        raise UnroutableError(f"it is broadcast from {view.shape} to {tuple(shape)}")
    dims: list[Any] = [()] * len(shape)
    for at, axis in enumerate(target):
        dims[axis] = view.dims[at]
    return [view.with_dims(dims)]


def _convert(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    dtype = np.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UnroutableError(f"it is converted to {dtype}")
    return [values[0].cast(dtype)]


def _same(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    return [values[0]]


def _stop_gradient(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    """A constant weight is made of constant arrays."""
    held = jax.tree.map(jax.lax.stop_gradient, values[0].node)
    return [dataclasses.replace(values[0], node=held)]


def _barrier(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    arrays = [value for value in values if not isinstance(value, View)]
    held = iter(jax.lax.optimization_barrier(arrays) if arrays else [])
    return [value if isinstance(value, View) else next(held) for value in values]


def _slice(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    """One index of a stack axis, whose axis of size 1 stays until it is squeezed."""
    view, begins, ends = values[0], eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(begins)
    cut = [
        axis
        for axis, size in enumerate(view.shape)
        if (begins[axis], ends[axis], strides[axis]) != (0, size, 1)
    ]
    return [_picked(view, cut, [ends[a] - begins[a] for a in cut], [begins[a] for a in cut])]


def _dynamic_slice(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    view, *starts = values
    sizes = eqn.params["slice_sizes"]
    if not isinstance(view, View):
        raise UnroutableError("it is an index")
    cut = [axis for axis, size in enumerate(view.shape) if sizes[axis] != size]
    return [_picked(view, cut, [sizes[a] for a in cut], [starts[a] for a in cut])]


def _split(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    """Every index of a stack axis by itself, whose axis of size 1 stays."""
    view, axis, sizes = values[0], eqn.params["axis"], eqn.params["sizes"]
    cut = [axis] if len(sizes) > 1 else []
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return [_picked(view, cut, [size], [start]) for size, start in zip(sizes, starts, strict=True)]


def _unstack(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    axis = eqn.params["axis"]
    return [views.taken(values[0], axis, at) for at in range(values[0].shape[axis])]


def _picked(view: View, cut: list[int], sizes: list[Any], starts: list[Any]) -> View:
    if not cut:
        return view
    if len(cut) > 1 or sizes != [1]:
        raise UnroutableError("a part of it is cut out")
    (axis,), (start,) = cut, starts
    picked = views.taken(view, axis, start)
    return picked.with_dims((*picked.dims[:axis], (), *picked.dims[axis:]))


MOVES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "pvary": _same,
    "stop_gradient": _stop_gradient,
    "sharding_constraint": _same,
    "optimization_barrier": _barrier,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
}
"""By name of the primitive. A constraint on the sharding of a parameter moves nothing here: the
node's arrays keep the sharding that they have. Inside a ``shard_map`` the node's own products say
over which devices their operands vary."""
