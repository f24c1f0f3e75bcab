"""Converts adapters of any method that changes kernels to plain LoRAs.

The change ``D = merged - base`` of every layer is approximated by its largest singular values,
``D ~ U S V^T = (U sqrt(S)) (sqrt(S) V^T)``, the closest matrix of that rank. If the change is known
as a product of small factors, these are decomposed instead. A LoRA that starts from an initial
product in the base (PiSSA, OLoRA) is a sum of two products already:
``s (A B - A0 B0) = s [A, A0] [B; -B0]``, exactly.

References:
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936,
    https://doi.org/10.1007/BF02288367.
    Meng et al., "PiSSA", 2024, https://arxiv.org/abs/2404.02948, section 3.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.algebra.combine import combine
from jaxpeft.methods.algebra.low_rank import check_cut, cut, svd_of_product
from jaxpeft.methods.binding import check_fit, make_leaf
from jaxpeft.methods.family import Kind, Leaf, weight_at
from jaxpeft.methods.foreign import as_dicts, fitted
from jaxpeft.methods.lora.plain import lora_of
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import OnBase, materialize, shape_of


def to_lora(
    adapter: Adapter, base: Any, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Converts any adapter that changes kernels and can be merged to a plain LoRA.

    Args:
        adapter: The adapter.
        base: The `jaxpeft.Model` it was made for, or its parameters; of a model that is not ours,
            any tree of them.
        rank: Singular values to keep of every layer's change.
        energy: Instead of `rank`: the share of the squared norm that each layer must keep. A
            LoRA, also one that starts from PiSSA or OLoRA, needs neither and is converted
            exactly. If a method's change is known only from merged kernels, singular values below
            ``2^-23 |kernel|`` (Frobenius), which float32 rounding may have caused, are dropped.

    Returns:
        The LoRA, and by path the relative error ``|change - LoRA| / |change|`` (Frobenius).

    Raises:
        UserError: If the adapter cannot be merged, changes what is no kernel, or needs `rank` or
            `energy`.
    """
    params = _tree_of(base, adapter)
    kind = KINDS[adapter.spec.kind]
    if rank is None and energy is None:
        _require_products(kind, adapter)
        check_fit(params, adapter)
        return combine([adapter], [1.0], "cat"), dict.fromkeys(adapter.spec.paths, 0.0)
    check_cut(rank, energy)
    if kind.no_merge:
        raise UserError(f"an adapter of kind {kind.name!r} cannot be merged: {kind.no_merge}")
    check_fit(params, adapter)
    result, shapes, errors = {}, {}, {}
    for path in adapter.spec.paths:
        made, lost, norm = [], 0.0, 0.0
        for u, s, vt, count in _decomposed(params, adapter, path):
            stack = shape_of(weight_at(params, path))[:-2]
            shapes[path] = *stack, u.shape[0], vt.shape[1]
            factors = cut(u, s[:count], vt, rank, energy) if count else None
            if factors is not None:
                lost += float(np.sum(s[factors[0].shape[1] :] ** 2))
            norm += float(np.sum(s**2))
            made.append(factors)
        if made:
            result[path], errors[path] = made, (lost / norm) ** 0.5 if norm else 0.0
    if not result:
        raise UserError("to_lora: the adapter changes no kernel.")
    return lora_of(result, shapes, 1.0, 0.0, [adapter]), errors


def _tree_of(base: Any, adapter: Adapter) -> dict:
    """The base's parameters in nested dicts, in the form in which the adapter knows them.

    Raises:
        UserError: The adapter replaces a kernel of a model that is not ours, whose sides are then
            not known.
    """
    if not adapter.spec.axes:
        return dict(base if isinstance(base, Mapping) else base.params)
    if whole := [path for path, axes in adapter.spec.axes if axes is None]:
        raise UserError(f"to_lora: {first_few(whole)}: is replaced whole; merge it instead.")
    return fitted(as_dicts(base), adapter)


def _require_products(kind: Kind, adapter: Adapter) -> None:
    """Checks that an adapter's change is a sum of products.

    Raises:
        UserError: The change is something else.
    """
    what = f"of kind {kind.name!r}"
    if kind.products is not None:
        try:
            kind.products(adapter)
            return
        except UserError:
            what = "with more than factors"
    raise UserError(f"to_lora: an adapter {what} needs rank= or energy=.")


def _decomposed(params: dict, adapter: Adapter, path: str) -> Iterator[tuple[Any, Any, Any, int]]:
    """The SVD of every layer's change at a path, in float64; nothing for layers that are unchanged.

    Yields:
        ``u``, ``s``, ``vt``, and how many of ``s`` are larger than rounding errors.
    """
    kind = KINDS[adapter.spec.kind]
    found = paths.get(params, path)
    if found is not None:
        params = paths.put(params, {path: jnp.asarray(materialize(found), jnp.float32)})
    leaf = make_leaf(params, adapter, path)
    nodes = kind.bind(leaf)
    node = nodes.get(path)
    product = node.product() if isinstance(node, OnBase) else None
    if product is not None:
        for a, b in zip(*(x.reshape(-1, *x.shape[-2:]) for x in product), strict=True):
            u, s, vt = svd_of_product(a, b)
            yield u, s, vt, len(s)
        return
    factored = any(kind.role(name).side for name in leaf.params)
    before, change = _merged_change(params, leaf, kind.merge(leaf, nodes), factored)
    if before is not None:
        layers = (x.reshape(-1, *x.shape[-2:]) for x in (before, change))
        for kernel, layer in zip(*layers, strict=True):
            u, s, vt = np.linalg.svd(layer.astype(np.float64), full_matrices=False)
            least = np.finfo(np.float32).eps * np.linalg.norm(kernel)
            yield u, s, vt, int(np.sum(s > least))


def _merged_change(
    params: dict, leaf: Leaf, merged: Mapping[str, Any], factored: bool
) -> tuple[Any, Any]:
    """The kernel of a place in float32 and its change by merging; None if it is unchanged.

    A leaf that is no kernel counts as one if the place is `factored`, because its arrays then
    belong to its sides.
    """
    result = None, None
    for place, array in merged.items():
        old = leaf.base if place == leaf.path else paths.get(params, place)
        old = None if old is None else np.asarray(materialize(old), np.float32)
        change = None if old is None else np.asarray(array, np.float32) - old
        if place == leaf.path and (place.endswith("/kernel") or factored or not leaf.own):
            result = old, change
        elif change is None or change.any():
            raise UserError(
                f"to_lora: {place}: the adapter changes what is no kernel of a linear module, and "
                "LoRA cannot; merge it instead."
            )
    return result
