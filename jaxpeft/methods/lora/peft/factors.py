"""The factors of a LoRA in HF PEFT's format: reading and writing.

PEFT stores ``lora_A.weight`` ``(rank, d_in)`` and ``lora_B.weight`` ``(d_out, rank)``: the
transposes of our ``a`` and ``b``, one per layer, without the padding of the rank. The factors of
the embedding table are ``lora_embedding_A`` ``(rank, vocab)`` and ``lora_embedding_B``.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import weight_at
from jaxpeft.methods.lora import dora
from jaxpeft.methods.lora.peft import start
from jaxpeft.methods.lora.peft.config import Arrays, Folder, Part
from jaxpeft.methods.lora.targets import numbers_of, sites_of
from jaxpeft.methods.peft.modules import (
    contiguous,
    default_and_exceptions,
    modules_of,
    require_finite,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.values import CONFIG, PREFIX
from jaxpeft.ops.linear import shape_of

FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?")


def vectors(dora: Any, lora_bias: Any) -> dict[str, str]:
    """Arrays ``(d_out,)`` that every module has beside its factors, with PEFT's endings."""
    known = {"m": ("lora_magnitude_vector", dora), "bias": ("lora_B.bias", lora_bias)}
    return {name: ending for name, (ending, there) in known.items() if there}


def keys(folder: Folder) -> set[str]:
    """The names of factors, and of vectors beside them, in the file."""
    endings = tuple(f".{ending}" for ending in _endings(folder))
    shapes = folder.tensors.shapes
    return {key for key in shapes if _factor_of(key) or key.endswith(endings)}


def check(folder: Folder) -> None:
    """Checks that the factors are those that config and base require.

    Raises:
        UserError: Factors are missing, unexpected or of another shape.
    """
    modules = _pairs(folder)
    sites = sites_of(folder.base.params)
    _check_modules(folder, modules, sites)
    _check_shapes(folder, modules, sites)


def width(folder: Folder) -> int:
    """The largest rank.

    Raises:
        UserError: The folder holds no factors, or only one of a pair.
    """
    return max(folder.config.rank_of(name) for name in _pairs(folder))


def read(folder: Folder, width: int) -> Arrays:
    """The factors of every kernel, stacked over the layers and padded to rank `width`.

    Raises:
        UserError: The folder holds no factors, or only one of a pair.
    """
    config, tensors, base = folder.config, folder.tensors, folder.base
    layers = {}
    for name in _pairs(folder):
        rank = config.rank_of(name)
        a, b = (tensors.read(PREFIX + factor_key(name, letter)).T for letter in "AB")
        layers[name] = {
            "a": np.pad(a, ((0, 0), (0, width - rank))),
            "b": np.pad(b, ((0, width - rank), (0, 0))),
            "scale": np.float32(config.scale_of(name)),
            "rank": np.int32(rank),
            "rslora": np.bool_(config.rslora),
        }
        for letter, ending in vectors(config.dora, config.lora_bias).items():
            layers[name][letter] = tensors.read(f"{PREFIX}{name}.{ending}")
    places = stack(layers, sites_of(base.params), base.params)
    for path, arrays in places.items():
        arrays["dropout"] = jnp.full(arrays["rank"].shape, config.dropout, jnp.float32)
        kernel = weight_at(base.params, path)
        if config.dora:
            arrays["norm"] = dora.start(kernel, arrays["rank"])
        if config.start:
            ranks, scales = np.asarray(arrays["rank"]), np.asarray(arrays["scale"])
            arrays |= start.first_factors(config.start, kernel, ranks, scales, width)
    trained = ("a", "b", "m", "bias")
    return {
        path: (
            {key: array for key, array in arrays.items() if key in trained},
            {key: array for key, array in arrays.items() if key not in trained},
        )
        for path, arrays in places.items()
    }


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of the factors; see `Part`.

    Raises:
        ValueError: The padding of factors is not zero.
        UserError: The adapter adapts no module, or layers differ in dropout.
    """
    tensors: dict[str, np.ndarray] = {}
    options = dict(adapter.spec.options)
    ranks, alphas, dropouts, rslora = numbers_of(adapter)
    for name, path, at in modules_of(adapter):
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{key}"))[at] for key in "ab")
        require_finite(name, a, b)
        r = ranks[name]
        if np.any(np.any(a[:, r:] != 0, axis=0) & np.any(b[r:] != 0, axis=1)):
            raise ValueError(f"{name}: the padding beyond rank {r} is not zero in both factors.")
        a, b = a[:, :r], b[:r]
        if "init_weights" in options:  # as in PEFT's own conversion
            a0, b0 = (
                np.asarray(paths.get(adapter.buffers, f"{path}/{k}"))[at] for k in ("a0", "b0")
            )
            a, b = np.concatenate([a, a0[:, :r]], 1), np.concatenate([b, -b0[:r]])
            ranks[name], alphas[name] = 2 * r, alphas[name] * (math.sqrt(2) if rslora else 2)
        for letter, ending in vectors("dora" in options, "lora_bias" in options).items():
            vector = np.asarray(paths.get(adapter.params, f"{path}/{letter}"))[at]
            require_finite(name, vector)
            tensors[f"{PREFIX}{name}.{ending}"] = contiguous(vector)
        tensors[PREFIX + factor_key(name, "A")] = contiguous(a.T)
        tensors[PREFIX + factor_key(name, "B")] = contiguous(b.T)
    if not ranks:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    if len(dropouts) > 1:
        raise UserError(
            f"PEFT folders hold one dropout rate for all layers, this adapter has {dropouts}."
        )
    rank, rank_pattern = default_and_exceptions(ranks)
    alpha, alpha_pattern = default_and_exceptions(
        {name: int(value) if value.is_integer() else value for name, value in alphas.items()}
    )
    values = {
        "alpha_pattern": alpha_pattern,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets_value(ranks, sites_of(base.params)),
        "use_rslora": rslora,
    }
    return values, tensors


PART = Part(keys=keys, check=check, width=width, read=read, write=write)


def factor_key(name: str, letter: str) -> str:
    """PEFT's key of a factor, without its prefix; the embedding table has keys of its own."""
    if name == paths.module_name(paths.EMBEDDING):
        return f"{name}.lora_embedding_{letter}"
    return f"{name}.lora_{letter}.weight"


