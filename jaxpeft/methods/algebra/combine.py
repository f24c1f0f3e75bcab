"""One LoRA from several: sums, and ways to reduce the interference of their parts.

The change of a kernel by LoRA ``i`` is ``D_i = s_i A_i B_i``, or ``s_i (A_i B_i - A0_i B0_i)`` if
the initial product belongs to the base, as with PiSSA. `combine` makes one LoRA of several:

* "cat" and "linear": ``sum_i w_i D_i``, exactly: factors are concatenated, so ranks add up;
* "svd": the same sum, cut to its largest singular values;
* "magnitude_prune": ``sum_i w_i prune(D_i)`` keeps the share `density` of largest entries;
* "dare_linear": the same, but entries are kept at random and divided by `density`;
* "ties", "dare_ties": of the pruned entries only those with the sign of their sum count, and their
  sum is divided by their number: ``sum_i w_i P_i m_i / max(1, sum_i m_i)``.

All but the first are computed layer by layer in float64 on whole changes, and become a LoRA by SVD.
(HF PEFT works on the factors, which mixes ``A_i`` with ``B_j``.)

References:
    Yadav et al., "TIES-Merging", 2023, https://arxiv.org/abs/2306.01708, algorithm 1.
    Yu et al., "Language Models are Super Mario" (DARE), 2023, https://arxiv.org/abs/2311.03099,
    equation 2.
    HF PEFT 0.21, ``utils/merge_utils.py``.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import DROPOUT, Adapter, is_named
from jaxpeft.methods.algebra.low_rank import check_cut, cut, svd_of_product
from jaxpeft.methods.binding import adapters_of, check_weights
from jaxpeft.methods.chat_label import joined_chat
from jaxpeft.methods.family import Factors, Products
from jaxpeft.methods.lora.plain import lora_of
from jaxpeft.methods.mixed import extra_axes
from jaxpeft.methods.registry import KINDS

SUMS = ("cat", "linear")
PRUNED = ("magnitude_prune", "ties", "dare_linear", "dare_ties")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    key: Any = None,
) -> Adapter:
    """One LoRA from several.

    Args:
        adapters: LoRAs for one base; ranks, scales and targets may differ.
        weights: The factor of each adapter's change.
        how: "cat", "linear", "svd", "magnitude_prune", "ties", "dare_linear" or "dare_ties".
        rank: Rank of the result, for all but "cat" and "linear"; by default the largest of the
            adapters'.
        energy: Instead of `rank`: the share of the squared norm that each layer must keep.
        density: Share of entries that pruning keeps, in (0, 1]; for the pruning modes only.
        key: Typed PRNG key, for the "dare" modes.

    Returns:
        A plain LoRA. "cat" and "linear" leave factors and scale unchanged if all weighted scales
        are the same; else, and in all other modes, scales are 1 (alpha is the rank).

    Raises:
        UserError: If an adapter's change is no sum of products (DoRA, other kinds), or an option
            is missing, out of range, or has no meaning in this mode.
    """
    several = adapters_of(adapters)
    _check_options(several, weights, how, rank, energy, density, key)
    sources = [_additive(one, f"adapters[{i}]") for i, one in enumerate(several)]
    scaled = [float(w) * part[2] for w, part in _used(sources, weights)]
    keep = len(set(scaled)) == 1 and scaled[0] > 0
    shapes = {path: _shape(several, path) for path in sorted({*itertools.chain(*sources)})}
    if rank is None and energy is None:
        rank = max(_width(source) for source in sources)
    result: dict[str, list[Any]] = {}
    for path in shapes:
        depth = len(next(source[path] for source in sources if path in source))
        for layer in range(depth):
            parts = [source[path][layer] if path in source else [] for source in sources]
            made = None
            if any(parts) and how in SUMS:
                made = _side_by_side(parts, weights, fold=not keep)
            elif any(parts) and how == "svd":
                made = cut(*svd_of_product(*_side_by_side(parts, weights)), rank, energy)
            elif any(parts):
                keys = None if key is None else _key(key, path, layer)
                total = _merge_changes([_change(p) for p in parts], weights, how, density, keys)
                made = cut(*np.linalg.svd(total, full_matrices=False), rank, energy)
            result.setdefault(path, []).append(made)
    scale = scaled[0] if keep and how in SUMS else 1.0
    made = lora_of(result, shapes, scale, _common_dropout(several), several)
    return dataclasses.replace(made, chat=joined_chat(several))


def _check_options(
    several: list[Adapter], weights: Any, how: str, rank: Any, energy: Any, density: Any, key: Any
) -> None:
    if how not in (*SUMS, "svd", *PRUNED):
        known = ", ".join((*SUMS, "svd", *PRUNED))
        raise UserError(f"how: {how!r} is not one of {known}.")
    if not several:
        raise UserError("adapters: there are none to combine.")
    check_weights(weights, len(several))
    if not all(np.isfinite(float(w)) for w in weights):
        raise UserError(f"weights: expected finite numbers, got {list(weights)}.")
    if how in SUMS and not (rank is None and energy is None):
        raise UserError(f'how: {how!r} is exact and takes no rank or energy; use "svd".')
    if (density is not None) != (how in PRUNED):
        needs = "needs density=" if how in PRUNED else "takes no density"
        raise UserError(f"how: {how!r} {needs}.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density: must be above 0 and at most 1, got {density!r}.")
    if (key is not None) != how.startswith("dare"):
        needs = "needs key=jax.random.key(...)" if key is None else "takes no key"
        raise UserError(f"how: {how!r} {needs}.")
    check_cut(rank, energy)


def _additive(adapter: Adapter, where: str) -> Products:
    """By path and layer, the products whose sum is an adapter's change; empty if the rank is 0."""
    kind = KINDS[adapter.spec.kind]
    if kind.products is None:
        raise UserError(f"{where}: kind {kind.name!r} is no LoRA; convert it by to_lora first.")
    if extra_axes(adapter) == 1:
        raise UserError(
            f"{where}: is several, stacked; take one: jax.tree.map(lambda leaf: leaf[0], adapter)."
        )
    try:
        found = kind.products(adapter)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not any(parts for layers in found.values() for parts in layers):
        raise UserError(f"{where}: adapts no module: all its ranks are 0.")
    return found


