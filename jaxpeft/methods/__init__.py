"""The methods, and the one place where base and adapter meet; see `jaxpeft.methods.base`."""

from jaxpeft.methods.adalora import AdaLoRA
from jaxpeft.methods.base import Adapter, Context, Kind, Leaf, Method, Spec
from jaxpeft.methods.binding import bind, check_fit, init_adapter, merge
from jaxpeft.methods.bitfit import BitFit
from jaxpeft.methods.full import Full
from jaxpeft.methods.ia3 import IA3
from jaxpeft.methods.ln_tuning import LNTuning
from jaxpeft.methods.loha import LoHa
from jaxpeft.methods.lokr import LoKr
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.merge_quantized import merge_quantized
from jaxpeft.methods.multitask_prompt import MultitaskPromptTuning
from jaxpeft.methods.oft import OFT
from jaxpeft.methods.p_tuning import PTuning
from jaxpeft.methods.prefix import PrefixTuning, prefix_from_prompt
from jaxpeft.methods.prompt import PromptTuning
from jaxpeft.methods.registry import KINDS, METHODS
from jaxpeft.methods.trainable_tokens import TrainableTokens
from jaxpeft.methods.vera import VeRA

__all__ = [
    "IA3",
    "KINDS",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Context",
    "Full",
    "Kind",
    "LNTuning",
    "Leaf",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Spec",
    "TrainableTokens",
    "VeRA",
    "bind",
    "check_fit",
    "init_adapter",
    "merge",
    "merge_quantized",
    "prefix_from_prompt",
]
