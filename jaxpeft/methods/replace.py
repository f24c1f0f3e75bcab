"""Trained copies of base leaves that stand in for them: the leaf ``{"value": array}``.

Full fine-tuning, LayerNorm tuning and BitFit are made of these, and LoRA's trained biases and
saved modules too. Values are kept in float32 whatever the base's dtype: an update of 1e-3 would be
lost in bfloat16.
"""

from typing import Any

import jax.numpy as jnp

from jaxpeft import paths
from jaxpeft.methods.base import Adapter, Leaf, Spec


def replacement(kind: str, leaves: dict[str, Any]) -> Adapter:
    """An adapter whose arrays stand in for the base leaves at their paths, equal at first."""
    values = {path: {"value": jnp.array(leaf, jnp.float32)} for path, leaf in leaves.items()}
    return Adapter(paths.unflatten(values), {}, Spec(kind=kind, paths=tuple(sorted(leaves))))


def bind_value(leaf: Leaf) -> dict[str, Any]:
    """The trained array itself."""
    return {leaf.path: leaf.params["value"]}


def value_shape(params: dict) -> tuple[int, ...]:
    """The shape of the leaf that is replaced."""
    return tuple(params["value"].shape)
