"""Sharding constraints inside a program: rows over data and fsdp, weights gathered over fsdp.

XLA derives the sharding of a program from the sharding of its arguments, and left alone it may move
activations instead of weights. The model's code states here what FSDP and tensor parallelism mean:
activations keep their rows, a layer's weights are gathered over fsdp when they are used, once in
each pass, and heads stay on the shard of the tensor axis that computed them. Without a layout, and
on one device, there are no constraints.

References:
    Zhao et al., "PyTorch FSDP", 2023, https://arxiv.org/abs/2304.11277, section 3.
    Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from jaxpeft.core import paths
from jaxpeft.mesh.layouts import AXES, VOCAB, Layout, as_layout
from jaxpeft.mesh.placement import leaf_sharding
from jaxpeft.ops.linear import Node, embed

GATHERED = "gathered"
"""Name of gathered weights: a policy of ``jax.checkpoint`` must not keep them."""

ROWS = ("data", "fsdp")

# Both decide what is traced, so they are a part of the key of all of JAX's caches of programs.
_LAYOUT = jax.make_user_context(None)
_IN_GROUP = jax.make_user_context(False)


@contextlib.contextmanager
def traced_on(layout: Layout | None) -> Iterator[None]:
    """Programs traced in this block are for this layout.

    A jitted function that was traced for another layout is traced again. Other threads are not
    affected.

    Args:
        layout: A mesh and its rules, hashable. None changes nothing. Inside another `traced_on`
            block the outer layout stays in force.
    """
    if layout is None or _LAYOUT.value is not None:
        yield
        return
    with _LAYOUT(layout), jax.set_mesh(layout.mesh) if on_mesh() else contextlib.nullcontext():
        yield


def layout_of(params: Mapping, model: Any = None) -> Layout | None:
    """The layout of parameters that are on a mesh, with the rules of `RULES`; None for others."""
    leaf = jax.tree.leaves(params)[0]
    where = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(where, NamedSharding) or not {*AXES} <= {*where.mesh.axis_names}:
        return None
    return as_layout(where.mesh, model)  # pyright: ignore[reportArgumentType]


def _several() -> Layout | None:
    """The layout in force, if it has several devices; else None."""
    layout: Layout | None = _LAYOUT.value
    return None if layout is None or layout.mesh.size == 1 else layout


def on_mesh() -> bool:
    """Whether the program being traced is for several devices."""
    return _several() is not None


def knows_devices() -> bool:
    """Whether the placement of the traced program's arrays is known."""
    return _LAYOUT.value is not None or jax.device_count() == 1


def row_shards() -> int:
    """The number of devices that the rows of a batch are spread over."""
    layout = _several()
    return 1 if layout is None else layout.shape["data"] * layout.shape["fsdp"]


def keep_rows(x: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
    """Constrains activations so that every device holds whole rows."""
    if not on_mesh() or x.shape[0] % row_shards():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def keep_heads(
    x: Float[Array, "batch seq heads head_dim"], q_heads: int
) -> Float[Array, "batch seq more_heads head_dim"]:
    """Spreads the heads of keys or values over the tensor axis.

    If the axis has more shards than there are heads, heads are repeated. Head ``i`` of the queries
    reads head ``i // group`` of the keys before and after. If the heads of the queries do not
    divide by the axis, nothing is done.
    """
    layout = _several()
    if layout is None or q_heads % layout.shape["tensor"]:
        return x
    shards = layout.shape["tensor"]
    if (times := shards // math.gcd(shards, x.shape[2])) > 1:
        x = jnp.repeat(x, times, axis=2)
    return jax.lax.with_sharding_constraint(x, _place_of_heads(layout, x.shape[0], x.shape[2]))


def on_own_heads(
    function: Callable[..., Array],
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int[Array, "batch seq"],
    *rest: Array,
) -> Float[Array, "batch seq heads head_dim"]:
    """Calls a function that XLA cannot partition on every device's own rows and heads.

    If rows or heads do not divide by an axis, every device of the axis computes all of them.

    Args:
        function: Attention, ``function(q, k, v, segment_ids, *rest)``.
        q: Queries.
        k: Keys from `keep_heads`.
        v: Values from `keep_heads`.
        segment_ids: Segment of each slot.
        *rest: More arrays, which every device gets whole.

    Returns:
        The function's result for all rows and heads.
    """
    layout = _several()
    if layout is None:
        return function(q, k, v, segment_ids, *rest)
    whole = _place_of_heads(layout, q.shape[0], q.shape[2])
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(whole, whole, whole, PartitionSpec(whole[0]), *(PartitionSpec() for _ in rest)),
        out_specs=whole,
        check_vma=False,
    )(q, k, v, segment_ids, *rest)


def _place_of_heads(layout: Layout, batch: int, heads: int) -> PartitionSpec:
    """The spec of ``(batch, seq, heads, head_dim)``; an axis that does not divide is not spread."""
    rows = ROWS if batch % row_shards() == 0 else None
    side = "tensor" if heads % layout.shape["tensor"] == 0 else None
    return PartitionSpec(rows, None, side, None)


def look_up(ids: Int[Array, "batch seq"], table: Any) -> Float[Array, "batch seq d_model"]:
    """Looks ids up in the embedding table without gathering it.

    With features sharded over fsdp, each device looks up its slice of its peers' rows and they
    exchange slices: less traffic than gathering the table.
    """
    layout = _several()
    if layout is None:
        return embed(ids, table)
    if ids.shape[0] % row_shards():
        return embed(ids, gathered(paths.EMBEDDING, table))
    x = embed(jax.lax.with_sharding_constraint(ids, PartitionSpec("data")), table)
    if x.shape[-1] % layout.shape["fsdp"] == 0:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))
    return keep_rows(x)


