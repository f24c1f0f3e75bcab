"""What a place of a LoRA adapter may hold, told apart by one of its trained arrays.

=========  ====================================================  ============================
array      what it is                                            defined in
=========  ====================================================  ============================
``a``      factors of a kernel; DoRA's magnitudes, a bias of B   `jaxpeft.methods.lora.config`
           the same of the embedding table                       `jaxpeft.methods.lora.table`
``value``  a trained copy that stands in for a base leaf         `jaxpeft.methods.lora.saved`
``rows``   the rows of a few tokens                              `jaxpeft.methods.lora.tokens`
=========  ====================================================  ============================
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Leaf, merge_leaf
from jaxpeft.methods.leaves import token_rows
from jaxpeft.methods.leaves.replace import value_shape
from jaxpeft.methods.lora import dora, saved, starts, table
from jaxpeft.methods.lora.nodes import LoRAKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """How one sort of place is read; the functions are those of `jaxpeft.methods.family.Kind`.

    Attributes:
        bind: What stands in the bound tree, by path.
        leaf_shape: The shape of the base leaf that its trained arrays belong to.
        merge: Merged arrays by path.
    """

    bind: Callable[[Leaf], dict[str, Any]]
    leaf_shape: Callable[[dict], tuple[int, ...] | None] = lambda params: None
    merge: Callable[[Leaf, dict[str, Any]], dict[str, Any]] = merge_leaf


def bind_factors(leaf: Leaf) -> dict[str, Any]:
    """The node that stands for a kernel, or the embedding table, adapted with LoRA or DoRA."""
    if leaf.path == paths.EMBEDDING:
        return table.bind(leaf)
    if leaf.options.get("dora"):
        return dora.bind(leaf)
    base, a, b = starts.without_start(leaf)
    node = LoRAKernel(
        base,
        a,
        b,
        leaf.buffers["scale"],
        dropout=leaf.buffers["dropout"],
        key=leaf.keys(),
        bias=leaf.params.get("bias"),
    )
    return {leaf.path: node}


def factors_shape(params: dict) -> tuple[int, ...]:
    """The shape of the kernel that the factors of one leaf belong to, layer axis included."""
    return (*params["a"].shape[:-1], params["b"].shape[-1])


def merge_factors(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """The kernel, and with a bias of B the module's bias.

    Raises:
        UserError: If B has a bias and the module has none to add it to.
    """
    merged = merge_leaf(leaf, nodes)
    if "bias" in leaf.params:
        bias = paths.get(leaf.bound, leaf.beside("bias"))
        if bias is None:
            raise UserError(
                f"{leaf.path}: a LoRA with lora_bias cannot be merged into a module without a bias."
            )
        scale = leaf.buffers["scale"][..., None]
        merged[leaf.beside("bias")] = bias.astype(jnp.float32) + scale * leaf.params["bias"]
    return merged


PLACES: dict[str, Place] = {
    "a": Place(bind=bind_factors, leaf_shape=factors_shape, merge=merge_factors),
    "value": Place(bind=saved.bind, leaf_shape=value_shape),
    "rows": Place(bind=token_rows.bind),
}
"""The sorts of places by the array that only they hold."""


def sort_of(params: dict) -> str:
    """The key of `PLACES` that the trained arrays of a place belong to."""
    return next(key for key in PLACES if key in params)


def bind(leaf: Leaf) -> dict[str, Any]:
    """What stands in the bound tree at a place of a LoRA."""
    return PLACES[sort_of(leaf.params)].bind(leaf)


def leaf_shape(params: dict) -> tuple[int, ...] | None:
    """The shape of the base leaf that the trained arrays of a place belong to."""
    return PLACES[sort_of(params)].leaf_shape(params)


def merge(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """Merged arrays by path, from a place and what `bind` made of it."""
    return PLACES[sort_of(leaf.params)].merge(leaf, nodes)


def by_sort(adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """The adapter taken apart: for each key of `PLACES` that occurs, one with those places only."""
    for sort in PLACES:
        chosen = tuple(
            path for path in adapter.spec.paths if sort_of(paths.get(adapter.params, path)) == sort
        )
        if chosen:
            spec = dataclasses.replace(adapter.spec, paths=chosen)
            yield sort, adapter.replace(spec=spec)  # pyright: ignore
