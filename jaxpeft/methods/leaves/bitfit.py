"""BitFit: only biases are trained.

A linear module ``y = x W + b`` keeps ``W``; ``b`` is a trained copy of the base's bias, in float32.

Reference:
    Ben Zaken, Ravfogel and Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for
    Transformer-based Masked Language-models", 2021, https://arxiv.org/abs/2106.10199, section 3.
"""

import dataclasses
from typing import ClassVar

import jax

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Kind
from jaxpeft.methods.leaves.replace import ARRAYS, bind_selected, selected_replacement, value_shape
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import modules_of
from jaxpeft.methods.peft.patterns import keep_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains the biases that a model has.

    Attributes:
        targets: Modules whose bias is trained: a regex matched in full, or names and suffixes, as
            in PEFT; all by default.
    """

    name: ClassVar[str] = "bitfit"

    targets: paths.Targets = ".*"

    def __post_init__(self):
        keep_names(self, "targets")
        if not self.targets or self.targets == paths.ALL_LINEAR:
            raise ValueError(f"BitFit.targets must name modules, got {self.targets!r}.")

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """Copies the biases; `key` and `context` are not used.

        Args:
            params: Base parameters.
            key: Not used.
            context: Not used.

        Returns:
            An adapter that leaves the model's function unchanged.

        Raises:
            UserError: If the model has no biases, or a pattern matches none.
        """
        del key, context
        sites = paths.module_names(params, "bias")
        if not sites:
            raise UserError(
                "method.name: bitfit trains biases, and this model has none; Qwen2 and Qwen2.5 "
                "models have them. For this one take ln_tuning or lora."
            )
        chosen = paths.match(self.targets, (), sites, what="module with a bias")
        return selected_replacement(self.name, params, chosen)


def config_of(adapter: Adapter) -> BitFit:
    """The config of an adapter; targets come back as full names."""
    return BitFit(targets=tuple(name for name, _, _ in modules_of(adapter)))


KIND = Kind(
    config=BitFit,
    bind=bind_selected,
    leaf_shape=value_shape,
    config_of=config_of,
    arrays=ARRAYS,
)
