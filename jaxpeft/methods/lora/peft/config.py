"""The ``adapter_config.json`` of a LoRA in HF PEFT 0.21, and the parts of its folder.

For every module of the base the config decides whether it is adapted, with which rank and with
which alpha. Features of PEFT that are not supported are refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.lora.peft.start import start_fields, subtracted
from jaxpeft.methods.lora.saved import BIASES
from jaxpeft.methods.peft.patterns import Selection, first_match
from jaxpeft.methods.peft.values import Tensors, Values

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""Every LoRA key that PEFT 0.21 writes, with the value that changes nothing."""

READ_KEYS = (
    *("alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r"),
    *("rank_pattern", "target_modules", "trainable_token_indices", "use_dora"),
    "use_rslora",
)

HARMLESS_KEYS = (
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
    "qalora_group_size",
)

SUFFIXES = (
    *("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"),
    *("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""Last parts of the names of modules in all supported models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLoraConfig:
    """The part of an ``adapter_config.json`` that determines what a LoRA computes.

    Attributes:
        rank: Default inner dimension.
        alpha: Default numerator of the scale.
        rank_pattern: Rank by name or regex; the first key that matches counts.
        alpha_pattern: Alpha by name or regex; the first key that matches counts.
        dropout: Probability of dropping an input of the branch.
        rslora: Whether alpha is divided by the root of the rank.
        dora: Whether every module has magnitudes.
        selection: The modules that are adapted, unless they are saved whole.
        bias: Which biases are trained: "none", "all" or "lora_only".
        lora_bias: Whether B has a bias.
        saved: Ends of the names of modules that are saved whole.
        tokens: Ids of trained tokens by the path of their weight.
        start: "pissa" or "olora" if PEFT subtracts their first product from the base, else "".
    """

    rank: int
    alpha: int | float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    dropout: float
    rslora: bool
    dora: bool
    selection: Selection
    bias: str = "none"
    lora_bias: bool = False
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    start: str = ""

    def adapts(self, name: str) -> bool:
        """Whether the module with this full name has factors."""
        if any(re.match(rf"(^|.*\.){re.escape(item)}($|\..*)", name) for item in self.saved):
            return False
        return self.selection.selects(name)

    def saves(self, name: str) -> bool:
        """Whether PEFT saves the module with this full name, or a module that contains it."""
        parts = name.split(".")
        holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(holder.endswith(item) for holder in holders for item in self.saved)

    def rank_of(self, name: str) -> int:
        """The rank of the module with this full name."""
        return first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> int | float:
        """The alpha of the module with this full name."""
        return first_match(self.alpha_pattern, name, self.alpha)

    def scale_of(self, name: str) -> float:
        """The factor of the product of this module's factors."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)


def parse(values: Values) -> PeftLoraConfig:
    """Parses an ``adapter_config.json``.

    Raises:
        UserError: A value is wrong or not supported.
    """
    start = subtracted(values)
    bias, saved = values.get("bias"), values.names("modules_to_save")
    if bias not in BIASES:
        raise values.wrong("bias", f"one of {', '.join(BIASES)}")
    if isinstance(saved, str):
        raise values.wrong("modules_to_save", "a list of names")
    if values.flag("lora_bias") and values.flag("use_dora"):
        raise values.wrong("lora_bias", "false with use_dora")
    return PeftLoraConfig(
        rank=values.count("r"),
        alpha=values.number("lora_alpha"),
        rank_pattern=values.pattern("rank_pattern", whole=True),
        alpha_pattern=values.pattern("alpha_pattern", whole=False),
        dropout=values.probability("lora_dropout"),
        rslora=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        selection=values.selection(),
        bias=bias,
        lora_bias=values.flag("lora_bias"),
        saved=saved,
        start=start,
    )


def fields(values: Values) -> dict[str, Any]:
    """The fields of the `jaxpeft.LoRA` that a config describes; see `PeftFormat`.

    Raises:
        UserError: A name in ``modules_to_save`` means more modules to PEFT than to jaxpeft.
    """
    start = start_fields(values)
    plain = Values({**values.values, "init_lora_weights": True}, values.file, values.defaults)
    config = parse(plain)
    for item in config.saved:
        if other := [end for end in SUFFIXES if end.endswith(item) and end != item]:
            raise UserError(
                f"{values.file}: modules_to_save: {item!r} means {first_few(other)} to PEFT, too; "
                "name the modules that are meant by longer names."
            )
    return {
        "rank": config.rank,
        "alpha": float(config.alpha),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: float(value) for key, value in config.alpha_pattern.items()},
        "dropout": config.dropout,
        "rslora": config.rslora,
        "dora": config.dora,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "save_modules": config.saved,
        "targets": config.selection.targets,
        "exclude": config.selection.exclude,
        "layers": config.selection.layers or (),
        "layers_pattern": config.selection.layers_pattern,
        **start,
    }


@dataclasses.dataclass(frozen=True)
class Folder:
    """A PEFT folder that is being read.

    Attributes:
        config: Its config.
        tensors: Its tensors.
        base: The `jaxpeft.Model` that the adapter is for.
    """

    config: PeftLoraConfig
    tensors: Tensors
    base: Any


Arrays = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Trained and frozen arrays by path of the base's leaf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """How PEFT stores one sort of places.

    Attributes:
        keys: ``keys(folder)`` returns the names of its tensors in the file.
        check: ``check(folder)`` raises a UserError unless its tensors are all there and fit.
        width: ``width(folder)`` returns the largest rank of its factors, 0 without any.
        read: ``read(folder, width)`` returns its places, factors padded to `width`.
        write: ``write(adapter, base)`` returns its values of the config and its tensors, from an
            adapter with these places only.
    """

    keys: Callable[[Folder], set[str]]
    check: Callable[[Folder], None]
    width: Callable[[Folder], int] = lambda folder: 0
    read: Callable[[Folder, int], Arrays]
    write: Callable[[Adapter, Any], tuple[dict[str, Any], dict[str, np.ndarray]]]
