"""LoRA in HF PEFT's format, out and in.

PEFT keeps ``lora_A.weight`` ``(rank, d_in)`` and ``lora_B.weight`` ``(d_out, rank)``: the
transposes of our ``a`` and ``b``, with the layers taken apart and the padding of the rank cut off.
A config says three things about every module of the base: whether it is adapted, with which rank
and with which alpha. What PEFT can do and we cannot is refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import paths
from jaxpeft.errors import UserError, first_few
from jaxpeft.linear import dtype_of, materialise, shape_of
from jaxpeft.methods import dora
from jaxpeft.methods.base import Adapter, Spec
from jaxpeft.methods.exchange import (
    CONFIG,
    FLOATS,
    PREFIX,
    PeftFormat,
    Selection,
    Tensors,
    Values,
    contiguous,
    default_and_exceptions,
    first_match,
    modules_of,
    require_finite,
    shortest_decimal,
    stack,
    targets_value,
)

FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")
MAGNITUDE = re.compile(re.escape(PREFIX) + r"(.+)\.lora_magnitude_vector")
COPY = re.compile(re.escape(PREFIX) + r"(lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")
"""Copies of base weights that PEFT adds when the head is adapted."""

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT adapts in Llama, Mistral and Qwen models when no targets are given."""

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
"""Every key of its own that PEFT 0.21 writes, with the value that changes nothing."""

