"""The modules that a LoRA adapts, with rank and alpha of each: PEFT's rules, strictly.

Targets and exclude are matched as in `jaxpeft.core.paths.match`. With `layers`, only chosen modules
in these layers are adapted, and modules that targets name in full. Rank and alpha are those of the
first pattern that matches the end of a module's name. A pattern that matches nothing, or a layer
that does not exist, is an error here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few, nearest
from jaxpeft.core.float32 import misfit
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import weight_at
from jaxpeft.methods.fields import is_alpha, keep_targets
from jaxpeft.methods.lora import saved
from jaxpeft.methods.peft.modules import modules_of, shortest_decimal
from jaxpeft.methods.peft.patterns import check_regex, first_match, is_count, layer_of
from jaxpeft.ops.linear import shape_of


class Module(NamedTuple):
    """One adapted module.

    Attributes:
        site: The place of its kernel.
        rank: Inner dimension.
        scale: The factor of the product of its factors.
    """

    site: paths.Site
    rank: int
    scale: float


def check(config: Any) -> None:
    """Checks the fields of a `jaxpeft.LoRA` that choose modules.

    It also puts them into the form in which they are kept: tuples and immutable mappings.

    Raises:
        ValueError: A field is wrong, or two fields do not go together.
    """
    keep_targets(config, "layers_pattern")
    patterns, layers = config.layers_pattern, config.layers
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        check_regex("LoRA.layers_pattern", pattern)
    object.__setattr__(config, "layers", (layers,) if isinstance(layers, int) else tuple(layers))
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in config.layers):
        raise ValueError(
            f"LoRA.layers must be whole numbers, the first layer is 0, got {config.layers!r}."
        )
    regex = isinstance(config.targets, str) and config.targets.lower() != paths.ALL_LINEAR
    if config.layers and regex:
        raise ValueError("LoRA.layers must be empty with a regex: write the layers into targets.")
    if config.layers_pattern and not config.layers:
        raise ValueError("LoRA.layers_pattern must be empty without layers.")
    _check_pattern(config, "rank_pattern", is_count, "whole numbers of at least 1")
    _check_pattern(config, "alpha_pattern", is_alpha, "finite and positive")


def sites_of(params: Mapping) -> dict[str, paths.Site]:
    """All modules that LoRA can adapt, by full name: linear modules, a tied head, and the table."""
    return saved.sites_of(params, "kernel") | saved.sites_of(params, "embedding")


def select(config: Any, params: Mapping, leave: Iterable[str] = ()) -> dict[str, Module]:
    """The modules that a `jaxpeft.LoRA` adapts.

    Args:
        config: The config.
        params: Base parameters: arrays, nodes or shapes.
        leave: Full names of modules that are never adapted, even if they are chosen.

    Returns:
        The modules by full name.

    Raises:
        UserError: A pattern matches nothing, a layer does not exist, a rank exceeds its kernel's
            sides, or no module is left.
    """
    sites = sites_of(params)
    chosen = paths.match(config.targets, config.exclude, sites)
    if config.layers:
        chosen = _of_layers(config, chosen, sites)
    gone = set(leave)
    chosen = {name: site for name, site in chosen.items() if name not in gone}
    if not chosen:
        raise UserError("LoRA.save_modules: every module of targets is saved whole; none is left.")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(first_match({pattern: True}, name, False) for name in chosen):
                raise UserError(
                    f"LoRA.{field}: {pattern!r} matches no adapted module; closest names: "
                    f"{_closest(pattern, chosen)}. As in PEFT it is a regex for the end of a name."
                )
    modules = {}
    for name, site in chosen.items():
        rank = first_match(config.rank_pattern, name, config.rank)
        alpha = first_match(config.alpha_pattern, name, config.alpha)
        field = "rank" if rank == config.rank else "rank_pattern"
        check_rank(f"LoRA.{field}", rank, site.path, params)
        scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        if text := misfit(scale):
            raise UserError(f"LoRA.alpha divided by the rank {text} for {name}.")
        modules[name] = Module(site, rank, scale)
    return modules


def check_rank(field: str, rank: int, path: str, params: Mapping) -> None:
    """Checks a rank against the sides of a kernel.

    Args:
        field: The field of the config that gives the rank, for messages.
        rank: The rank.
        path: The path of the kernel in `params`.
        params: The base's leaves by path.

    Raises:
        UserError: The rank exceeds the smaller side.
    """
    d_in, d_out = shape_of(weight_at(params, path))[-2:]
    if rank > min(d_in, d_out):
        raise UserError(
            f"{field} {rank} exceeds the smaller side of {path} ({d_in} x {d_out}); choose at most "
            f"{min(d_in, d_out)}."
        )


def by_path(modules: Iterable[Module], params: Mapping) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ranks and scales of all layers at each path, zero if a layer is not adapted."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for site, rank, scale in sorted(modules, key=lambda module: module.site.path):
        if site.path not in found:
            stack = shape_of(weight_at(params, site.path))[:-2]
            found[site.path] = np.zeros(stack, np.int32), np.zeros(stack, np.float32)
        at = () if site.layer is None else site.layer
        ranks, scales = found[site.path]
        ranks[at], scales[at] = rank, scale
    return found


class Numbers(NamedTuple):
    """The numbers of an adapter's modules, read from its buffers, by full name.

    Attributes:
        ranks: Inner dimensions.
        alphas: Numerators of the scales, as the shortest decimals that give them.
        dropouts: The rates that occur.
        rslora: Whether all alphas are divided by the root of the rank. If only some are, all alphas
            are given as if divided by the rank, which gives the same scales.
    """

    ranks: dict[str, int]
    alphas: dict[str, float]
    dropouts: set[float]
    rslora: bool


def numbers_of(adapter: Adapter) -> Numbers:
    """Ranks, alphas and dropout rates of an adapter that has only places with factors."""
    arrays = {
        name: [
            np.asarray(paths.get(adapter.buffers, f"{path}/{key}"))[at]
            for key in ("scale", "rank", "dropout", "rslora")
        ]
        for name, path, at in modules_of(adapter)
    }
    rslora = all(flag for *_, flag in arrays.values())
    found = Numbers({}, {}, set(), rslora)
    for name, (scale, rank, dropout, _) in arrays.items():
        found.ranks[name] = int(rank)
        found.alphas[name] = shortest_decimal(scale, math.sqrt(rank) if rslora else int(rank))
        found.dropouts.add(shortest_decimal(dropout))
    return found


def _check_pattern(config: Any, field: str, allowed: Any, expected: str) -> None:
    if not isinstance(pattern := getattr(config, field), Mapping):
        raise ValueError(f"LoRA.{field} must map names to numbers, got {pattern!r}.")
    pattern = FrozenMap(pattern)
    object.__setattr__(config, field, pattern)
    for key, value in pattern.items():
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"LoRA.{field}: {key!r} is not a valid regex: {error}.") from None
        if not allowed(value):
            raise ValueError(f"LoRA.{field} values must be {expected}, got {value!r} for {key!r}.")


def _of_layers(
    config: Any, chosen: Mapping[str, paths.Site], sites: Mapping[str, paths.Site]
) -> dict[str, paths.Site]:
    """The chosen modules that are in `LoRA.layers`, or that targets name in full."""
    patterns = config.layers_pattern
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if all(layer_of(name, (pattern,)) is None for name in sites):
            raise UserError(
                f"LoRA.layers_pattern: {pattern!r} is the name of no list of layers; this model's "
                "is called 'layers'."
            )
    layers = [layer_of(name, patterns) for name in sites]
    known = {layer for layer in layers if layer is not None}
    missing = [layer for layer in config.layers if layer not in known]
    if missing:
        raise UserError(
            f"LoRA.layers: the model has no layer {missing[0]}; its layers are 0 to {max(known)}."
        )
    in_full = () if isinstance(config.targets, str) else config.targets
    kept = {
        name: site
        for name, site in chosen.items()
        if name in in_full or layer_of(name, patterns) in config.layers
    }
    if not kept:
        raise UserError(f"LoRA.layers {config.layers!r} hold no module of targets.")
    return kept


def _closest(pattern: str, names: Iterable[str]) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    return first_few(nearest(pattern.rpartition(".")[2], suffixes) or suffixes, 8)
