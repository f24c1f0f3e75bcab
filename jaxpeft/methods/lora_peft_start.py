"""How an ``adapter_config.json`` of HF PEFT 0.21 starts the factors of a LoRA."""

from collections.abc import Mapping
from typing import Any

from jaxpeft.methods.exchange import Values

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
    """The fields of a `jaxpeft.LoRA` about its start.

    PEFT's randomised PiSSA is the exact one here.

    Raises:
        UserError: For a start that LoRA does not have here.
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


def _settings(values: Values, key: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the config, with PEFT's defaults where it says nothing."""
    given = values.get(key) or {}
    if not isinstance(given, Mapping) or given.keys() - defaults.keys():
        raise values.wrong(key, f"an object with {', '.join(defaults)}")
    numbers = {name: given.get(name, value) for name, value in defaults.items()}
    for name, default in defaults.items():
        kind = int | float if isinstance(default, float) else type(default)
        if isinstance(numbers[name], bool) != (kind is bool) or not isinstance(numbers[name], kind):
            raise values.wrong(key, f"{name} like {default}")
    return numbers