READ_KEYS = (
    *("alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "r", "rank_pattern"),
    *("target_modules", "use_dora", "use_rslora"),
)

HARMLESS_KEYS = (
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
    "qalora_group_size",
)

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
        dora: Whether every module has magnitudes.
        selection: Which modules are adapted.
    """

    rank: int
    alpha: int | float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    dropout: float
    rslora: bool
    dora: bool
    selection: Selection

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


def parse(values: Values) -> PeftLoraConfig:
    """The meaning of an ``adapter_config.json``; wrong or unsupported values are UserErrors."""
    init = values.get("init_lora_weights")
    if init is not None and init not in PLAIN_INITS:
        raise UserError(
            f"{values.file}: init_lora_weights: {init!r} is not supported yet: it changes the base "
            "model. Convert the adapter with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    dropout = values.number("lora_dropout")
    if not 0.0 <= dropout < 1.0:
        raise values.wrong("lora_dropout", "a probability in [0, 1)")
    return PeftLoraConfig(
        rank=values.count("r"),
        alpha=values.number("lora_alpha"),
        rank_pattern=values.pattern("rank_pattern", whole=True),
        alpha_pattern=values.pattern("alpha_pattern", whole=False),
        dropout=float(dropout),
        rslora=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        selection=values.selection(DEFAULT_TARGETS),
    )


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """The adapter of a PEFT folder; see `PeftFormat`."""
    config = parse(values)
    modules = _sort(tensors, base, config.dora)
    sites = paths.module_names(base.params)
    _check_modules(tensors.file, config, modules, sites, base)
    _check_shapes(tensors, config, modules, sites, base)
    width = max(config.rank_of(name) for name in modules)
    layers = {}
    for name in modules:
        rank = config.rank_of(name)
        a, b = (tensors.read(f"{PREFIX}{name}.lora_{letter}.weight").T for letter in "AB")
        layers[name] = {
            "a": np.pad(a, ((0, 0), (0, width - rank))),
            "b": np.pad(b, ((0, width - rank), (0, 0))),
            "scale": np.float32(config.scale_of(name)),
            "rank": np.int32(rank),
        }
        if config.dora:
            layers[name]["m"] = tensors.read(f"{PREFIX}{name}.lora_magnitude_vector")
    places = stack(layers, sites, base.params)
    for arrays in places.values():
        arrays["dropout"] = jnp.full(arrays["rank"].shape, config.dropout, jnp.float32)
    names, kept = ("a", "b"), ("scale", "rank", "dropout")
    options = {"rslora": True} if config.rslora else {}
    if config.dora:
        names, kept, options = (*names, "m"), (*kept, "norm"), {"dora": True, **options}
        for path, arrays in places.items():
            arrays["norm"] = dora.start(paths.get(base.params, path), arrays["rank"])
    trained = {path: {key: arrays[key] for key in names} for path, arrays in places.items()}
    frozen = {path: {key: arrays[key] for key in kept} for path, arrays in places.items()}
    spec = Spec(
        kind="lora",
        paths=tuple(sorted(places)),
        rank=width,
        options=tuple(sorted(options.items())),
    )
    return Adapter(paths.unflatten(trained), paths.unflatten(frozen), spec)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas, dropouts = {}, {}, set()
    options = dict(adapter.spec.options)
    rslora = bool(options.get("rslora", False))
    for name, path, at in modules_of(adapter):
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{key}"))[at] for key in "ab")
        scale, rank, dropout = (
            np.asarray(paths.get(adapter.buffers, f"{path}/{key}"))[at]
            for key in ("scale", "rank", "dropout")
        )
        r = int(rank)
        require_finite(name, a, b)
        if np.any(np.any(a[:, r:] != 0, axis=0) & np.any(b[r:] != 0, axis=1)):
            raise ValueError(f"{name}: the padding beyond rank {r} is not zero in both factors.")
        alpha = shortest_decimal(scale, math.sqrt(r) if rslora else r)
        a, b = a[:, :r], b[:r]
        if "init_weights" in options:  # what PEFT's own conversion writes
            a0, b0 = (
                np.asarray(paths.get(adapter.buffers, f"{path}/{k}"))[at] for k in ("a0", "b0")
            )
            a, b = np.concatenate([a, a0[:, :r]], 1), np.concatenate([b, -b0[:r]])
            r, alpha = 2 * r, alpha * (math.sqrt(2) if rslora else 2)
        if "dora" in options:
            m = np.asarray(paths.get(adapter.params, f"{path}/m"))[at]
            require_finite(name, m)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = contiguous(m)
        ranks[name], alphas[name] = r, int(alpha) if alpha.is_integer() else alpha
        dropouts.add(shortest_decimal(dropout))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = contiguous(a.T)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = contiguous(b.T)
    if not ranks:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    if len(dropouts) > 1:
        raise UserError(
            f"PEFT folders hold one dropout rate for all layers, this adapter has {dropouts}."
        )
    rank, rank_pattern = default_and_exceptions(ranks)
    alpha, alpha_pattern = default_and_exceptions(alphas)
    values = {
        "alpha_pattern": alpha_pattern,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets_value(ranks, paths.module_names(base.params)),
        "use_dora": "dora" in options,
        "use_rslora": rslora,
    }
    return values, tensors


PEFT = PeftFormat(
    type="LORA",
    title="LoRA adapter",
    defaults=DEFAULTS,
    read_keys=READ_KEYS,
    harmless_keys=HARMLESS_KEYS,
    read=read,
    write=write,
)


def _sort(tensors: Tensors, base: Any, with_magnitudes: bool) -> dict[str, set[str]]:
    """Which factors every module has, "A" and "B", by its full name; all else is an error."""
    modules: dict[str, set[str]] = {}
    magnitudes, unexpected = set(), []
    for key in sorted(tensors.shapes):
        if found := FACTOR.fullmatch(key):
            modules.setdefault(found.group(1), set()).add(found.group(2))
        elif with_magnitudes and (found := MAGNITUDE.fullmatch(key)):
            magnitudes.add(found.group(1))
        elif "lora_embedding_" in key:
            raise UserError(
                f"{tensors.file}: {key}: LoRA of the embedding table is not supported yet."
            )
        elif found := COPY.fullmatch(key):
            _require_copy(tensors, key, found.group(1), base)
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(
            f"{tensors.file}: {len(unexpected)} unexpected tensors: {first_few(unexpected, 3)}; "
            "only lora_A.weight and lora_B.weight of linear modules are known."
        )
    lonely = [
        f"{name}.lora_{'B' if 'A' in pair else 'A'}.weight"
        for name, pair in modules.items()
        if len(pair) < 2
    ]
    if with_magnitudes:
        lonely += [f"{name}.lora_magnitude_vector" for name in modules if name not in magnitudes]
        lonely += [f"{name}.lora_A.weight" for name in magnitudes if name not in modules]
    if lonely:
        raise UserError(
            f"{tensors.file}: {len(lonely)} tensors are missing: {first_few(lonely, 3)}."
        )
    if not modules:
        raise UserError(f"{tensors.file}: holds no LoRA tensors.")
    return modules


def _require_copy(tensors: Tensors, key: str, module: str, base: Any) -> None:
    """A base weight in an adapter's file must be the base's own."""
    path = paths.EMBEDDING if module.endswith("embed_tokens") else paths.HEAD
    weight = paths.get(base.params, path)
    tied = weight is None
    weight = paths.get(base.params, paths.EMBEDDING) if tied else weight
    transposed = path == paths.HEAD and not tied
    shape = tensors.shapes[key][::-1] if transposed else tensors.shapes[key]
    if tensors.dtypes[key] in FLOATS and shape == shape_of(weight):
        stored = tensors.raw(key).T if transposed else tensors.raw(key)
        if np.array_equal(stored.astype(dtype_of(weight)), np.asarray(materialise(weight))):
            return
    raise UserError(
        f"{tensors.file}: {key} differs from the weight of this base; adapters that bring a "
        "trained or resized embedding or head are not supported yet."
    )


def _check_modules(
    file: Any,
    config: PeftLoraConfig,
    modules: Mapping[str, Any],
    sites: Mapping[str, paths.Site],
    base: Any,
) -> None:
    """The modules of the tensors, of the base and of the config must be the same."""
    foreign = [name for name in modules if name not in sites]
    if foreign:
        tied = foreign == ["lm_head"] and base.config.tie_embeddings
        hint = "; a head tied to the embedding cannot be adapted yet" if tied else ""
        raise UserError(
            f"{file}: tensors for {len(foreign)} modules that the base {base.name!r} "
            f"({base.config.num_layers} layers) lacks: {first_few(foreign, 3)}{hint}."
        )
    candidates = (*sites, "model.embed_tokens", "lm_head")
    selected = {name for name in candidates if config.selection.selects(name)}
    missing = [name for name in sorted(selected) if name not in modules]
    if missing:
        raise UserError(
            f"{file}: no tensors for {len(missing)} modules that target_modules in "
            f"{CONFIG} selects in the base {base.name!r} ({base.config.num_layers} "
            f"layers): {first_few(missing, 3)}; the file is incomplete or made for another base."
        )
    extra = [name for name in modules if name not in selected]
    if extra:
        raise UserError(
            f"{file}: tensors for {len(extra)} modules that target_modules in {CONFIG} "
            f"does not select: {first_few(extra, 3)}; the two files belong to different adapters."
        )


def _check_shapes(
    tensors: Tensors,
    config: PeftLoraConfig,
    modules: Mapping[str, Any],
    sites: Mapping[str, paths.Site],
    base: Any,
) -> None:
    """Every factor must have a float dtype, the config's rank and its kernel's width."""
    ranks, widths, keys = [], [], []
    for name in modules:
        d_in, d_out = shape_of(paths.get(base.params, sites[name].path))[-2:]
        rank = config.rank_of(name)
        for letter, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            key = f"{name}.lora_{letter}.weight"
            keys.append(PREFIX + key)
            shape = tensors.shapes[PREFIX + key]
            if shape != expected:
                text = f"{key} is {list(shape)}, expected {list(expected)}"
                axis = 0 if letter == "A" else 1
                same = len(shape) == 2 and shape[1 - axis] == expected[1 - axis]
                (ranks if same else widths).append(text)
        key, m = f"{PREFIX}{name}.lora_magnitude_vector", (d_out,)
        if config.dora and (keys.append(key) or tensors.shapes[key] != m):
            widths.append(
                f"{key.removeprefix(PREFIX)} is {list(tensors.shapes[key])}, expected {list(m)}"
            )
    tensors.require_floats(keys)
    if widths:
        raise UserError(
            f"{tensors.file}: {len(widths)} tensors do not fit the base {base.name!r}: "
            f"{first_few(widths, 3)}; the adapter was made for another model."
        )
    if ranks:
        raise UserError(
            f"{tensors.file}: {len(ranks)} tensors have another rank than {CONFIG} says "
            f"(r = {config.rank}): {first_few(ranks, 3)}; the two files belong to different "
            "adapters."
        )
