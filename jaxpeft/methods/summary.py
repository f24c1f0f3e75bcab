"""Counts what an adapter trains: modules with their ranks, and numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.lifting.trees import is_node, named_leaves
from jaxpeft.methods.adapter import Adapter, ranks_at
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import shape_of


class ModuleRow(NamedTuple):
    """One adapted leaf of the base, as a row of the table.

    Attributes:
        path: Its path in the base parameters.
        layers: The number of adapted layers and of all, such as "28/30".
        shape: The shape of one layer, such as "576 x 192".
        rank: The rank, such as "8", or "4-16" if layers differ; "-" if there is none.
        trainable: Trained numbers without padding.
    """

    path: str
    layers: str
    shape: str
    rank: str
    trainable: int


def describe_adapter(
    params: Any, adapter: Adapter, trained: Mapping | None = None
) -> list[ModuleRow]:
    """One row per adapted leaf, in the order of the adapter's paths, then one for shared arrays.

    Args:
        params: Base parameters, in any kind of tree: arrays, nodes or shapes.
        adapter: The adapter. Buffers named "rank" must be concrete; parameters may be shapes.
        trained: See `count_trainable`.

    Returns:
        Rows whose `trainable` sum up to ``count_trainable(adapter, trained)``.
    """
    sizes, rows, base = _trainable_sizes(adapter, trained), [], named_leaves(params)
    for path in adapter.spec.paths:
        ranks = ranks_at(adapter, path)
        shape = shape_of(base[path]) if path in base else ()
        stack = [axis for axis in adapter.spec.stack_positions(path) if shape]
        total = size_of([shape[axis] for axis in stack])
        shape = [size for axis, size in enumerate(shape) if axis not in stack]
        adapted = int(np.count_nonzero(ranks)) if stack and ranks is not None else total
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
    """The number of trained numbers, without padding and without layers that are not adapted.

    Args:
        adapter: See `describe_adapter`.
        trained: A tree of booleans like its `params`, from ``Method.trainable``; all by default.
    """
    return sum(_trainable_sizes(adapter, trained).values())


def count_parameters(params: Any) -> int:
    """The number of numbers in the base, by logical shape, however they are stored."""
    return sum(size_of(shape_of(leaf)) for leaf in jax.tree.leaves(params, is_leaf=is_node))


def _rank_text(ranks: np.ndarray | None) -> str:
    used = [] if ranks is None else sorted({int(rank) for rank in ranks.flat if rank})
    return "-".join(map(str, dict.fromkeys((used[0], used[-1])))) if used else "-"


def _trainable_sizes(adapter: Adapter, trained: Mapping | None) -> dict[str, int]:
    """Trained numbers by place, or by path for leaves that belong to no place."""
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

    The axis that is padded to the largest rank counts with each layer's own rank. Other arrays
    count for layers with a rank, or fully if the family has no ranks.
    """
    if ranks is None:
        return size_of(shape)
    shape = tuple(shape[ranks.ndim :])
    if role.rank_axis is None:
        return size_of(shape) * int(np.count_nonzero(ranks))
    return size_of(shape) // max(1, shape[role.rank_axis]) * int(ranks.sum())


def size_of(shape: Sequence[int]) -> int:
    """The number of numbers in an array of this shape."""
    return int(np.prod(shape, dtype=np.int64))
