"""Full fine-tuning as a method: the "adapter" is a copy of all base leaves that replaces them.

Reference:
    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018,
    https://arxiv.org/abs/1801.06146 (all weights are trained from a pre-trained start).
"""

import dataclasses
from typing import ClassVar

import jax

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Kind
from jaxpeft.methods.leaves.replace import ARRAYS, bind_value, replacement, value_shape
from jaxpeft.methods.method import NO_CONTEXT, Context, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Trains every parameter of the base, in float32."""

    name: ClassVar[str] = "full"

    def check_any_model(self) -> None:
        """It can: it replaces the leaves as they are."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """Copies all base leaves in float32; `key` and `context` are not used.

        Args:
            params: Base parameters.
            key: Not used.
            context: Not used.

        Returns:
            An adapter with ``{"value": array}`` at the path of every base leaf.

        Raises:
            UserError: There are only shapes, or a leaf is quantised.
        """
        del key, context
        return replacement(self.name, paths.flatten(params))


def config_of(adapter: Adapter) -> Full:
    """The config, which has no fields of its own."""
    del adapter
    return Full()


KIND = Kind(
    config=Full,
    bind=bind_value,
    leaf_shape=value_shape,
    config_of=config_of,
    arrays=ARRAYS,
    needs_base=False,
    replaces_base=True,
)
