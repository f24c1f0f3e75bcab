"""The three sorts of places in a LoRA adapter, each one record.

==========  ====================================================  ============================
sort        arrays                                                defined in
==========  ====================================================  ============================
`FACTORS`   factors of a kernel; DoRA's magnitudes, a bias of B   `jaxpeft.methods.lora.config`
            the same of the embedding table                       `jaxpeft.methods.lora.table`
`COPIES`    a trained copy that replaces a base leaf              `jaxpeft.methods.lora.saved`
`TOKENS`    the rows of a few tokens                              `jaxpeft.methods.lora.tokens`
==========  ====================================================  ============================
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Leaf, merge_leaf
from jaxpeft.methods.leaves import replace, token_rows
from jaxpeft.methods.lora import dora, plain, saved, starts, table, targets, tokens
from jaxpeft.methods.lora.nodes import LoRAKernel
from jaxpeft.methods.lora.peft import factors as peft_factors
from jaxpeft.methods.lora.peft import saved as peft_saved
from jaxpeft.methods.lora.peft.config import Part
from jaxpeft.methods.peft.modules import default_and_exceptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sort:
    """One sort of places; its functions on leaves are those of `jaxpeft.methods.family.Kind`.

    Attributes:
        array: The trained array that only such places have.
        arrays: The roles of their arrays for code outside of the family.
        bind: The entries of the bound tree, by path.
        leaf_shape: The shape of the base leaf that its trained arrays belong to.
        merge: Merged arrays by path.
        fields: The fields of the config that these places determine, from an adapter with no
            others.
        peft: How HF PEFT stores them.
    """

    array: str
    arrays: Mapping[str, ArrayRole]
    bind: Callable[[Leaf], dict[str, Any]]
    leaf_shape: Callable[[dict], tuple[int, ...] | None] = lambda params: None
    merge: Callable[[Leaf, dict[str, Any]], dict[str, Any]] = merge_leaf
    fields: Callable[[Adapter], dict[str, Any]]
    peft: Part


def bind_factors(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel or the embedding table, adapted with LoRA or DoRA."""
    if leaf.is_table:
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


def merge_factors(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """The merged kernel, and the module's bias if B has a bias.

    Raises:
        UserError: B has a bias, and the module has none to which it could be added.
    """
    merged = merge_leaf(leaf, nodes)
    if "bias" in leaf.params:
        bias = paths.get(leaf.bound, leaf.bias)
        if bias is None:
            raise UserError(
                f"{leaf.path}: a LoRA with lora_bias cannot be merged into a module without a bias."
            )
        change = leaf.buffers["scale"][..., None] * leaf.params["bias"]
        merged[leaf.bias] = bias.astype(jnp.float32) + change.reshape(bias.shape)
    return merged


def factor_fields(adapter: Adapter) -> dict[str, Any]:
    """The fields of the config that can be read from the places with factors.

    Raises:
        UserError: The layers differ in dropout.
    """
    numbers = targets.numbers_of(adapter)
    if len(numbers.dropouts) > 1:
        raise UserError("layers of this adapter differ in dropout.")
    rank, rank_pattern = default_and_exceptions(numbers.ranks)
    alpha, alpha_pattern = default_and_exceptions(numbers.alphas)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "targets": tuple(numbers.ranks),
        "dropout": numbers.dropouts.pop(),
        "rslora": numbers.rslora,
    }


FACTORS = Sort(
    array="a",
    arrays={
        **plain.FACTORS,
        "a0": ArrayRole(rank_axis=-1),
        "b0": ArrayRole(rank_axis=-2),
        "m": ArrayRole(replaces="part", fast=True),
    },
    bind=bind_factors,
    leaf_shape=plain.factors_shape,
    merge=merge_factors,
    fields=factor_fields,
    peft=peft_factors.PART,
)
COPIES = Sort(
    array="value",
    arrays=replace.ARRAYS,
    bind=saved.bind,
    leaf_shape=replace.value_shape,
    fields=saved.fields,
    peft=peft_saved.PART,
)
TOKENS = Sort(
    array="rows",
    arrays=token_rows.ARRAYS,
    bind=token_rows.bind,
    fields=tokens.fields,
    peft=tokens.PART,
)
SORTS = (FACTORS, COPIES, TOKENS)


def sort_of(params: dict) -> Sort:
    """The sort that the trained arrays of a place belong to."""
    return next(sort for sort in SORTS if sort.array in params)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The entries of the bound tree at a place of a LoRA."""
    return sort_of(leaf.params).bind(leaf)


def leaf_shape(params: dict) -> tuple[int, ...] | None:
    """The shape of the base leaf that the trained arrays of a place belong to."""
    return sort_of(params).leaf_shape(params)


def merge(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """Merged arrays by path, from a place and the result of `bind`."""
    return sort_of(leaf.params).merge(leaf, nodes)


def by_sort(adapter: Adapter) -> Iterator[tuple[Sort, Adapter]]:
    """Splits the adapter: for each sort that occurs, an adapter with its places only."""
    for sort in SORTS:
        chosen = tuple(
            path for path in adapter.spec.paths if sort_of(paths.get(adapter.params, path)) is sort
        )
        if chosen:
            spec = dataclasses.replace(adapter.spec, paths=chosen)
            yield sort, adapter.replace(spec=spec)  # pyright: ignore