def _factor_of(key: str) -> tuple[str, str] | None:
    """The module and the letter of a factor's key; None for other keys."""
    found = FACTOR.fullmatch(key)
    if found is None or key != PREFIX + factor_key(found[1], found[2]):
        return None
    return found[1], found[2]


def _endings(folder: Folder) -> list[str]:
    return list(vectors(folder.config.dora, folder.config.lora_bias).values())


def _pairs(folder: Folder) -> dict[str, set[str]]:
    """The factors of every module, "A" and "B", by its full name; a missing one is an error."""
    tensors = folder.tensors
    modules: dict[str, set[str]] = {}
    for key in sorted(tensors.shapes):
        if found := _factor_of(key):
            modules.setdefault(found[0], set()).add(found[1])
    lonely = [
        factor_key(name, "B" if "A" in pair else "A")
        for name, pair in modules.items()
        if len(pair) < 2
    ]
    for ending in _endings(folder):
        beside = {
            key.removeprefix(PREFIX).removesuffix(f".{ending}")
            for key in tensors.shapes
            if key.endswith(f".{ending}")
        }
        lonely += [f"{name}.{ending}" for name in modules if name not in beside]
        lonely += [factor_key(name, "A") for name in sorted(beside) if name not in modules]
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
    """Checks that the modules of the tensors, of the base and of the config are the same."""
    file, base, config = folder.tensors.file, folder.base, folder.config
    foreign = [name for name in modules if name not in sites]
    if foreign:
        raise UserError(
            f"{file}: tensors for {len(foreign)} modules that the base {base.name!r} "
            f"({base.config.num_layers} layers) lacks: {first_few(foreign, 3)}."
        )
    selected = {name for name in sites if config.adapts(name)}
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
    """Checks that every factor has a float dtype, the config's rank and its kernel's width."""
    tensors, base, config = folder.tensors, folder.base, folder.config
    ranks, widths, keys = [], [], []
    for name in modules:
        d_in, d_out = shape_of(weight_at(base.params, sites[name].path))[-2:]
        rank = config.rank_of(name)
        for letter, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            key = factor_key(name, letter)
            keys.append(PREFIX + key)
            shape = tensors.shapes[PREFIX + key]
            if shape != expected:
                text = f"{key} is {list(shape)}, expected {list(expected)}"
                axis = 0 if letter == "A" else 1
                same = len(shape) == 2 and shape[1 - axis] == expected[1 - axis]
                (ranks if same else widths).append(text)
        for ending in _endings(folder):
            keys.append(f"{PREFIX}{name}.{ending}")
            shape = tensors.shapes[keys[-1]]
            if shape != (d_out,):
                widths.append(f"{name}.{ending} is {list(shape)}, expected [{d_out}]")
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
