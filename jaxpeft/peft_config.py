"""``adapter_config.json`` of HF PEFT: what a LoRA's settings mean, read strictly and written.

A config says three things about every module of the base: whether it is adapted, with which rank
and with which alpha. The rules are those of HF PEFT 0.21 (``check_target_module_exists`` and
``get_pattern_key``). What PEFT can do and we cannot is refused by name instead of being ignored.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft import paths
from jaxpeft.errors import UserError, first_few
from jaxpeft.models.hf import read_json

FILE = "adapter_config.json"
FLOAT32_MAX = 3.4e38
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT adapts in Llama, Mistral and Qwen models when no targets are given."""

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
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
    "peft_type": "LORA",
    "peft_version": "0.21.0",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""Every key that PEFT 0.21 writes, with the value that changes nothing."""

READ_KEYS = (
    *("alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern"),
    *("target_modules", "task_type", "use_rslora"),
)
"""Keys that are understood."""

HARMLESS_KEYS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode"),
    *("loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config"),
)
"""Keys whose value does not change what a trained adapter computes."""

PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is; the others need their changed base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLoraConfig:
    """The part of an ``adapter_config.json`` that decides what a LoRA computes.

    Attributes:
        rank: Default inner dimension.
        alpha: Default numerator of the scale.
        rank_pattern: Rank by name or regex; the first key that matches wins.
        alpha_pattern: Alpha by name or regex; the first key that matches wins.
        dropout: Probability of dropping an input of the branch.
        rslora: Whether alpha is divided by the root of the rank.
        targets: "all-linear", a regex, or names and suffixes.
        exclude: A regex, or names and suffixes; empty for nothing.
        layers: Layer indices to adapt, or None for all.
        layers_pattern: Names of the list of layers, or empty for any.
    """

    rank: int
    alpha: int | float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    dropout: float
    rslora: bool
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rank_of(self, name: str) -> int:
        """The rank of the module with this full name."""
        return first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> int | float:
        """The alpha of the module with this full name."""
        return first_match(self.alpha_pattern, name, self.alpha)

    def scale_of(self, name: str) -> float:
        """What the product of the factors of this module is multiplied with."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def selects(self, name: str) -> bool:
        """Whether PEFT would adapt the linear or embedding module with this full name."""
        if self.exclude and paths.name_matches(self.exclude, name):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == paths.ALL_LINEAR:
                return name.rpartition(".")[2] not in ("lm_head", "embed_tokens")
            return paths.name_matches(self.targets, name)
        if name in self.targets:
            return True  # PEFT does not look at the layer of a module named in full
        if not paths.name_matches(self.targets, name):
            return False
        return self.layers is None or self._layer_of(name) in self.layers

    def _layer_of(self, name: str) -> int | None:
        prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        for prefix in prefixes or [r".*?\.[^.]*"]:
            found = re.match(rf"{prefix}\.(\d+)\.", name)
            if found:
                return int(found.group(1))
        return None


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name` as PEFT reads it, or `default`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def read_config(file: pathlib.Path) -> PeftLoraConfig:
    """Reads an ``adapter_config.json`` of a LoRA.

    Args:
        file: The JSON file.

    Returns:
        Its meaning.

    Raises:
        UserError: If the file is missing, empty or not JSON, or holds a value of a wrong type, a
            feature we do not support, or a key we do not know with a value that says something.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; a PEFT folder has one beside its tensors.")
    return parse_config(read_json(file), file)


def parse_config(values: Mapping[str, Any], file: pathlib.Path) -> PeftLoraConfig:
    """Checks the values of an ``adapter_config.json``; see `read_config`."""
    _require_supported(values, file)

    def fail(key: str, expected: str) -> UserError:
        return UserError(f"{file}: {key}: expected {expected}, got {values.get(key)!r:.60}.")

    def number(key: str, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(key, "a number")
        if not abs(value) <= FLOAT32_MAX:
            raise fail(key, "a finite number")
        return value

    def count(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise fail(key, "a whole number of at least 1")
        return value

    def names(key: str, empty: Any) -> Any:
        value = values.get(key)
        if value is None:
            return empty
        if isinstance(value, str):
            _require_regex(value, f"{file}: {key}")
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise fail(key, "a string or a list of strings")
        return tuple(value)

    def pattern(key: str, check: Any) -> dict[str, Any]:
        value = values.get(key) or {}
        if not isinstance(value, dict):
            raise fail(key, "an object of names and numbers")
        for name in value:
            _require_regex(name, f"{file}: {key}")
        return {name: check(key, item) for name, item in value.items()}

    dropout = number("lora_dropout", values.get("lora_dropout", 0.0))
    if not 0.0 <= dropout < 1.0:
        raise fail("lora_dropout", "a probability in [0, 1)")
    layers = values.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(layers, list) or not all(type(item) is int for item in layers):
            raise fail("layers_to_transform", "a whole number or a list of them")
    layers_pattern = names("layers_pattern", ())
    if not isinstance(rslora := values.get("use_rslora", False), bool):
        raise fail("use_rslora", "true or false")
    return PeftLoraConfig(
        rank=count("r", values.get("r", DEFAULTS["r"])),
        alpha=number("lora_alpha", values.get("lora_alpha", DEFAULTS["lora_alpha"])),
        rank_pattern=pattern("rank_pattern", count),
        alpha_pattern=pattern("alpha_pattern", number),
        dropout=float(dropout),
        rslora=rslora,
        targets=names("target_modules", DEFAULT_TARGETS),
        exclude=names("exclude_modules", ()),
        layers=tuple(layers) if layers else None,
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
    )


def write_values(
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, int | float],
    dropout: float,
    rslora: bool,
    names: Iterable[str],
    base_name: str,
) -> dict[str, Any]:
    """The values of an ``adapter_config.json`` that PEFT reads as exactly this adapter.

    Args:
        ranks: Rank of every adapted module by its full name.
        alphas: Alpha of every adapted module by its full name.
        dropout: Probability of dropping an input of the branch.
        rslora: Whether alpha is divided by the root of the rank.
        names: Full names of all linear modules of the base.
        base_name: What the base is called.

    Returns:
        All keys that PEFT 0.21 writes, in its order. Most frequent rank and alpha stand at the
        top, modules that differ in the patterns, under their full name.
    """
    rank, rank_pattern = _default_and_exceptions(ranks)
    alpha, alpha_pattern = _default_and_exceptions(alphas)
    suffixes = sorted({name.rpartition(".")[2] for name in ranks})
    by_suffix = {name for name in names if paths.name_matches(suffixes, name)}
    return DEFAULTS | {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_name,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": suffixes if by_suffix == set(ranks) else sorted(ranks),
        "use_rslora": rslora,
    }


def _default_and_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    default = max(counts, key=lambda value: (counts[value], value))
    others = {re.escape(name): value for name, value in values.items() if value != default}
    return default, others


def _require_supported(values: Mapping[str, Any], file: pathlib.Path) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type: only 'LORA' is supported so far, got {kind!r}.")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type: only 'CAUSAL_LM' is supported so far, got {task!r}.")
    init = values.get("init_lora_weights", True)
    if init is not None and init not in PLAIN_INITS:
        raise UserError(
            f"{file}: init_lora_weights: {init!r} is not supported yet: it changes the base model. "
            "Convert the adapter with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    unsupported, unknown = [], []
    for key, value in values.items():
        if key in READ_KEYS + HARMLESS_KEYS or not value or value == DEFAULTS.get(key):
            continue
        (unsupported if key in DEFAULTS else unknown).append(f"{key}={json.dumps(value)[:60]}")
    if unsupported:
        raise UserError(f"{file}: not supported yet: {first_few(unsupported)}.")
    if unknown:
        raise UserError(
            f"{file}: unknown settings: {first_few(unknown)}; a newer PEFT may have written them. "
            "Remove those that do not change what the adapter computes."
        )


def _require_regex(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a valid regex: {error}.") from None
