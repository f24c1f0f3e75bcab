"""The sharding of every leaf, and the functions that place leaves on a mesh."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.core.array_role import ORDINARY, ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.coded import Coded
from jaxpeft.lifting.roles import Role, Roles
from jaxpeft.lifting.trees import map_named, named_leaves, path_text
from jaxpeft.mesh.any_model import axes_by_role, axes_by_size, folded_axes
from jaxpeft.mesh.layouts import Layout, as_layout, spec_of
from jaxpeft.ops.quant import QuantTensor

_OWNERS = ("adapter", "base", "buffers", "frozen")


def param_axes(
    path: str, shape: tuple[int, ...], mesh: Mesh | Layout, role: Role | None = None
) -> tuple[Any, ...]:
    """The mesh axes of a base leaf's dimensions: by its role, by a rule, or by its shape."""
    layout = as_layout(mesh)
    if role is not None:
        return axes_by_role(role, layout)
    axes = layout.axes(path)
    return axes_by_size(shape, layout) if axes is None else axes


def param_sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh | Layout, role: Role | None = None
) -> NamedSharding:
    """The sharding of a base leaf; dimensions that do not divide are replicated."""
    return _place(param_axes(path, shape, mesh, role), shape, mesh)


def leaf_sharding(path: str, leaf: Any, mesh: Mesh | Layout, role: Role | None = None) -> Any:
    """The sharding of an array, or of every array of a quantised kernel.

    A device holds whole blocks of a quantised kernel. One of a model that is not of this package
    lies folded: its inputs are cut over ``fsdp``, and its outputs over ``tensor``.

    Args:
        path: The base leaf's path.
        leaf: An array, a `jaxpeft.ops.quant.QuantTensor` or one that is folded, or shapes.
        mesh: The mesh, or a layout.
        role: Its row from `jaxpeft.describe`, for a model that is not of this package.

    Returns:
        A sharding, or a tree of them with the structure of the leaf.
    """
    if isinstance(leaf, Coded):
        return dataclasses.replace(leaf, raw=_of_blocks(leaf.raw, folded_axes(leaf), mesh))
    if isinstance(leaf, QuantTensor):
        return _of_blocks(leaf, param_axes(path, leaf.shape, mesh, role), mesh)
    return param_sharding(path, leaf.shape, mesh, role)


def _of_blocks(leaf: QuantTensor, wanted_axes: Sequence[Any], mesh: Mesh | Layout) -> QuantTensor:
    """The shardings of codes and scales, in their places."""
    *stack, rows, columns = (*wanted_axes, None, None, None)[: len(leaf.shape)]
    axes = {
        "codes": (*stack, rows, None, columns),
        "scale": (*stack, rows, columns),
        "group_scale": (*stack, rows, None),
        "offset": (*stack,),
    }
    places = {}
    for field, wanted in axes.items():
        array = getattr(leaf, field)
        places[field] = None if array is None else _place(wanted, array.shape, mesh)
    return dataclasses.replace(leaf, **places)


def adapter_sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh | Layout, arrays: Mapping[str, ArrayRole]
) -> NamedSharding:
    """The sharding of an adapter's leaf.

    Args:
        path: Base path and name of the array: ``layers/self_attn/q_proj/kernel/a``.
        shape: The array's shape.
        mesh: The mesh, or a layout.
        arrays: The roles of the adapter's arrays by name, `Kind.arrays` of its family.

    Returns:
        For an array that belongs to one side of the kernel (LoRA's factors), the tensor axis of
        that side. For an array that replaces the whole leaf, the axes of that leaf. Everything else
        is replicated.
    """
    owner, _, name = path.rpartition("/")
    axes, role = as_layout(mesh).axes(owner) or (), arrays.get(name, ORDINARY)
    if role.replaces == "whole":
        return param_sharding(owner, shape, mesh)
    if role.side is None or len(axes) < 2:
        return _place((), shape, mesh)
    own: list[str | None] = [None] * len(shape)
    if (axis := axes[-2] if role.side == "in" else axes[-1]) == "tensor":
        own[-2 if role.rank_axis == -1 else -1] = axis
    return _place(tuple(own), shape, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over data and fsdp, further dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def process_rows(mesh: Mesh, batch_size: int) -> list[int] | None:
    """The rows of a batch on this process's devices; None for all, in a run of one process."""
    if jax.process_count() == 1:
        return None
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for rows in held if rows for row in range(*rows[0].indices(batch_size))})


