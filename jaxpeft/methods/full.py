"""Full fine-tuning as a method: the "adapter" is a copy of base leaves that replaces them.

Reference:
    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018,
    https://arxiv.org/abs/1801.06146 (all weights move from a pre-trained start).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxpeft import paths
from jaxpeft.methods.base import Adapter, Spec

NEEDS_BASE = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """Trains every parameter of the base, in float32."""

    name: ClassVar[str] = "full"

    def init(self, params: dict, key: jax.Array) -> Adapter:
        """A float32 copy of all base leaves; `key` is not used.

        Args:
            params: Base parameters.
            key: Typed PRNG key, there for the common signature.

        Returns:
            An adapter with ``{"value": array}`` at the path of every base leaf.
        """
        del key
        return replacement(paths.flatten(params))


def replacement(leaves: dict[str, Any]) -> Adapter:
    """An adapter whose arrays stand in for the base leaves at their paths."""
    values = {path: {"value": jnp.array(leaf, jnp.float32)} for path, leaf in leaves.items()}
    spec = Spec(kind=Full.name, paths=tuple(sorted(leaves)))
    return Adapter(paths.unflatten(values), {}, spec)


def bind_leaf(base: Any, params: dict, buffers: dict, key: jax.Array | None, options: dict) -> Any:
    """The trained array itself."""
    del base, buffers, key, options
    return params["value"]


def leaf_shape(params: dict) -> tuple[int, ...]:
    """The shape of the leaf that is replaced."""
    return tuple(params["value"].shape)
