"""The list of methods: one line a family. Whatever depends on the kind of an adapter looks here."""

from typing import Any

from jaxpeft.methods import (
    adalora,
    bitfit,
    full,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    multitask_prompt,
    oft,
    p_tuning,
    prefix,
    prompt,
    trainable_tokens,
    vera,
)
from jaxpeft.methods.base import Kind

_ALL = (
    lora.KIND,
    full.KIND,
    prompt.KIND,
    p_tuning.KIND,
    multitask_prompt.KIND,
    prefix.KIND,
    adalora.KIND,
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
