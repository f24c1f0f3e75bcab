"""How an ``adapter_config.json`` of HF PEFT 0.21 initialises the factors of a LoRA.

PiSSA and OLoRA subtract part of the base. An unconverted folder keeps that setting, and PEFT
subtracts again at every load. The part depends only on the base's weights; the signs a
decomposition picks cancel. PEFT then rounds the remainder to the base's dtype, which is not done
here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.family import weight_at
from jaxpeft.methods.lora import starts
from jaxpeft.methods.peft.values import CONFIG, Values
from jaxpeft.ops.linear import shape_of
from jaxpeft.ops.quant import QuantTensor

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base unchanged."""

CONVERT = (
    "convert the adapter with PEFT: save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)"
)

EVA = {
    "adjust_scaling_factors": True,
    "label_mask_value": -100,
    "rho": 2.0,
    "tau": 0.99,
    "use_label_mask": True,
    "whiten": False,
}
"""PEFT's settings of EVA, with their defaults."""


def start_fields(values: Values) -> dict[str, Any]:
    """The fields of a `jaxpeft.LoRA` about its initialisation.

    PEFT's randomised PiSSA becomes the exact one.

    Raises:
        UserError: The initialisation is not supported.
    """
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        init = "pissa"
    if init is True:
        return {}
    if init == "loftq":
        settings = _settings(values, "loftq_config", {"loftq_bits": 4, "loftq_iter": 1})
        if settings["loftq_bits"] != 4:
            raise values.wrong("loftq_config", "loftq_bits 4: others are not supported")
        return {"init_weights": init, "loftq_steps": settings["loftq_iter"]}
    if init == "eva":
        settings = _settings(values, "eva_config", EVA)
        if odd := [
            name for name in EVA if name not in ("rho", "tau") and settings[name] != EVA[name]
        ]:
            raise values.wrong("eva_config", f"{odd[0]} {EVA[odd[0]]}: nothing else is supported")
        return {"init_weights": init, "eva_rho": settings["rho"], "eva_tau": settings["tau"]}
    if init not in ("gaussian", "orthogonal", "pissa", "olora"):
        raise values.wrong(
            "init_lora_weights",
            'true, "gaussian", "orthogonal", "pissa", "olora", "loftq" or "eva"',
        )
    return {"init_weights": init}


def subtracted(values: Values) -> str:
    """The initialisation whose product PEFT subtracts from the base at every load; "" for none.

    Raises:
        UserError: It cannot be repeated, or does not fit the other settings.
    """
    init = values.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if init in PLAIN_INITS:
        return ""
    where = f"{values.file}: init_lora_weights: {values.get('init_lora_weights')!r}"
    if init == "loftq":
        raise UserError(
            f"{where}: PEFT rounds the base's weights when it loads this, which is not supported. "
            "Merge with PEFT (merge_and_unload) and load the merged model; if your base holds the "
            f"rounded weights already, set init_lora_weights to true in {CONFIG}."
        )
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        raise UserError(
            f"{where}: takes a random approximation off the base, which cannot be repeated; "
            f"{CONVERT}."
        )
    if init not in starts.SUBTRACTED:
        raise UserError(f"{where} is not supported yet: it changes the base model; {CONVERT}.")
    for key in ("use_dora", "lora_bias"):
        if values.flag(key):
            raise values.wrong(key, f"false with init_lora_weights {init!r}")
    return init


def require_weights(file: Any, config: Any, sites: Mapping[str, paths.Site], params: Any) -> None:
    """Checks that the initialisation of a folder can be repeated on this base.

    Args:
        file: The config's file.
        config: A `jaxpeft.methods.lora.peft.config.PeftLoraConfig`.
        sites: All modules that LoRA can adapt.
        params: Parameters of the base.

    Raises:
        UserError: The initialisation needs weights that are quantised, not loaded, or too small.
    """
    where = f"{file}: init_lora_weights: {config.start!r}"
    for name, site in sites.items():
        if not config.adapts(name):
            continue
        kernel = weight_at(params, site.path)
        if site.path in (paths.EMBEDDING, paths.HEAD):
            raise UserError(
                f"{where} is not supported for {name}, of which PEFT saves a changed copy; "
                f"{CONVERT}."
            )
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise UserError(
                f"{where} takes a part of the base's weights off, and only its shapes are known; "
                "load the base and pass it: load_adapter(..., base)."
            )
        if isinstance(kernel, QuantTensor):
            raise UserError(
                f"{where} takes a part of the full weights off, and this base is quantised; load "
                "the adapter on the full base, save it (it becomes a plain LoRA), and load that."
            )
        rank, sides = config.rank_of(name), shape_of(kernel)[-2:]
        if rank > min(sides):
            raise UserError(
                f"{where}: rank {rank} exceeds the smaller side of {name} "
                f"({sides[0]} x {sides[1]}); no decomposition gives that many columns."
            )
        if config.start == "pissa" and not config.scale_of(name) > 0:
            raise UserError(f"{where} needs a positive alpha, {name} has {config.alpha_of(name)}.")


def first_factors(
    start: str, kernel: Any, ranks: np.ndarray, scales: np.ndarray, width: int
) -> dict[str, Float[Array, "..."]]:
    """The frozen arrays ``a0`` and ``b0`` of a place, whose product PEFT subtracts from the base.

    Args:
        start: "pissa" or "olora".
        kernel: The base's leaf, stacked or not.
        ranks: The rank of every layer, 0 if it is not adapted.
        scales: The scale of every layer.
        width: The rank to which all are padded.
    """
    key = jax.random.key(0)  # neither uses random numbers
    a0, b0 = starts.of_stack(start, key, kernel, ranks, scales, width, 1)
    return {"a0": a0, "b0": b0}


def _settings(values: Values, key: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A nested config, with PEFT's defaults for keys that are missing."""
    given = values.get(key) or {}
    if not isinstance(given, Mapping) or given.keys() - defaults.keys():
        raise values.wrong(key, f"an object with {', '.join(defaults)}")
    numbers = {name: given.get(name, value) for name, value in defaults.items()}
    for name, default in defaults.items():
        kind = int | float if isinstance(default, float) else type(default)
        if isinstance(numbers[name], bool) != (kind is bool) or not isinstance(numbers[name], kind):
            raise values.wrong(key, f"{name} like {default}")
    return numbers