def rows_of_peers(x: Shaped[Array, "batch *rest"]) -> Shaped[Array, "batch *rest"]:
    """Gathers the rows that the fsdp and tensor devices share.

    Each of these devices can then multiply all of them with its slice of the vocabulary.
    """
    layout = _several()
    if layout is None or not layout.spreads_vocab or x.shape[0] % groups_of_rows():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_group_axis()))


def keep_vocab(logits: Float[Array, "batch *rest vocab"]) -> Float[Array, "batch *rest vocab"]:
    """Constrains logits of `rows_of_peers`: each device holds its slice of the vocabulary."""
    layout = _several()
    if layout is None or not layout.spreads_vocab or logits.shape[0] % groups_of_rows():
        return logits
    spec = PartitionSpec(_group_axis(), *(None,) * (logits.ndim - 2), VOCAB)
    return jax.lax.with_sharding_constraint(logits, spec)


def groups_of_rows() -> int:
    """The number of groups of rows, one for each device of the data axis.

    Rows of different groups only meet in sums.
    """
    layout = _several()
    return 1 if layout is None or _IN_GROUP.value else layout.shape["data"]


def _group_axis() -> str | None:
    return None if _IN_GROUP.value else "data"


def by_group(function: Callable[[Any, Array], Array], groups: int) -> Callable[[Any, Array], Array]:
    """Maps a function of weights and rows over groups of rows; each group has its own weights.

    Gradients of the weights are then not summed over the data axis where they arise, but later, by
    `sum_groups`: once for many of them.

    Args:
        function: ``function(weights, rows)``.
        groups: From `groups_of_rows`; with 1 the function is returned unchanged.

    Returns:
        A function that takes weights from `copy_for_groups`.
    """
    if groups == 1:
        return function

    def apart(weights: Any, rows: Array) -> Array:
        split = rows.reshape(groups, -1, *rows.shape[1:])
        with _IN_GROUP(True):
            out = jax.vmap(function, spmd_axis_name="data")(weights, split)
        return out.reshape(-1, *out.shape[2:])

    return apart


def copy_for_groups(weights: Any, groups: int) -> Any:
    """Adds a leading axis of groups to every array; each copy is on the devices of its group."""
    if groups == 1:
        return weights

    def copy(leaf: Array) -> Array:
        spec = PartitionSpec("data", *(PartitionSpec.UNCONSTRAINED,) * leaf.ndim)
        return jax.lax.with_sharding_constraint(jnp.broadcast_to(leaf, (groups, *leaf.shape)), spec)

    return jax.tree.map(copy, weights)


def sum_groups(weights: Any, groups: int) -> Any:
    """Sums over the leading axis that `copy_for_groups` added."""
    return weights if groups == 1 else jax.tree.map(lambda leaf: leaf.sum(axis=0), weights)


def gathered(path: str, weight: Any) -> Any:
    """Gathers a weight of the base for use: unsharded over fsdp, or as `HEADS` prescribes.

    In the node of an adapter, the base inside is gathered.

    Args:
        path: The base leaf's path, as in `jaxpeft.mesh.layouts.RULES`.
        weight: An array, a quantised kernel (whose codes are gathered), or a node.
    """
    layout = _several()
    if layout is None:
        return weight
    if isinstance(weight, Node) and hasattr(weight, "base"):
        base = gathered(path, weight.base)  # pyright: ignore[reportAttributeAccessIssue]
        return weight.replace(base=base)  # pyright: ignore[reportAttributeAccessIssue]
    # Rules include the axis of layers, which is gone inside a layer.
    stacked = path.startswith("layers/")
    lead = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), weight)
    places = leaf_sharding(
        path, lead if stacked else weight, dataclasses.replace(layout, gathered=True)
    )

    def place(leaf: Any, where: NamedSharding) -> Any:
        spec = where.spec[1:] if stacked else where.spec
        leaf = jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
        return checkpoint_name(leaf, GATHERED)

    return jax.tree.map(place, weight, places)
