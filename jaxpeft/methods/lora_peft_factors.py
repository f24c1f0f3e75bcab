"""The factors of a LoRA in HF PEFT's format, out and in.

PEFT keeps ``lora_A.weight`` ``(rank, d_in)`` and ``lora_B.weight`` ``(d_out, rank)``: the
transposes of our ``a`` and ``b``, with the layers taken apart and the padding of the rank cut off.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import paths
from jaxpeft.errors import UserError, first_few
from jaxpeft.linear import shape_of
from jaxpeft.methods import dora
from jaxpeft.methods.base import Adapter
from jaxpeft.methods.exchange import (
    CONFIG,
    PREFIX,
    contiguous,
    default_and_exceptions,
    modules_of,
    require_finite,
    shortest_decimal,
    stack,
    targets_value,
)
from jaxpeft.methods.lora_peft_config import Arrays, Folder, Part

FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")
MAGNITUDE = re.compile(re.escape(PREFIX) + r"(.+)\.lora_magnitude_vector")


def owns(folder: Folder, key: str) -> bool:
    """Whether a tensor is a factor, or a magnitude of DoRA."""
    magnitude = folder.config.dora and MAGNITUDE.fullmatch(key)
    return bool(magnitude or FACTOR.fullmatch(key))


def check(folder: Folder) -> None:
    """Raises a UserError unless the factors are those that config and base ask for."""
    modules = _pairs(folder)
    sites = paths.module_names(folder.base.params)
    _check_modules(folder, modules, sites)
    _check_shapes(folder, modules, sites)


def width(folder: Folder) -> int:
    """The largest rank."""
    return max(folder.config.rank_of(name) for name in _pairs(folder))


def read(folder: Folder, width: int) -> Arrays:
    """The factors of every kernel, stacked and padded to `width`."""
    config, tensors, base = folder.config, folder.tensors, folder.base
    layers = {}
    for name in _pairs(folder):
        rank = config.rank_of(name)
        a, b = (tensors.read(f"{PREFIX}{name}.lora_{letter}.weight").T for letter in "AB")
        layers[name] = {
            "a": np.pad(a, ((0, 0), (0, width - rank))),
            "b": np.pad(b, ((0, width - rank), (0, 0))),
            "scale": np.float32(config.scale_of(name)),
            "rank": np.int32(rank),
        }
        if config.dora:
            layers[name]["m"] = tensors.read(f"{PREFIX}{name}.lora_magnitude_vector")
    places = stack(layers, paths.module_names(base.params), base.params)
    for path, arrays in places.items():
        arrays["dropout"] = jnp.full(arrays["rank"].shape, config.dropout, jnp.float32)
        if config.dora:
            arrays["norm"] = dora.start(paths.get(base.params, path), arrays["rank"])
    trained = ("a", "b", "m")
    return {
        path: (
            {key: array for key, array in arrays.items() if key in trained},
            {key: array for key, array in arrays.items() if key not in trained},
        )
        for path, arrays in places.items()
    }


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of the factors; see `Part`."""
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas, dropouts = {}, {}, set()
    options = dict(adapter.spec.options)
    rslora = bool(options.get("rslora", False))
    for name, path, at in modules_of(adapter):
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{key}"))[at] for key in "ab")
        scale, rank, dropout = (
            np.asarray(paths.get(adapter.buffers, f"{path}/{key}"))[at]
            for key in ("scale", "rank", "dropout")
        )
        r = int(rank)
        require_finite(name, a, b)
        if np.any(np.any(a[:, r:] != 0, axis=0) & np.any(b[r:] != 0, axis=1)):
            raise ValueError(f"{name}: the padding beyond rank {r} is not zero in both factors.")
        alpha = shortest_decimal(scale, math.sqrt(r) if rslora else r)
        a, b = a[:, :r], b[:r]
        if "init_weights" in options:  # what PEFT's own conversion writes
            a0, b0 = (
                np.asarray(paths.get(adapter.buffers, f"{path}/{k}"))[at] for k in ("a0", "b0")
            )
            a, b = np.concatenate([a, a0[:, :r]], 1), np.concatenate([b, -b0[:r]])
            r, alpha = 2 * r, alpha * (math.sqrt(2) if rslora else 2)
        if "dora" in options:
            m = np.asarray(paths.get(adapter.params, f"{path}/m"))[at]
            require_finite(name, m)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = contiguous(m)
        ranks[name], alphas[name] = r, int(alpha) if alpha.is_integer() else alpha
        dropouts.add(shortest_decimal(dropout))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = contiguous(a.T)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = contiguous(b.T)
    if not ranks:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    if len(dropouts) > 1:
        raise UserError(
            f"PEFT folders hold one dropout rate for all layers, this adapter has {dropouts}."
        )
    rank, rank_pattern = default_and_exceptions(ranks)
    alpha, alpha_pattern = default_and_exceptions(alphas)
    values = {
        "alpha_pattern": alpha_pattern,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets_value(ranks, paths.module_names(base.params)),
    }
    return values, tensors


