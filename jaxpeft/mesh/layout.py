"""Where arrays live: one table of path patterns over the mesh ``("data", "fsdp", "tensor")``.

A base leaf takes the first rule whose pattern matches its whole path; a config may put rules of
its own in front. Dimensions that do not divide, heads that would be cut, and leaves without a rule,
are replicated, and `unsharded` names them. An adapter's
factors keep their kernel's tensor axis, are replicated over fsdp, and never split the rank; the
optimizer's moments follow their parameter. Batches are split over data and fsdp.

Reference:
    Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3 (which side
    of each matrix the tensor axis cuts).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.models.config import ModelConfig
from jaxpeft.ops.quant import QuantTensor

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embed_tokens/embedding", ("tensor", "fsdp")),
    ("lm_head/kernel", ("fsdp", "tensor")),
    ("layers/self_attn/(q|k|v)_proj/kernel", (None, "fsdp", "tensor")),
    ("layers/self_attn/(q|k|v)_proj/bias", (None, "tensor")),
    ("layers/self_attn/o_proj/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/(gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    ("layers/mlp/(gate|up)_proj/bias", (None, "tensor")),
    ("layers/mlp/down_proj/kernel", (None, "tensor", "fsdp")),
    (".*/bias", ()),
    (".*scale", ()),
)
"""Pattern of a base path, and the mesh axis of each dimension."""

VOCAB = ("tensor", "fsdp")

HEADS: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    paths.HEAD: (None, VOCAB),
    paths.EMBEDDING: (VOCAB, None),
}
"""Where what makes logits lives meanwhile: each device has its part of the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with what decides where a leaf lives on it.

    Attributes:
        mesh: Over ``data``, ``fsdp`` and ``tensor``.
        rules: Rules in front of `RULES`, see `parse_rules`.
        model: Sizes of the model, so that the tensor axis never cuts a head: with more shards than
            key/value heads their projections are replicated. None allows any cut that divides.
        gathered: Where weights live while they are used: without fsdp, and `HEADS` as they say.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    model: ModelConfig | None = None
    gathered: bool = False

    @property
    def shape(self) -> Mapping[str, int]:
        """Devices along every axis of the mesh."""
        return self.mesh.shape

    @property
    def spreads_vocab(self) -> bool:
        """Whether every device of the fsdp and tensor axes can have its part of the vocabulary."""
        shards = self.shape["tensor"] * self.shape["fsdp"]
        return self.model is not None and self.model.vocab_size % shards == 0

    def axes(self, path: str) -> tuple[Any, ...] | None:
        """The mesh axes of a base leaf's dimensions as far as heads allow; None without a rule."""
        if self.gathered and self.spreads_vocab and path in HEADS:
            return HEADS[path]
        axes = spec_of(path, self.rules)
        left_out = ("fsdp",) * self.gathered + ("tensor",) * bool(self.cut_heads(path))
        return axes and tuple(None if axis in left_out else axis for axis in axes)

    def cut_heads(self, path: str) -> int:
        """How many heads the tensor axis would have to cut in this leaf; 0 if it cuts none."""
        found = re.search(r"self_attn/(q|k|v|o)_proj/", path)
        if found is None or self.model is None:
            return 0
        heads = self.model.num_kv_heads if found[1] in "kv" else self.model.num_heads
        return heads if heads % self.shape["tensor"] else 0


def as_layout(mesh: Mesh | Layout, model: ModelConfig | None = None) -> Layout:
    """A layout of a mesh, or one given, that knows the model's sizes."""
    layout = mesh if isinstance(mesh, Layout) else Layout(mesh)
    return layout if model is None else dataclasses.replace(layout, model=model)


def parse_rules(rules: Mapping[str, str]) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Rules as a config writes them.

    Args:
        rules: Patterns of whole base paths, and the mesh axis of each dimension, "-" for none:
            ``{"layers/mlp/up_proj/kernel": "- fsdp tensor"}``. What is left out is none.

    Returns:
        The same as `RULES` is written.

    Raises:
        ValueError: A pattern that is no regular expression, an unknown axis, or one given twice.

    Example:
        >>> parse_rules({"norm/scale": "fsdp"})
        (('norm/scale', ('fsdp',)),)
    """
    parsed = []
    for pattern, text in rules.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rules: {pattern!r} is no regular expression: {error}") from None
        axes = tuple(None if word == "-" else word for word in text.split())
        named = [axis for axis in axes if axis]
        if set(named) - set(AXES) or len(set(named)) < len(named):
            raise ValueError(
                f"rules: {pattern}: expected '-' or one of {', '.join(AXES)} for each dimension, "
                f"none twice, got {text!r}"
            )
        parsed.append((pattern, axes))
    return tuple(parsed)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh over all devices, or over some.

    Args:
        data: Devices that hold copies of the base and see different rows.
        fsdp: Devices the base is spread over; they see different rows too.
        tensor: Devices each matrix is cut over. One axis may be -1: what is left.
        devices: Which devices; None is all of them, of all processes.

    Returns:
        A mesh with axes "data", "fsdp" and "tensor", of type Auto.

    Raises:
        UserError: If the product is not the number of devices.
    """
    sizes = [data, fsdp, tensor]
    count = jax.device_count() if devices is None else len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        asked = ", ".join(f"{axis}: {size}" for axis, size in zip(AXES, sizes, strict=True))
        divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"mesh: {{{asked}}} does not make {count} devices; each axis must be one of "
            f"{', '.join(divisors)} with product {count}, one of them may be -1."
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)


def spec_of(path: str, rules: Sequence[tuple] = ()) -> tuple[str | None, ...] | None:
    """The mesh axes that the first rule of `rules` and `RULES` wants; None without a rule."""
    for pattern, axes in (*rules, *RULES):
        if re.fullmatch(pattern, path):
            return axes
    return None


