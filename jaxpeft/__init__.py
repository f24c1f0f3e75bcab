"""jaxpeft: parameter-efficient fine-tuning of Flax language models as pure functions.

Public names are imported when they are first used, so that ``import jaxpeft`` is quick.
"""

import ast
import importlib
import pathlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpeft.config.run_config import load_config as load_config
    from jaxpeft.core.errors import UserError as UserError
    from jaxpeft.core.flops import count_flops as count_flops
    from jaxpeft.data.batches import Plan as Plan
    from jaxpeft.data.encode import encode_rows as encode_rows
    from jaxpeft.inference.decoding import generate as generate
    from jaxpeft.inference.metrics import evaluate_loss as evaluate_loss
    from jaxpeft.inference.metrics import exact_match as exact_match
    from jaxpeft.lifting.describe import describe as describe
    from jaxpeft.lifting.lifted import lift as lift
    from jaxpeft.mesh.layouts import make_mesh as make_mesh
    from jaxpeft.mesh.placement import shard_params as shard_params
    from jaxpeft.methods.adalora.config import AdaLoRA as AdaLoRA
    from jaxpeft.methods.adapter import Adapter as Adapter
    from jaxpeft.methods.algebra.combine import combine as combine
    from jaxpeft.methods.algebra.convert import to_lora as to_lora
    from jaxpeft.methods.algebra.stacking import stack_adapters as stack_adapters
    from jaxpeft.methods.binding import bind as bind
    from jaxpeft.methods.binding import init_adapter as init_adapter
    from jaxpeft.methods.kernels.ia3 import IA3 as IA3
    from jaxpeft.methods.kernels.loha import LoHa as LoHa
    from jaxpeft.methods.kernels.lokr import LoKr as LoKr
    from jaxpeft.methods.kernels.oft import OFT as OFT
    from jaxpeft.methods.kernels.vera import VeRA as VeRA
    from jaxpeft.methods.leaves.bitfit import BitFit as BitFit
    from jaxpeft.methods.leaves.full import Full as Full
    from jaxpeft.methods.leaves.ln_tuning import LNTuning as LNTuning
    from jaxpeft.methods.leaves.trainable_tokens import TrainableTokens as TrainableTokens
    from jaxpeft.methods.lora.config import LoRA as LoRA
    from jaxpeft.methods.merging import merge as merge
    from jaxpeft.methods.prompts.multitask_prompt import (
        MultitaskPromptTuning as MultitaskPromptTuning,
    )
    from jaxpeft.methods.prompts.p_tuning import PTuning as PTuning
    from jaxpeft.methods.prompts.prefix import PrefixTuning as PrefixTuning
    from jaxpeft.methods.prompts.prompt import PromptTuning as PromptTuning
    from jaxpeft.methods.quantizing import quantize as quantize
    from jaxpeft.methods.registry import register_method as register_method
    from jaxpeft.methods.virtual_tokens import with_prompt as with_prompt
    from jaxpeft.models.config import ModelConfig as ModelConfig
    from jaxpeft.pretrained.adapters import load_adapter as load_adapter
    from jaxpeft.pretrained.adapters import save_adapter as save_adapter
    from jaxpeft.pretrained.load import load_model as load_model
    from jaxpeft.pretrained.model import Model as Model
    from jaxpeft.pretrained.save import save_model as save_model
    from jaxpeft.updates.losses import cross_entropy as cross_entropy
    from jaxpeft.updates.losses import make_lm_loss as make_lm_loss
    from jaxpeft.updates.optimizers import OptimConfig as OptimConfig
    from jaxpeft.updates.optimizers import make_optimizer as make_optimizer
    from jaxpeft.updates.optimizers import make_schedule as make_schedule
    from jaxpeft.updates.optimizers import masked as masked
    from jaxpeft.updates.optimizers import register_optimizer as register_optimizer
    from jaxpeft.updates.step import TrainState as TrainState
    from jaxpeft.updates.step import adapter_only as adapter_only
    from jaxpeft.updates.step import init_train_state as init_train_state
    from jaxpeft.updates.step import make_train_step as make_train_step


def _read_homes() -> dict[str, str]:
    """The module of every name in the first block above, the one list of public names."""
    tree = ast.parse(pathlib.Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    lines = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(line.module) for line in lines for name in line.names}


_HOMES = _read_homes()

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a type checker takes every name for known where there is a __getattr__

    def __getattr__(name: str) -> Any:
        """Imports a public name from its module and keeps it."""
        if name not in _HOMES:
            raise AttributeError(f"module 'jaxpeft' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Package(types.ModuleType):
    """Keeps public functions that a command shares its name with: ``generate`` and ``merge``.

    Importing ``jaxpeft.generate``, the command, would put the module in the function's place. The
    module is still found: ``from jaxpeft.generate import main``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