PART = Part(owns=owns, check=check, width=width, read=read, write=write)


def _pairs(folder: Folder) -> dict[str, set[str]]:
    """Which factors every module has, "A" and "B", by its full name; a lonely one is an error."""
    tensors, with_magnitudes = folder.tensors, folder.config.dora
    modules: dict[str, set[str]] = {}
    magnitudes = set()
    for key in sorted(tensors.shapes):
        if found := FACTOR.fullmatch(key):
            modules.setdefault(found.group(1), set()).add(found.group(2))
        elif with_magnitudes and (found := MAGNITUDE.fullmatch(key)):
            magnitudes.add(found.group(1))
    lonely = [
        f"{name}.lora_{'B' if 'A' in pair else 'A'}.weight"
        for name, pair in modules.items()
        if len(pair) < 2
    ]
    if with_magnitudes:
        lonely += [f"{name}.lora_magnitude_vector" for name in modules if name not in magnitudes]
        lonely += [f"{name}.lora_A.weight" for name in magnitudes if name not in modules]
    if lonely:
        raise UserError(
            f"{tensors.file}: {len(lonely)} tensors are missing: {first_few(lonely, 3)}."
        )
    if not modules:
        raise UserError(f"{tensors.file}: holds no LoRA tensors.")
    return modules


def _check_modules(
    folder: Folder, modules: Mapping[str, Any], sites: Mapping[str, paths.Site]
) -> None:
    """The modules of the tensors, of the base and of the config must be the same."""
    file, base, config = folder.tensors.file, folder.base, folder.config
    foreign = [name for name in modules if name not in sites]
    if foreign:
        tied = foreign == ["lm_head"] and base.config.tie_embeddings
        hint = "; a head tied to the embedding cannot be adapted yet" if tied else ""
        raise UserError(
            f"{file}: tensors for {len(foreign)} modules that the base {base.name!r} "
            f"({base.config.num_layers} layers) lacks: {first_few(foreign, 3)}{hint}."
        )
    candidates = (*sites, "model.embed_tokens", "lm_head")
    selected = {name for name in candidates if config.selection.selects(name)}
    missing = [name for name in sorted(selected) if name not in modules]
    if missing:
        raise UserError(
            f"{file}: no tensors for {len(missing)} modules that target_modules in "
            f"{CONFIG} selects in the base {base.name!r} ({base.config.num_layers} "
            f"layers): {first_few(missing, 3)}; the file is incomplete or made for another base."
        )
    extra = [name for name in modules if name not in selected]
    if extra:
        raise UserError(
            f"{file}: tensors for {len(extra)} modules that target_modules in {CONFIG} "
            f"does not select: {first_few(extra, 3)}; the two files belong to different adapters."
        )


def _check_shapes(
    folder: Folder, modules: Mapping[str, Any], sites: Mapping[str, paths.Site]
) -> None:
    """Every factor must have a float dtype, the config's rank and its kernel's width."""
    tensors, base, config = folder.tensors, folder.base, folder.config
    ranks, widths, keys = [], [], []
    for name in modules:
        d_in, d_out = shape_of(paths.get(base.params, sites[name].path))[-2:]
        rank = config.rank_of(name)
        for letter, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            key = f"{name}.lora_{letter}.weight"
            keys.append(PREFIX + key)
            shape = tensors.shapes[PREFIX + key]
            if shape != expected:
                text = f"{key} is {list(shape)}, expected {list(expected)}"
                axis = 0 if letter == "A" else 1
                same = len(shape) == 2 and shape[1 - axis] == expected[1 - axis]
                (ranks if same else widths).append(text)
        key, m = f"{PREFIX}{name}.lora_magnitude_vector", (d_out,)
        if config.dora and (keys.append(key) or tensors.shapes[key] != m):
            widths.append(
                f"{key.removeprefix(PREFIX)} is {list(tensors.shapes[key])}, expected {list(m)}"
            )
    tensors.require_floats(keys)
    if widths:
        raise UserError(
            f"{tensors.file}: {len(widths)} tensors do not fit the base {base.name!r}: "
            f"{first_few(widths, 3)}; the adapter was made for another model."
        )
    if ranks:
        raise UserError(
            f"{tensors.file}: {len(ranks)} tensors have another rank than {CONFIG} says "
            f"(r = {config.rank}): {first_few(ranks, 3)}; the two files belong to different "
            "adapters."
        )
