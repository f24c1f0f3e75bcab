"""AdaLoRA in HF PEFT's format: reading and writing.

PEFT keeps ``lora_A`` ``(rank, d_in)``, ``lora_E`` ``(rank, 1)`` and ``lora_B`` ``(d_out, rank)``.
After training, ``rank_pattern`` says for every module which of the initial triplets are left, and
the file holds only those; the scale stays that of the initial rank. In jaxpeft removed triplets are
zeros in their old places.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.lora.peft import config
from jaxpeft.methods.peft.modules import (
    contiguous,
    modules_of,
    require_finite,
    shortest_decimal,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import SHARED, shape_of

COUNTS = {"rank": "target_r", "initial_steps": "tinit", "final_steps": "tfinal", "every": "deltaT"}
NUMBERS = {"orthogonality": "orth_reg_weight", "beta1": "beta1", "beta2": "beta2"}
"""Fields that only training needs, and PEFT's keys for them."""
LEAST = {"rank": 1, "initial_steps": 0, "final_steps": 0, "every": 1}
"""The smallest value of each whole number."""

STEPS = "steps"
"""Updates of the run that an adapter was made for, PEFT's ``total_step``; 0 if unknown."""


def settings(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The settings that only training needs, as buffers, so that the adapter knows its config.

    Args:
        values: The fields of an `AdaLoRA`, or more.
        steps: Updates of the whole run, or 0.
    """
    whole = {field: jnp.int32(values[field]) for field in COUNTS}
    real = {field: jnp.float32(values[field]) for field in NUMBERS}
    return {SHARED: {**whole, **real, STEPS: jnp.int32(steps)}}


def saved_settings(adapter: Adapter) -> dict[str, Any]:
    """The settings of an adapter, by field."""
    shared = adapter.buffers[SHARED]
    whole = {field: int(shared[field]) for field in COUNTS}
    return whole | {field: shortest_decimal(np.asarray(shared[field])) for field in NUMBERS}


def read_settings(values: Values) -> dict[str, Any]:
    """The settings in PEFT's config, under jaxpeft's names.

    Raises:
        UserError: A setting has a value that PEFT would refuse.
    """
    whole = {field: values.count(key, LEAST[field]) for field, key in COUNTS.items()}
    real = {field: values.number(key) for field, key in NUMBERS.items()}
    if real["orthogonality"] < 0:
        raise values.wrong("orth_reg_weight", "a number of at least 0")
    for key in ("beta1", "beta2"):
        if not 0.0 < real[key] < 1.0:
            raise values.wrong(key, "a number above 0 and below 1")
    return whole | real


def read_steps(values: Values, own: Mapping[str, Any]) -> int:
    """The number of updates of the run that a PEFT config describes.

    Raises:
        UserError: The config leaves no updates in which ranks are lowered.
    """
    steps, taken = values.count("total_step"), own["initial_steps"] + own["final_steps"]
    if steps <= taken:
        raise values.wrong("total_step", f"more than tinit and tfinal together, {taken}")
    return steps


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`.

    Raises:
        UserError: ``rank_pattern`` names a module that ``target_modules`` does not select.
    """
    r, sites = values.count("init_r"), paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    kept = {name: np.ones(r, bool) for name in chosen} | _kept(values, r)
    if strange := sorted(kept.keys() - chosen.keys()):
        raise values.wrong("rank_pattern", f"modules that target_modules selects, not {strange[0]}")
    wanted = {}
    for name, site in chosen.items():
        d_in, d_out = shape_of(paths.get(base.params, site.path))[-2:]
        rank = int(kept[name].sum())
        shapes = {"A": (rank, d_in), "B": (d_out, rank), "E": (rank, 1)}
        wanted |= {_key(name, letter): shape for letter, shape in shapes.items()}
    tensors.require(wanted, base.name)

    modules = {}
    for name in chosen:
        a, b, e = (tensors.read(_key(name, letter)) for letter in "ABE")
        full = {"a": np.zeros((a.shape[1], r)), "b": np.zeros((r, b.shape[0])), "e": np.zeros(r)}
        full = {letter: array.astype(np.float32) for letter, array in full.items()}
        full["a"][:, kept[name]], full["b"][kept[name]], full["e"][kept[name]] = a.T, b.T, e[:, 0]
        modules[name] = full
    trained = stack(modules, sites, base.params)
    alpha, dropout = values.number("lora_alpha"), values.probability("lora_dropout")
    scale = np.float32((alpha if alpha > 0 else r) / (r + 1e-5))
    buffers = {
        path: {
            "dropout": jnp.full(on.shape, dropout, jnp.float32),
            "rank": r * on,
            "scale": jnp.where(on > 0, scale, 0.0),
        }
        for path, on in selected_layers(base.params, chosen).items()
    }
    own = read_settings(values)
    shared = settings(own, read_steps(values, own))
    spec = Spec(kind="adalora", paths=tuple(sorted(trained)), rank=r)
    return Adapter(paths.unflatten(trained), paths.unflatten(buffers) | shared, spec)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    tensors, pattern, scale, dropout = {}, {}, np.float32(1), np.float32(0)
    factors = {}
    for name, path, at in modules_of(adapter):
        place, buffers = paths.get(adapter.params, path), paths.get(adapter.buffers, path)
        factors[name] = [np.asarray(place[letter])[at] for letter in "abe"]
        require_finite(name, *factors[name])
        scale, dropout = np.asarray(buffers["scale"])[at], np.asarray(buffers["dropout"])[at]
    fresh = not any(e.any() for _, _, e in factors.values())
    for name, (a, b, e) in factors.items():
        kept = np.ones(e.shape, bool) if fresh else e != 0
        pattern[f"{name}.lora_E"] = kept.tolist()
        tensors[_key(name, "A")] = contiguous(a[:, kept].T)
        tensors[_key(name, "B")] = contiguous(b[kept].T)
        tensors[_key(name, "E")] = contiguous(e[kept, None])
    r, own = adapter.spec.rank, saved_settings(adapter)
    alpha, steps = shortest_decimal(scale, r + 1e-5), int(adapter.buffers[SHARED][STEPS])
    values = {key: own[field] for field, key in (COUNTS | NUMBERS).items()}
    values |= {
        "init_r": r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": shortest_decimal(dropout),
        "rank_pattern": None if all(map(all, pattern.values())) else pattern,
        "target_modules": targets_value(factors, paths.module_names(base.params)),
        # Only a run knows its length. PEFT wants room between the first and the last updates, also
        # to read a folder.
        "total_step": steps or own["initial_steps"] + own["final_steps"] + 1,
    }
    return values, tensors


def _kept(values: Values, r: int) -> dict[str, np.ndarray]:
    """The triplets that are left, by module."""
    kept, pattern = {}, values.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise values.wrong("rank_pattern", "an object of names and lists")
    for key, marks in pattern.items():
        if not (isinstance(marks, list) and len(marks) == r and set(map(type, marks)) <= {bool}):
            raise values.wrong("rank_pattern", f"lists of {r} times true or false")
        kept[key.removesuffix(".default").removesuffix(".lora_E")] = np.array(marks)
    return kept


def _key(name: str, letter: str) -> str:
    return f"{PREFIX}{name}.lora_{letter}"


OWN = {
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}

PEFT = PeftFormat(
    type="ADALORA",
    title="AdaLoRA adapter",
    defaults={**config.DEFAULTS, **OWN},
    read_keys=(
        *OWN,
        *("exclude_modules", "layers_pattern", "layers_to_transform"),
        *("lora_alpha", "lora_dropout", "target_modules"),
    ),
    harmless_keys=(
        *("corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size", "r"),
    ),
    read=read,
    write=write,
)
