"""LoRA in HF PEFT's format: combines the parts of a folder.

Every sort of places has its own `Part`, see `jaxpeft.methods.lora.places`.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.lora import places as lora_places
from jaxpeft.methods.lora import saved as lora_saved
from jaxpeft.methods.lora import targets
from jaxpeft.methods.lora import tokens as lora_tokens
from jaxpeft.methods.lora.peft import start
from jaxpeft.methods.lora.peft.config import (
    DEFAULTS,
    HARMLESS_KEYS,
    READ_KEYS,
    Arrays,
    Folder,
    parse,
)
from jaxpeft.methods.peft.values import CONFIG, FLOATS, PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import dtype_of, materialize, shape_of

COPY = re.compile(re.escape(PREFIX) + r"(lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")
"""Copies of base weights that PEFT adds if the embedding table or the head is adapted."""

PARTS = [sort.peft for sort in lora_places.SORTS]


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads the adapter of a PEFT folder; see `PeftFormat`.

    Raises:
        UserError: The tensors are not those that config and base ask for.
    """
    tokens = lora_tokens.parse(values, paths.get(base.params, paths.HEAD) is None)
    config = dataclasses.replace(parse(values), tokens=tokens)
    folder = Folder(config, tensors, base)
    if config.start:
        sites = targets.sites_of(base.params)
        start.require_weights(values.file, config, sites, base.params)
    _require_known(folder)
    for part in PARTS:
        part.check(folder)
    rank = max(part.width(folder) for part in PARTS)
    places: Arrays = {}
    for part in PARTS:
        more = part.read(folder, rank)
        lora_saved.require_apart(places, more)
        places |= more
    biases = any(path.endswith("/bias") for path in places)
    options = {
        "bias": config.bias != "none" and biases and config.bias,
        "dora": config.dora,
        "init_weights": config.start,
        "lora_bias": config.lora_bias,
    }
    spec = Spec(
        kind="lora",
        paths=tuple(sorted(places)),
        rank=rank,
        options=tuple(item for item in options.items() if item[1]),
    )
    trained, frozen = (
        paths.unflatten({path: arrays[i] for path, arrays in places.items()}) for i in range(2)
    )
    return Adapter(trained, frozen, spec)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    options = dict(adapter.spec.options)
    values = {
        "bias": options.get("bias", "none"),
        "lora_bias": "lora_bias" in options,
        "use_dora": "dora" in options,
    }
    tensors: dict[str, np.ndarray] = {}
    for sort, places in lora_places.by_sort(adapter):
        more, found = sort.peft.write(places, base)
        values |= more
        tensors |= found
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


def _require_known(folder: Folder) -> None:
    """Checks that every tensor belongs to a part, or is a copy of a base weight."""
    tensors, unexpected = folder.tensors, []
    known = set().union(*(part.keys(folder) for part in PARTS))
    for key in sorted(tensors.shapes.keys() - known):
        if found := COPY.fullmatch(key):
            _require_copy(tensors, key, found.group(1), folder.base)
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(
            f"{tensors.file}: {len(unexpected)} unexpected tensors: {first_few(unexpected, 3)}; "
            f"{CONFIG} has no place for them."
        )


def _require_copy(tensors: Tensors, key: str, module: str, base: Any) -> None:
    """Checks that a copy of a base weight in an adapter's file equals the base weight."""
    path = paths.EMBEDDING if module.endswith("embed_tokens") else paths.HEAD
    weight = paths.get(base.params, path)
    tied = weight is None
    weight = paths.get(base.params, paths.EMBEDDING) if tied else weight
    transposed = path == paths.HEAD and not tied
    shape = tensors.shapes[key][::-1] if transposed else tensors.shapes[key]
    if tensors.dtypes[key] in FLOATS and shape == shape_of(weight):
        stored = tensors.raw(key).T if transposed else tensors.raw(key)
        if np.array_equal(stored.astype(dtype_of(weight)), np.asarray(materialize(weight))):
            return
    raise UserError(
        f"{tensors.file}: {key} differs from the weight of this base; adapters that bring a "
        "trained or resized embedding or head are not supported yet."
    )
