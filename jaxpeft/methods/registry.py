"""The list of methods: one line a family. Whatever depends on the kind of an adapter looks here."""

from typing import Any

from jaxpeft.methods.adalora import config
from jaxpeft.methods.family import Kind
from jaxpeft.methods.kernels import ia3, loha, lokr, oft, vera
from jaxpeft.methods.leaves import bitfit, full, ln_tuning, trainable_tokens
from jaxpeft.methods.lora import config as lora
from jaxpeft.methods.prompts import multitask_prompt, p_tuning, prefix, prompt

_ALL = (
    lora.KIND,
    full.KIND,
    prompt.KIND,
    p_tuning.KIND,
    multitask_prompt.KIND,
    prefix.KIND,
    config.KIND,
    oft.KIND,
    ln_tuning.KIND,
    bitfit.KIND,
    ia3.KIND,
    loha.KIND,
    lokr.KIND,
    vera.KIND,
    trainable_tokens.KIND,
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""By ``Spec.kind`` what reads such adapters."""

METHODS: dict[str, Any] = {kind.name: kind.config for kind in _ALL}
"""Config class by the name that YAML's ``method.name`` uses."""
