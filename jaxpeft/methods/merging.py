"""Merges an adapter into the base: plain arrays that compute the same function."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.lifting.folded import Folded
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import (
    adapters_of,
    after_others,
    check_leaves,
    make_leaf,
    make_leaves,
    require_unchanged,
)
from jaxpeft.methods.foreign import as_dicts, fitted, is_foreign, put_back
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import dtype_of
from jaxpeft.ops.quant import is_coded


def merge(params: Any, adapter: Adapter | Sequence[Adapter]) -> Any:
    """Merges an adapter into the base: plain arrays that compute the same function.

    Args:
        params: Base parameters; they are not changed.
        adapter: An adapter of a mergeable kind, or several to merge one after the other.

    Returns:
        A tree like `params`, of the same kind and in its dtypes; leaves that no adapter changes are
        shared with it. If a tied table and the head come to differ, there is a new leaf
        ``lm_head/kernel``.

    Raises:
        UserError: If an adapter does not fit the base or cannot be merged, or a leaf that it
            changes is quantised.
    """
    adapters = adapters_of(adapter)
    if is_foreign(params, adapters):
        return put_back(params, _merged(as_dicts(params), adapters))
    paths.require_tree(params)
    return _merged(params, adapters)


def _merged(params: dict, adapters: Sequence[Adapter]) -> dict:
    """The tree of `merge`, for nested dicts."""
    tree, parted, changed = params, False, {}
    for one in adapters:
        _require_unquantized(params, one)
        kind = KINDS[one.spec.kind]
        if kind.no_merge:
            raise UserError(f"an adapter of kind {kind.name!r} cannot be merged: {kind.no_merge}")
        tree = fitted(tree, one)
        require_unchanged(one, changed)
        leaves = make_leaves(tree, one)
        check_leaves(leaves, fitted(params, one), one)
        if parted and paths.EMBEDDING in one.spec.paths and not unties(params, one):
            raise UserError(
                f"{paths.EMBEDDING}: an adapter before this one leaves the tied head to the base, "
                "and this one does not; put it first."
            )
        merged: dict[str, Any] = {}
        bound = tree
        for leaf in leaves:
            leaf = dataclasses.replace(after_others(leaf, bound), bound=paths.put(tree, merged))
            nodes = kind.bind(leaf)
            bound = paths.put(bound, nodes)
            for place, array in kind.merge(leaf, nodes).items():
                before = paths.get(tree, place)
                before = leaf.base if before is None and place == leaf.path else before
                array = array if before is None else array.astype(dtype_of(before))
                merged[place] = before.unfold(array) if isinstance(before, Folded) else array
        if unties(tree, one) and paths.HEAD not in merged:
            merged[paths.HEAD], parted = paths.get(tree, paths.EMBEDDING).T, True
        tree = paths.put(tree, merged)
    return tree


def _require_unquantized(params: dict, adapter: Adapter) -> None:
    coded = [p for p in adapter.spec.paths if is_coded(paths.get(params, p))]
    if coded:
        way = "(load_model without quantization)" if not adapter.spec.axes else "(before quantize)"
        again = (
            ", or call merge_quantized of jaxpeft.methods.algebra.merge_quantized, which rounds "
            "the sum to codes again"
        )
        raise UserError(
            f"merge: {len(coded)} kernels of this base are quantised: {first_few(coded)}; merge "
            f"into the weights it was made from {way}{'' if adapter.spec.axes else again}."
        )


def unties(params: dict, adapter: Adapter) -> bool:
    """Whether an adapter of a tied model changes the table for look-ups, but not for the head."""
    if adapter.spec.axes or paths.EMBEDDING not in adapter.spec.paths:
        return False
    if paths.get(params, paths.HEAD) is not None:
        return False
    node = KINDS[adapter.spec.kind].bind(make_leaf(params, adapter, paths.EMBEDDING))
    return bool(getattr(node[paths.EMBEDDING], "attends_base", False))


def head_is_frozen(params: dict, adapter: Adapter | None, trained: Any = None) -> bool:
    """Whether no weight of the head is trained, so that the loss omits its gradient.

    Args:
        params: Base parameters: arrays, nodes or shapes.
        adapter: The adapter that is trained.
        trained: Base leaves that are trained as well, nested like `params`, None elsewhere.
    """
    head = paths.HEAD if paths.get(params, paths.HEAD) is not None else paths.EMBEDDING
    if trained is not None and paths.get(trained, head) is not None:
        return False
    if adapter is None:
        return True
    if paths.HEAD in adapter.spec.paths:
        return False
    return head not in adapter.spec.paths or unties(params, adapter)