def param_sharding(path: str, shape: tuple[int, ...], mesh: Mesh | Layout) -> NamedSharding:
    """Where a base leaf lives; dimensions that do not divide are replicated."""
    return _place(as_layout(mesh).axes(path) or (), shape, mesh)


def leaf_sharding(path: str, leaf: Any, mesh: Mesh | Layout) -> Any:
    """Where an array, or every array of a quantised kernel, lives.

    A device holds whole blocks of a quantised kernel.

    Args:
        path: The base leaf's path.
        leaf: An array, a `jaxpeft.ops.quant.QuantTensor`, or shapes.
        mesh: The mesh, or a layout.

    Returns:
        A sharding, or a tree of them like the leaf.
    """
    if not isinstance(leaf, QuantTensor):
        return param_sharding(path, leaf.shape, mesh)
    wanted_axes = as_layout(mesh).axes(path) or ()
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


def adapter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh | Layout) -> NamedSharding:
    """Where an adapter's leaf lives.

    Args:
        path: Base path and name of the array: ``layers/self_attn/q_proj/kernel/a``.
        shape: The array's shape.
        mesh: The mesh, or a layout.

    Returns:
        For a factor ``a`` the tensor axis on the kernel's input, for ``b`` on its output; a
        whole replacement (``value``) like the base leaf; everything else replicated.
    """
    owner, _, name = path.rpartition("/")
    axes = as_layout(mesh).axes(owner) or ()
    if name == "value":
        return _place(axes, shape, mesh)
    if name in ("a", "b") and len(axes) >= 2:
        side = axes[-2] if name == "a" else axes[-1]
        side = side if side == "tensor" else None
        stack = (None,) * (len(shape) - 2)
        return _place((*stack, side, None) if name == "a" else (*stack, None, side), shape, mesh)
    return _place((), shape, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; further dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def process_rows(mesh: Mesh, batch_size: int) -> list[int] | None:
    """Which rows of a batch the devices of this process hold; None for all, of one process."""
    if jax.process_count() == 1:
        return None
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for rows in held if rows for row in range(*rows[0].indices(batch_size))})


def put_batch(batch: Mapping, mesh: Mesh, batch_size: int) -> dict:
    """A batch on the mesh.

    Args:
        batch: Arrays of the rows that `process_rows` names.
        mesh: The mesh.
        batch_size: Rows of all processes.

    Returns:
        Whole arrays, rows split over data and fsdp.
    """
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), where)
    return {
        name: jax.make_array_from_process_local_data(where, part, (batch_size, *part.shape[1:]))
        for name, part in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh | Layout) -> Any:
    """Shardings for a `jaxpeft.updates.step.TrainState` (or its shapes), leaf by leaf.

    Trained arrays and their moments are found by the part of their path behind ``adapter`` or
    ``base``; counters, keys, and moments of another shape than their array (Adafactor's) are
    replicated.

    Args:
        state: The state; arrays or shapes.
        mesh: The mesh, or a layout.

    Returns:
        A tree like `state` of shardings.
    """

    def owner_of(path: Any) -> tuple[str, str] | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = re.fullmatch(r"(?:.*/)?(adapter|base|buffers|frozen)/(.+)", name)
        return (found[1], found[2]) if found else None

    trained = jax.tree_util.tree_leaves_with_path(state.trained)
    shapes = {owner_of(path): leaf.shape for path, leaf in trained}

    def place(path: Any, leaf: Any) -> NamedSharding:
        owner = owner_of(path)
        if owner is None or shapes.get(owner, leaf.shape) != leaf.shape:
            return replicated(as_layout(mesh).mesh)
        where = param_sharding if owner[0] == "base" else adapter_sharding
        return where(owner[1], leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree of arrays or shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def shard_params(params: Mapping, mesh: Mesh | Layout) -> dict:
    """Base parameters placed on the mesh by the table.

    Args:
        params: Base parameters, a nested dict.
        mesh: Over ``data``, ``fsdp`` and ``tensor``, see `make_mesh`; or a layout.

    Returns:
        The same tree; leaves that fit no rule or do not divide are replicated (`unsharded` names
        them).
    """
    return paths.unflatten(
        {
            path: jax.device_put(leaf, leaf_sharding(path, leaf, mesh))
            for path, leaf in paths.flatten(params).items()
        }
    )


def unsharded(params: Mapping, mesh: Mesh | Layout) -> list[str]:
    """Names base leaves that are replicated for want of a rule or of divisibility, and why."""
    layout, notes = as_layout(mesh), []
    for path, leaf in paths.flatten(params).items():
        axes = layout.axes(path)
        if axes is None:
            notes.append(f"{path}: no rule")
            continue
        if (heads := layout.cut_heads(path)) and axes != spec_of(path, layout.rules):
            notes.append(f"{path}: {heads} heads do not divide by tensor {layout.shape['tensor']}")
        if isinstance(leaf, QuantTensor):
            notes += _uneven_blocks(path, leaf, axes, layout)
            continue
        for size, axis in zip(leaf.shape, axes, strict=False):
            if axis and size % layout.shape[axis]:
                notes.append(f"{path}: {size} does not divide by {axis} {layout.shape[axis]}")
    return notes


def _uneven_blocks(
    path: str, leaf: QuantTensor, axes: Sequence[str | None], layout: Layout
) -> list[str]:
    """What of a quantised kernel is replicated: devices hold whole blocks."""
    blocks, _, columns = leaf.codes.shape[-3:]
    sizes = zip((blocks, columns), axes[-2:], ("blocks of 64", "columns"), strict=True)
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
