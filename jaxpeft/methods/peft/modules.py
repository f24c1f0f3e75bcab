"""Converts between the modules of an HF PEFT folder and stacked layers."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import RANK, Adapter
from jaxpeft.ops.linear import shape_of


def stack(
    modules: Mapping[str, Mapping[str, Any]], sites: Mapping[str, paths.Site], params: Mapping
) -> dict[str, dict[str, jax.Array]]:
    """Stacks the arrays of single modules over the layers; layers without arrays are zero.

    Args:
        modules: By full module name, the arrays of one layer. An array (say, ``a``) has the same
            shape in all layers of a stack: pad it if ranks differ.
        sites: The places of modules, from `jaxpeft.core.paths.module_names`.
        params: Base parameters, for the number of layers.

    Returns:
        By path of the base leaf, the stacked arrays, for `jaxpeft.core.paths.unflatten`.
    """
    stacked: dict[str, dict[str, np.ndarray]] = {}
    for name, arrays in modules.items():
        path, layer = sites[name].path, sites[name].layer
        layers = () if layer is None else (shape_of(paths.get(params, path))[0],)
        place = stacked.setdefault(path, {})
        for key, value in arrays.items():
            value = np.asarray(value)
            if key not in place:
                place[key] = np.zeros((*layers, *value.shape), value.dtype)
            place[key][() if layer is None else layer] = value
    return jax.tree.map(jnp.array, stacked)


def modules_of(adapter: Adapter) -> Iterator[tuple[str, str, Any]]:
    """Every adapted module of an adapter whose places have a buffer ``rank``.

    Yields:
        Its full name, its path, and the index of its layer in stacked arrays, as in
        ``np.asarray(leaf)[index]`` (``()`` if nothing is stacked).
    """
    names = dict(adapter.spec.names)
    for path in adapter.spec.paths:
        rank = np.asarray(paths.get(adapter.buffers, f"{path}/{RANK}"))
        if path in names:
            for index in np.ndindex(rank.shape):
                if rank[index] > 0:
                    yield names[path].replace("{layer}", "".join(map(str, index))), path, index
            continue
        if adapter.spec.axes:  # of a model that is not ours: one name, whatever is stacked
            first = (0,) * rank.ndim
            if rank[first] > 0:
                yield path.replace("/", "."), path, first
            continue
        for layer in range(len(rank)) if paths.is_stacked(path) else [None]:
            index = () if layer is None else layer
            if rank[index] > 0:
                yield paths.module_name(path, layer), path, index


def targets_value(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Short names for ``target_modules`` if they select exactly the chosen modules, else full ones.

    Args:
        chosen: Full names of the adapted modules.
        names: Full names of all modules that PEFT might select.
    """
    chosen = set(chosen)
    suffixes = sorted({name.rpartition(".")[2] for name in chosen})
    by_suffix = {name for name in names if paths.name_matches(suffixes, name)}
    return suffixes if by_suffix == chosen else sorted(chosen)


def default_and_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by escaped full name, for PEFT's patterns."""
    counts = collections.Counter(values.values())
    default = max(counts, key=lambda value: (counts[value], value))
    others = {re.escape(name): value for name, value in values.items() if value != default}
    return default, others


def contiguous(array: Any) -> np.ndarray:
    """The array in the form that safetensors stores: float32, contiguous rows."""
    return np.ascontiguousarray(array, np.float32)


def require_finite(name: str, *arrays: Any) -> None:
    """Checks the trained values of a module.

    Raises:
        UserError: A value is not finite.
    """
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"{name}: the adapter holds values that are not finite; it diverged.")


def shortest_decimal(value: Any, divisor: float = 1.0) -> float:
    """The shortest decimal that is `value` in float32 after division by `divisor`.

    It recovers the number that a user wrote from a float32 buffer.

    Args:
        value: A float32 number.
        divisor: The number that the decimal was divided by: for an alpha, the rank or its root.

    Example:
        >>> shortest_decimal(np.float32(0.1 / 3), 3)
        0.1
    """
    exact = float(value) * divisor
    candidates = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((c for c in candidates if np.float32(c / divisor) == value), exact)


def one_dropout(adapter: Adapter) -> float:
    """The dropout rate of an adapter whose layers must all have the same.

    Raises:
        UserError: The layers have different rates.
    """
    rates = {
        shortest_decimal(np.asarray(paths.get(adapter.buffers, f"{path}/dropout"))[at])
        for _, path, at in modules_of(adapter)
    }
    if len(rates) > 1:
        raise UserError(f"layers of this adapter differ in dropout: {sorted(rates)}.")
    return rates.pop() if rates else 0.0
