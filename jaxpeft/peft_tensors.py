"""The tensors of ``adapter_model.safetensors``, checked against their config and their base.

Factors are read only after every name, shape and dtype in the file's header has proved right, so
a wrong file costs no memory. Every check lists the first few offenders and counts them all.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft import paths, peft_config
from jaxpeft.errors import UserError, first_few
from jaxpeft.linear import dtype_of, materialise, shape_of
from jaxpeft.models.source import PLAIN_DTYPES, TensorInfo, decode
from jaxpeft.peft_config import PeftLoraConfig

PREFIX = "base_model.model."
FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")
COPY = re.compile(re.escape(PREFIX) + r"(lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")
"""Copies of base weights that PEFT adds when the head is adapted."""


def sort_tensors(
    file: pathlib.Path, tensors: Mapping[str, TensorInfo], base: Any
) -> dict[str, dict[str, TensorInfo]]:
    """The factors of every module, by its full name and "A" or "B"; all else is an error."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    unexpected = []
    for key, info in sorted(tensors.items()):
        if found := FACTOR.fullmatch(key):
            modules.setdefault(found.group(1), {})[found.group(2)] = info
        elif "lora_embedding_" in key:
            raise UserError(f"{file}: {key}: LoRA of the embedding table is not supported yet.")
        elif found := COPY.fullmatch(key):
            _require_copy(file, key, found.group(1), info, base)
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(
            f"{file}: {len(unexpected)} unexpected tensors: {first_few(unexpected, 3)}; only "
            "lora_A.weight and lora_B.weight of linear modules are known."
        )
    lonely = [
        f"{name}.lora_{'B' if 'A' in pair else 'A'}.weight"
        for name, pair in modules.items()
        if len(pair) < 2
    ]
    if lonely:
        raise UserError(f"{file}: {len(lonely)} tensors are missing: {first_few(lonely, 3)}.")
    if not modules:
        raise UserError(f"{file}: holds no LoRA tensors.")
    return modules


def _require_copy(file: pathlib.Path, key: str, module: str, info: TensorInfo, base: Any) -> None:
    """A base weight in an adapter's file must be the base's own."""
    path = paths.EMBEDDING if module.endswith("embed_tokens") else paths.HEAD
    weight = paths.get(base.params, path)
    tied = weight is None
    weight = paths.get(base.params, paths.EMBEDDING) if tied else weight
    transposed = path == paths.HEAD and not tied
    shape = info.shape[::-1] if transposed else info.shape
    if info.dtype in PLAIN_DTYPES and shape == shape_of(weight):
        stored = _read(info).T if transposed else _read(info)
        if np.array_equal(stored.astype(dtype_of(weight)), np.asarray(materialise(weight))):
            return
    raise UserError(
        f"{file}: {key} differs from the weight of this base; adapters that bring a trained or "
        "resized embedding or head are not supported yet."
    )


def check_modules(
    file: pathlib.Path,
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
    selected = {name for name in (*sites, "model.embed_tokens", "lm_head") if config.selects(name)}
    missing = [name for name in sorted(selected) if name not in modules]
    if missing:
        raise UserError(
            f"{file}: no tensors for {len(missing)} modules that target_modules in "
            f"{peft_config.FILE} selects in the base {base.name!r} ({base.config.num_layers} "
            f"layers): {first_few(missing, 3)}; the file is incomplete or made for another base."
        )
    extra = [name for name in modules if name not in selected]
    if extra:
        raise UserError(
            f"{file}: tensors for {len(extra)} modules that target_modules in {peft_config.FILE} "
            f"does not select: {first_few(extra, 3)}; the two files belong to different adapters."
        )


def check_shapes(
    file: pathlib.Path,
    config: PeftLoraConfig,
    modules: Mapping[str, Mapping[str, TensorInfo]],
    sites: Mapping[str, paths.Site],
    base: Any,
) -> None:
    """Every factor must have a float dtype, the config's rank and its kernel's width."""
    dtypes, ranks, widths = [], [], []
    for name, pair in modules.items():
        d_in, d_out = shape_of(paths.get(base.params, sites[name].path))[-2:]
        rank = config.rank_of(name)
        for letter, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            info, key = pair[letter], f"{name}.lora_{letter}.weight"
            if info.dtype not in PLAIN_DTYPES:
                dtypes.append(f"{key} is {info.dtype}")
            elif info.shape != expected:
                text = f"{key} is {list(info.shape)}, expected {list(expected)}"
                axis = 0 if letter == "A" else 1
                same = len(info.shape) == 2 and info.shape[1 - axis] == expected[1 - axis]
                (ranks if same else widths).append(text)
    if dtypes:
        raise UserError(
            f"{file}: {len(dtypes)} tensors of an unsupported dtype (supported: "
            f"{', '.join(PLAIN_DTYPES)}): {first_few(dtypes, 3)}."
        )
    if widths:
        raise UserError(
            f"{file}: {len(widths)} tensors do not fit the base {base.name!r}: "
            f"{first_few(widths, 3)}; the adapter was made for another model."
        )
    if ranks:
        raise UserError(
            f"{file}: {len(ranks)} tensors have another rank than {peft_config.FILE} says "
            f"(r = {config.rank}): {first_few(ranks, 3)}; the two files belong to different "
            "adapters."
        )


def _read(info: TensorInfo) -> np.ndarray:
    return decode(np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset), info)


def read_finite(info: TensorInfo, name: str) -> np.ndarray:
    """Reads one tensor as float32; a value that is not finite is an error that calls it `name`."""
    value = _read(info).astype(np.float32)
    if count := int(np.count_nonzero(~np.isfinite(value))):
        raise UserError(
            f"{info.file}: {name}: {count} of {value.size} values are not finite; the adapter is "
            "damaged or its training diverged."
        )
    return value
