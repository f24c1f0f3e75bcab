"""The methods, and the one place where base and adapter meet; see `jaxpeft.methods.base`."""

from jaxpeft.methods.base import Adapter, Context, Kind, Leaf, Method, Spec
from jaxpeft.methods.binding import bind, check_fit, init_adapter, merge
from jaxpeft.methods.full import Full
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.registry import KINDS, METHODS

__all__ = [
    "KINDS",
    "METHODS",
    "Adapter",
    "Context",
    "Full",
    "Kind",
    "Leaf",
    "LoRA",
    "Method",
    "Spec",
    "bind",
    "check_fit",
    "init_adapter",
    "merge",
]