def put_batch(batch: Mapping, mesh: Mesh, batch_size: int) -> dict:
    """Puts a batch on the mesh.

    Args:
        batch: Arrays with the rows that `process_rows` names.
        mesh: The mesh.
        batch_size: Number of rows of all processes.

    Returns:
        Whole arrays, with rows split over data and fsdp.
    """
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), where)
    return {
        name: jax.make_array_from_process_local_data(where, part, (batch_size, *part.shape[1:]))
        for name, part in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh | Layout, arrays: Mapping[str, ArrayRole]) -> Any:
    """Shardings for a `jaxpeft.updates.step.TrainState` (or its shapes), leaf by leaf.

    Trained arrays and their moments are found by the part of their path behind ``adapter`` or
    ``base``. Counters, keys, and moments whose shape differs from their array's (Adafactor's) are
    replicated.

    Args:
        state: The state; arrays or shapes.
        mesh: The mesh, or a layout.
        arrays: The roles of the adapter's arrays, as for `adapter_sharding`.

    Returns:
        A tree of shardings with the structure of `state`.
    """

    def owner_of(keys: Any) -> tuple[str, str] | None:
        names = [path_text([key]) for key in keys]
        at = next((at for at, name in enumerate(names[:-1]) if name in _OWNERS), None)
        return None if at is None else (names[at], path_text(keys[at + 1 :]))

    trained = jax.tree_util.tree_leaves_with_path(state.trained)
    shapes = {owner_of(path): leaf.shape for path, leaf in trained}

    def place(path: Any, leaf: Any) -> NamedSharding:
        owner = owner_of(path)
        if owner is None or shapes.get(owner, leaf.shape) != leaf.shape:
            return replicated(as_layout(mesh).mesh)
        if owner[0] == "base":
            return param_sharding(owner[1], leaf.shape, mesh)
        return adapter_sharding(owner[1], leaf.shape, mesh, arrays)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree of arrays or shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def shard_params(params: Any, mesh: Mesh | Layout, roles: Roles | None = None) -> Any:
    """Places base parameters on the mesh, by the rules or by what their axes mean.

    Args:
        params: Base parameters: nested dicts, or any other tree, such as an ``nnx.State``.
        mesh: Over ``data``, ``fsdp`` and ``tensor``, see `make_mesh`; or a layout.
        roles: For a model that is not of this package, what `jaxpeft.describe` found. Then kernels
            are cut by their inputs and outputs, and axes of a stack never are. Without roles, every
            leaf that no rule names is cut over ``fsdp`` along its last axis. See
            `jaxpeft.mesh.any_model`.

    Returns:
        The same tree, of the same kind. Vectors, and leaves whose dimensions do not divide, are
        replicated; `unsharded` names the latter.

    Raises:
        UserError: The roles are those of another tree.
    """
    return map_named(
        lambda path, leaf: jax.device_put(
            leaf, leaf_sharding(path, leaf, mesh, _role_of(path, roles))
        ),
        params,
    )


def unsharded(params: Any, mesh: Mesh | Layout, roles: Roles | None = None) -> list[str]:
    """Names the base leaves that are replicated for lack of a rule or of divisibility, and why.

    Args:
        params: As for `shard_params`, or shapes.
        mesh: As for `shard_params`.
        roles: As for `shard_params`.

    Raises:
        UserError: The roles are those of another tree.
    """
    layout, notes = as_layout(mesh), []
    for path, leaf in named_leaves(params).items():
        role = _role_of(path, roles)
        if isinstance(leaf, Coded):
            notes += _uneven_blocks(path, leaf.raw, folded_axes(leaf), layout)
            continue
        axes = param_axes(path, leaf.shape, layout, role)
        ruled = role is None and layout.axes(path) is not None
        if not ruled and axes and layout.mesh.size > 1 and not any(axes):
            lack = "no rule, and " if role is None else ""
            notes.append(f"{path}: {lack}{_no_cut(leaf.shape, layout, role)}")
            continue
        if ruled and (heads := layout.cut_heads(path)) and axes != spec_of(path, layout.rules):
            notes.append(f"{path}: {heads} heads do not divide by tensor {layout.shape['tensor']}")
        if isinstance(leaf, QuantTensor):
            notes += _uneven_blocks(path, leaf, axes, layout)
            continue
        for size, axis in zip(leaf.shape, axes, strict=False):
            if axis and size % layout.shape[axis]:
                notes.append(f"{path}: {size} does not divide by {axis} {layout.shape[axis]}")
    return notes


def _role_of(path: str, roles: Roles | None) -> Role | None:
    if roles is None:
        return None
    if path not in roles:
        raise UserError(f"roles: they have no {path}; describe the model with these parameters.")
    return roles[path]


def _no_cut(shape: Sequence[int], layout: Layout, role: Role | None) -> str:
    """Why no axis of a leaf without a rule is cut."""
    names = ("fsdp",) if role is None else ("fsdp", "tensor")
    cuts = [f"{name} {layout.shape[name]}" for name in names if layout.shape[name] > 1]
    sizes = " x ".join(map(str, shape))
    if not cuts:
        return f"the mesh has no {' and no '.join(names)}"
    return f"nothing to cut of {sizes} divides by {' or '.join(cuts)}"


def _uneven_blocks(
    path: str, leaf: QuantTensor, axes: Sequence[str | None], layout: Layout
) -> list[str]:
    """Names dimensions that are replicated because their whole blocks cannot be divided."""
    blocks, _, columns = leaf.codes.shape[-3:]
    pair = (*axes, None, None, None)[: len(leaf.shape)][-2:]
    sizes = zip((blocks, columns), pair, ("blocks of 64", "columns"), strict=True)
    return [
        f"{path}: {size} {what} do not divide by {axis} {layout.shape[axis]}"
        for size, axis, what in sizes
        if axis and size % layout.shape[axis]
    ]


def _place(axes: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | Layout) -> NamedSharding:
    layout = as_layout(mesh)

    def fits(size: int, axis: Any) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(layout.shape[name] for name in names) == 0

    fitting = [axis if fits(size, axis) else None for size, axis in zip(shape, axes, strict=False)]
    return NamedSharding(layout.mesh, PartitionSpec(*fitting))