def _used(sources: list[Products], weights: Any) -> list[tuple[Any, Factors]]:
    """Every product with its adapter's weight."""
    return [
        (weight, part)
        for source, weight in zip(sources, weights, strict=True)
        for layers in source.values()
        for parts in layers
        for part in parts
    ]


def _width(source: Products) -> int:
    """The largest rank of a source's changes."""
    layers = [parts for each in source.values() for parts in each]
    return max(sum(part[0].shape[1] for part in parts) for parts in layers)


def _side_by_side(
    parts: list[list[Factors]], weights: Any, fold: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a weighted sum of products; `fold` multiplies weights and scales into B."""
    left, right = [], []
    for weight, products in zip(weights, parts, strict=True):
        for a, b, scale in products:
            left.append(a)
            right.append(b * (float(weight) * scale) if fold else b)
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def _change(parts: list[Factors]) -> Any:
    """The sum of one adapter's products in float64; 0 without any."""
    return sum(s * (a.astype(np.float64) @ b.astype(np.float64)) for a, b, s in parts)


def _key(key: Any, path: str, layer: int) -> Any:
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), layer)


def _merge_changes(changes: list[Any], weights: Any, how: str, density: Any, key: Any) -> Any:
    """Prunes and adds the changes of one layer by the mode `how`."""
    shape = next(np.shape(change) for change in changes if np.ndim(change))
    changes = [np.broadcast_to(change, shape) for change in changes]
    if how.startswith("dare"):
        pruned = [
            drop_entries(change, density, jax.random.fold_in(key, i))
            for i, change in enumerate(changes)
        ]
    else:
        pruned = [largest_entries(change, density) for change in changes]
    stacked = np.stack(pruned)
    weighted = stacked * np.asarray(weights, np.float64).reshape(-1, *[1] * len(shape))
    if not how.endswith("ties"):
        return weighted.sum(axis=0)
    elected = np.where(stacked.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(stacked) == elected
    return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def largest_entries(change: np.ndarray, density: float) -> np.ndarray:
    """The share `density` of entries with the largest magnitudes; the others become zero."""
    count = int(density * change.size)
    order = np.argsort(-np.abs(change), axis=None, kind="stable")[:count]
    kept = np.zeros(change.size)
    kept[order] = change.reshape(-1)[order]
    return kept.reshape(change.shape)


def drop_entries(change: np.ndarray, density: float, key: Any) -> np.ndarray:
    """Entries kept with probability `density` and divided by it; the others become zero."""
    return change * np.asarray(jax.random.bernoulli(key, density, change.shape)) / density


def _shape(several: list[Adapter], path: str) -> tuple[int, ...]:
    """The shape of the kernels at a path; adapters for different bases are an error."""
    holders = [one for one in several if path in one.spec.paths]
    found = [KINDS[one.spec.kind].leaf_shape(paths.get(one.params, path)) for one in holders]
    shapes = {shape for shape in found if shape is not None}
    if len(shapes) > 1:
        raise UserError(f"adapters: {path} has shapes {sorted(shapes)}; they have different bases.")
    return shapes.pop()


def _common_dropout(several: list[Adapter]) -> float:
    """The dropout rate if it is the same for all layers of all adapters, else 0."""
    found = {
        rate
        for one in several
        for path, leaf in paths.flatten(one.buffers).items()
        if is_named(path, DROPOUT)
        for rate in np.unique(np.asarray(leaf)).tolist()
    }
    return found.pop() if len(found) == 1 else 0.0
