"""jaxpeft: parameter-efficient fine-tuning of Flax language models as pure functions.

Public names are imported when they are first used, so that ``import jaxpeft`` is quick.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpeft.config import load_config as load_config
    from jaxpeft.data import Plan as Plan
    from jaxpeft.data import encode_rows as encode_rows
    from jaxpeft.decoding import generate as generate
    from jaxpeft.errors import UserError as UserError
    from jaxpeft.evaluate import evaluate_loss as evaluate_loss
    from jaxpeft.evaluate import exact_match as exact_match
    from jaxpeft.flops import count_flops as count_flops
    from jaxpeft.losses import cross_entropy as cross_entropy
    from jaxpeft.losses import make_lm_loss as make_lm_loss
    from jaxpeft.methods import IA3 as IA3
    from jaxpeft.methods import OFT as OFT
    from jaxpeft.methods import AdaLoRA as AdaLoRA
    from jaxpeft.methods import BitFit as BitFit
    from jaxpeft.methods import Full as Full
    from jaxpeft.methods import LNTuning as LNTuning
    from jaxpeft.methods import LoHa as LoHa
    from jaxpeft.methods import LoKr as LoKr
    from jaxpeft.methods import LoRA as LoRA
    from jaxpeft.methods import MultitaskPromptTuning as MultitaskPromptTuning
    from jaxpeft.methods import PrefixTuning as PrefixTuning
    from jaxpeft.methods import PromptTuning as PromptTuning
    from jaxpeft.methods import PTuning as PTuning
    from jaxpeft.methods import TrainableTokens as TrainableTokens
    from jaxpeft.methods import VeRA as VeRA
    from jaxpeft.methods import bind as bind
    from jaxpeft.methods import init_adapter as init_adapter
    from jaxpeft.methods import merge as merge
    from jaxpeft.methods.algebra import stack_adapters as stack_adapters
    from jaxpeft.methods.base import Adapter as Adapter
    from jaxpeft.methods.combine import combine as combine
    from jaxpeft.methods.convert import to_lora as to_lora
    from jaxpeft.model import Model as Model
    from jaxpeft.model import save_model as save_model
    from jaxpeft.models.config import ModelConfig as ModelConfig
    from jaxpeft.models.load import load_model as load_model
    from jaxpeft.optim import OptimConfig as OptimConfig
    from jaxpeft.optim import make_optimizer as make_optimizer
    from jaxpeft.optim import make_schedule as make_schedule
    from jaxpeft.optim import masked as masked
    from jaxpeft.peft_format import load_adapter as load_adapter
    from jaxpeft.peft_format import save_adapter as save_adapter
    from jaxpeft.prompting import with_prompt as with_prompt
    from jaxpeft.quant import quantize as quantize
    from jaxpeft.sharding import make_mesh as make_mesh
    from jaxpeft.sharding import shard_params as shard_params
    from jaxpeft.train_step import TrainState as TrainState
    from jaxpeft.train_step import adapter_only as adapter_only
    from jaxpeft.train_step import init_train_state as init_train_state
    from jaxpeft.train_step import make_train_step as make_train_step

_HOMES = {
    "jaxpeft.config": ("load_config",),
    "jaxpeft.data": ("Plan", "encode_rows"),
    "jaxpeft.decoding": ("generate",),
    "jaxpeft.errors": ("UserError",),
    "jaxpeft.evaluate": ("evaluate_loss", "exact_match"),
    "jaxpeft.flops": ("count_flops",),
    "jaxpeft.losses": ("cross_entropy", "make_lm_loss"),
    "jaxpeft.methods": ("bind", "init_adapter", "merge"),
    "jaxpeft.methods.algebra": ("stack_adapters",),
    "jaxpeft.methods.base": ("Adapter",),
    "jaxpeft.methods.combine": ("combine",),
    "jaxpeft.methods.convert": ("to_lora",),
    "jaxpeft.model": ("Model", "save_model"),
    "jaxpeft.models.config": ("ModelConfig",),
    "jaxpeft.models.load": ("load_model",),
    "jaxpeft.optim": ("OptimConfig", "make_optimizer", "make_schedule", "masked"),
    "jaxpeft.peft_format": ("load_adapter", "save_adapter"),
    "jaxpeft.prompting": ("with_prompt",),
    "jaxpeft.quant": ("quantize",),
    "jaxpeft.sharding": ("make_mesh", "shard_params"),
    "jaxpeft.train_step": ("TrainState", "adapter_only", "init_train_state", "make_train_step"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module and keeps it; methods are found by the registry."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif not name[:1].isupper() or name not in (methods := _methods()):
        raise AttributeError(f"module 'jaxpeft' has no attribute {name!r}")
    else:
        value = methods[name]
    globals()[name] = value
    return value


def _methods() -> dict[str, type]:
    """The config classes of all methods by name, such as ``IA3``."""
    registry = importlib.import_module("jaxpeft.methods").METHODS
    return {config.__name__: config for config in registry.values()}


def __dir__() -> list[str]:
    return sorted({*__all__, *_methods(), *(name for name in globals() if name.startswith("__"))})


class _Package(types.ModuleType):
    """Keeps public functions that a command shares its name with: ``generate`` and ``merge``.

    Importing ``jaxpeft.generate``, the command, would put the module in the function's place. The
    module is still found: ``from jaxpeft.generate import main``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
