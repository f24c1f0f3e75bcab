"""What an adapter trains, counted: modules with their ranks, and numbers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.methods.adapter import Adapter, ranks_at
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import shape_of


class ModuleRow(NamedTuple):
    """One adapted leaf of the base, as the table shows it.

    Attributes:
        path: Its path in the base parameters.
        layers: Adapted layers of all, such as "28/30".
        shape: Of one layer, such as "576 x 192".
        rank: Such as "8", or "4-16" where layers differ; "-" where there is none.
        trainable: Trained numbers, padding not counted.
    """

    path: str
    layers: str
    shape: str
    rank: str
    trainable: int


def describe_adapter(
    params: Mapping, adapter: Adapter, trained: Mapping | None = None
) -> list[ModuleRow]:
    """One row for each adapted leaf, in the order of the adapter's paths; then what they share.

    Args:
        params: Base parameters: arrays, nodes or shapes.
        adapter: Its buffers are concrete where they hold a "rank"; its parameters may be shapes.
        trained: As `count_trainable` takes it.

    Returns:
        Rows whose `trainable` sum up to ``count_trainable(adapter, trained)``.
    """
    sizes, rows = _trainable_sizes(adapter, trained), []
    for path in adapter.spec.paths:
        base, ranks = paths.get(params, path), ranks_at(adapter, path)
        shape = shape_of(base) if base is not None else ()
        total, adapted = 1, 1
        if paths.is_stacked(path) and shape:
            total, *shape = shape
            adapted = total if ranks is None else int(np.count_nonzero(ranks))
        rows.append(
            ModuleRow(
                path=path,
                layers=f"{adapted}/{total}",
                shape=" x ".join(map(str, shape)) or "-",
                rank=_rank_text(ranks),
                trainable=sizes.pop(path),
            )
        )
    leaves = paths.flatten(adapter.params)
    for path, size in sizes.items():
        shape = " x ".join(map(str, leaves[path].shape))
        rows.append(ModuleRow(path=path, layers="-", shape=shape, rank="-", trainable=size))
    return rows


def count_trainable(adapter: Adapter, trained: Mapping | None = None) -> int:
    """How many numbers are trained: zero padding and layers that are not adapted do not count.

    Args:
        adapter: As `describe_adapter` takes it.
        trained: A tree of booleans like its `params`, from ``Method.trainable``; all by default.
    """
    return sum(_trainable_sizes(adapter, trained).values())


def count_parameters(params: Mapping) -> int:
    """How many numbers the base has, by logical shape, however they are stored."""
    return sum(size_of(shape_of(leaf)) for leaf in paths.flatten(params).values())


def _rank_text(ranks: np.ndarray | None) -> str:
    used = [] if ranks is None else sorted({int(rank) for rank in ranks.flat if rank})
    return "-".join(map(str, dict.fromkeys((used[0], used[-1])))) if used else "-"


def _trainable_sizes(adapter: Adapter, trained: Mapping | None) -> dict[str, int]:
    """Trained numbers by place, then by path of every leaf that belongs to no place."""
    wanted = None if trained is None else paths.flatten(trained)
    sizes, places = dict.fromkeys(adapter.spec.paths, 0), set(adapter.spec.paths)
    kind = KINDS[adapter.spec.kind]
    for path, array in paths.flatten(adapter.params).items():
        if wanted is not None and not wanted[path]:
            continue
        place, _, name = path.rpartition("/")
        if place in places:
            sizes[place] += _size_at(kind.role(name), array.shape, ranks_at(adapter, place))
        else:
            sizes[path] = size_of(array.shape)
    return sizes


def _size_at(role: ArrayRole, shape: Sequence[int], ranks: np.ndarray | None) -> int:
    """Trained numbers of one array of a place.

    The axis that the rank is padded on counts as wide as each layer's rank; any other array counts
    for the layers that have a rank, or in full where the kind has none.
    """
    if ranks is None:
        return size_of(shape)
    shape = tuple(shape[ranks.ndim :])
    if role.rank_axis is None:
        return size_of(shape) * int(np.count_nonzero(ranks))
    return size_of(shape) // max(1, shape[role.rank_axis]) * int(ranks.sum())


def size_of(shape: Sequence[int]) -> int:
    """How many numbers an array of this shape holds."""
    return int(np.prod(shape, dtype=np.int64))
