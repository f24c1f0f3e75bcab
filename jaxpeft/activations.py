"""What lives where inside a program on a mesh: rows over data and fsdp, weights whole over fsdp.

XLA spreads a program over a mesh from where its arguments live. Left alone it may just as well
move activations as weights. Model code says here what FSDP and tensor parallelism mean: activations
keep their rows, a layer's weights are gathered over fsdp where they are used, once a pass, and
heads stay on the shard of the tensor axis that made them. Without a layout, and on one device,
nothing is said.

References:
    Zhao et al., "PyTorch FSDP", 2023, https://arxiv.org/abs/2304.11277, section 3.
    Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxpeft.linear import Node
from jaxpeft.sharding import AXES, Layout, as_layout, leaf_sharding

GATHERED = "gathered"
"""Name of gathered weights: a policy of ``jax.checkpoint`` must not keep them."""

ROWS = ("data", "fsdp")

_LAYOUT = contextvars.ContextVar[Layout | None]("layout", default=None)


@contextlib.contextmanager
def traced_on(layout: Layout | None) -> Iterator[None]:
    """Programs that are traced inside are for this layout.

    None or one device says nothing, and inside of another such block that one holds.
    """
    if layout is None or layout.mesh.size == 1 or _LAYOUT.get() is not None:
        yield
        return
    token = _LAYOUT.set(layout)
    try:
        with jax.set_mesh(layout.mesh):
            yield
    finally:
        _LAYOUT.reset(token)


def layout_of(params: Mapping, model: Any = None) -> Layout | None:
    """The layout of arrays that live on a mesh, by the table's own rules; None elsewhere."""
    leaf = jax.tree.leaves(params)[0]
    where = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(where, NamedSharding) or not {*AXES} <= {*where.mesh.axis_names}:
        return None
    return as_layout(where.mesh, model)  # pyright: ignore[reportArgumentType]


def on_mesh() -> bool:
    """Whether the program that is traced is for several devices."""
    return _LAYOUT.get() is not None


def row_shards() -> int:
    """Over how many devices the rows of a batch are spread."""
    layout = _LAYOUT.get()
    return 1 if layout is None else layout.shape["data"] * layout.shape["fsdp"]


def keep_rows(x: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
    """Activations, each device with whole rows of its own."""
    layout = _LAYOUT.get()
    if layout is None or x.shape[0] % row_shards():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def keep_heads(
    x: Float[Array, "batch seq heads head_dim"], q_heads: int
) -> Float[Array, "batch seq more_heads head_dim"]:
    """Keys, or values, with heads spread over the tensor axis, repeated where it has more shards.

    Head ``i`` of queries reads head ``i // group`` of keys before and after. Where the heads of
    queries cannot be spread nothing is done.
    """
    layout = _LAYOUT.get()
    if layout is None or q_heads % layout.shape["tensor"]:
        return x
    shards, heads = layout.shape["tensor"], x.shape[2]
    if heads % shards:
        if shards % heads:
            return x
        x = jnp.repeat(x, shards // heads, axis=2)
    rows = ROWS if x.shape[0] % row_shards() == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, None, "tensor", None))


def gathered(path: str, weight: Any) -> Any:
    """A weight of the base whole along the fsdp axis; of an adapter's node, the base inside.

    Args:
        path: The base leaf's path, as `jaxpeft.sharding.RULES` has it.
        weight: An array, a quantised kernel (its codes are gathered), or a node.
    """
    layout = _LAYOUT.get()
    if layout is None:
        return weight
    if isinstance(weight, Node) and hasattr(weight, "base"):
        base = gathered(path, weight.base)  # pyright: ignore[reportAttributeAccessIssue]
        return weight.replace(base=base)  # pyright: ignore[reportAttributeAccessIssue]
    # Inside a layer the axis of layers is gone; the table has it.
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
