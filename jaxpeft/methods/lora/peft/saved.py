"""A LoRA's trained biases and saved modules in HF PEFT's format: reading and writing.

Saved modules have their names in the base: ``lm_head.weight``, ``norm.weight``. So do biases,
except those of modules with factors: ``q_proj.base_layer.bias``. If ``bias`` is "all", PEFT also
writes copies of the biases of saved modules that nothing reads (`SPARE`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.lora.peft.config import Arrays, Folder, Part
from jaxpeft.methods.lora.saved import WEIGHTS, sites_of
from jaxpeft.methods.peft.modules import contiguous, modules_of, require_finite, stack
from jaxpeft.methods.peft.values import PREFIX
from jaxpeft.ops.linear import shape_of

SPARE = ("modules_to_save.bias", "original_module.bias")
"""Endings of the unused copies of biases of saved modules: the trained ones and the base's."""


class Copy(NamedTuple):
    """One tensor that replaces a base leaf.

    Attributes:
        key: PEFT's name of it.
        name: Full name of the module.
        leaf: Last part of the leaf's path.
        shape: Shape in PEFT's layout.
    """

    key: str
    name: str
    leaf: str
    shape: tuple[int, ...]


def keys(folder: Folder) -> set[str]:
    """The tensors that replace base leaves by config and base, and unused copies."""
    wanted = [*_wanted(folder)]
    spare = {
        f"{PREFIX}{copy.name}.{ending}"
        for copy in wanted
        if copy.leaf == "bias" and folder.config.saves(copy.name)
        for ending in SPARE
    }
    return {copy.key for copy in wanted} | (spare & folder.tensors.shapes.keys())


def check(folder: Folder) -> None:
    """Checks that all tensors are there, with the base's shapes.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    wanted = {copy.key: copy.shape for copy in _wanted(folder)}
    folder.tensors.require_some(wanted, folder.base.name)


def read(folder: Folder, width: int) -> Arrays:
    """The trained copies, stacked over the layers."""
    del width
    params, places, wanted = folder.base.params, {}, [*_wanted(folder)]
    for leaf in (*WEIGHTS, "bias"):
        modules = {
            copy.name: {
                "value": _turned(folder.tensors.read(copy.key), leaf),
                "rank": np.int32(1),
            }
            for copy in wanted
            if copy.leaf == leaf
        }
        for path, arrays in stack(modules, sites_of(params, leaf), params).items():
            places[path] = {"value": arrays["value"]}, {"rank": arrays["rank"]}
    return places


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of biases and saved modules; see `Part`."""
    tensors, saved = {}, []
    for name, path, at in modules_of(adapter):
        leaf = path.rpartition("/")[2]
        value = np.asarray(paths.get(adapter.params, f"{path}/value"))[at]
        require_finite(name, value)
        if leaf != "bias":
            saved.append(name)
        wrapped = leaf == "bias" and _has_factors(adapter, path, at)
        tensors[_key(name, leaf, wrapped)] = contiguous(_turned(value, leaf))
    return {"modules_to_save": _names(saved, base.params) or None}, tensors


PART = Part(keys=keys, check=check, read=read, write=write)


def _wanted(folder: Folder) -> Iterator[Copy]:
    config, params = folder.config, folder.base.params
    for leaf in WEIGHTS:
        for name, site in sites_of(params, leaf).items():
            if config.saves(name):
                yield Copy(_key(name, leaf, False), name, leaf, _shape(params, site.path))
    for name, site in sites_of(params, "bias").items():
        saved, wrapped = config.saves(name), config.adapts(name)
        if saved or config.bias == "all" or (config.bias == "lora_only" and wrapped):
            shape = _shape(params, site.path)
            yield Copy(_key(name, "bias", wrapped and not saved), name, "bias", shape)


def _key(name: str, leaf: str, wrapped: bool) -> str:
    middle = ".base_layer" if wrapped else ""
    return f"{PREFIX}{name}{middle}.{'bias' if leaf == 'bias' else 'weight'}"


def _shape(params: dict, path: str) -> tuple[int, ...]:
    """The shape of one layer's leaf in PEFT's layout; a tied head has the table's shape."""
    weight = paths.get(params, path)
    if weight is None:
        return shape_of(paths.get(params, paths.EMBEDDING))
    shape = shape_of(weight)[1:] if paths.is_stacked(path) else shape_of(weight)
    return shape[::-1] if path.endswith("/kernel") else shape


def _turned(value: Any, leaf: str) -> Any:
    return value.T if leaf == "kernel" else value


def _has_factors(adapter: Adapter, path: str, at: Any) -> bool:
    """Whether the module of a bias has factors in this layer."""
    kernel = f"{path.rpartition('/')[0]}/kernel"
    if paths.get(adapter.params, f"{kernel}/a") is None:
        return False
    return bool(np.asarray(paths.get(adapter.buffers, f"{kernel}/rank"))[at] > 0)


def _names(saved: list[str], params: dict) -> list[str]:
    """Last parts of names if PEFT matches exactly the saved modules by them, else full names."""
    known = {name for leaf in WEIGHTS for name in sites_of(params, leaf)}
    names = set()
    for name in saved:
        short = name.rpartition(".")[2]
        meant = {other for other in known if other.endswith(short)}
        names.add(short if meant <= set(saved) else name)
    return sorted(names)
