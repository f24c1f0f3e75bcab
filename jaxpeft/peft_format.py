"""HF PEFT folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT stores ``lora_A.weight`` as ``(rank, d_in)`` and ``lora_B.weight`` as ``(d_out, rank)`` under
``base_model.model.MODULE``, one pair a module: the transposes of our ``a`` and ``b``, with the
layers taken apart and the padding of the rank cut off. Beside PEFT's files lies ``jaxpeft.json``:
which base the adapter was trained on, and the sha256 of the other files. PEFT ignores it, and
folders without it load too.

Loading is strict: every tensor has its place, every place its tensor, and the config must say of
every module what the tensors say.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import paths, peft_config
from jaxpeft.errors import UserError
from jaxpeft.folders import real_path, require_replaceable, write_folder
from jaxpeft.linear import shape_of
from jaxpeft.methods import Adapter, LoRA, Spec, check_fit
from jaxpeft.methods.lora import shortest_decimal
from jaxpeft.models.hf import read_header, read_json
from jaxpeft.models.source import TensorInfo
from jaxpeft.peft_config import PeftLoraConfig
from jaxpeft.peft_tensors import (
    PREFIX,
    check_modules,
    check_shapes,
    read_finite,
    sort_tensors,
)

TENSORS = "adapter_model.safetensors"
CARD = "README.md"
SIDE = "jaxpeft.json"
FORMAT = 1
OURS = frozenset({peft_config.FILE, TENSORS, CARD, SIDE})


def save_adapter(path: str | os.PathLike, adapter: Adapter, base: Any) -> None:
    """Writes an adapter as a folder that HF PEFT, vLLM and `load_adapter` read.

    The folder is written beside its place, synced, and moved there whole; an older adapter in
    that place is replaced only then.

    Args:
        path: The folder; it may hold an older adapter, but no other files.
        adapter: A LoRA adapter.
        base: The `jaxpeft.Model` it was trained on.

    Raises:
        UserError: If the adapter is of another kind, does not fit `base` or is not finite, or if
            `path` is a file or holds other files.
        ResourceError: If the disk is full.
    """
    folder = real_path(path)
    require_replaceable(folder, OURS)
    if adapter.spec.kind != LoRA.name:
        raise UserError(
            f"{folder}: PEFT folders are written for LoRA adapters so far, this one is of kind "
            f"{adapter.spec.kind!r}; save the merged model instead."
        )
    check_fit(base.params, adapter)
    write_folder(folder, _render(adapter, base))


def load_adapter(path: str | os.PathLike, base: Any, *, allow_other_base: bool = False) -> Adapter:
    """Reads a PEFT folder, strictly.

    Args:
        path: A PEFT folder, ours or PEFT's own, or a run's folder with one in ``adapter``.
        base: The `jaxpeft.Model` to put it on.
        allow_other_base: Accept an adapter that was trained on other weights.

    Returns:
        The adapter, in float32, ready to train on.

    Raises:
        UserError: If anything is missing, unexpected, damaged, of another shape or rank, not
            finite, not supported yet, or made for another base.
    """
    folder = pathlib.Path(path)
    if not (folder / peft_config.FILE).exists() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; an adapter on the hub is fetched with `hf download`."
        )
    config = peft_config.read_config(folder / peft_config.FILE)
    file = folder / TENSORS
    if not file.is_file():
        raise UserError(f"{folder}: {_no_tensors(folder)}")
    _check_side_file(folder, base, allow_other_base)
    tensors = read_header(file)
    modules = sort_tensors(file, tensors, base)
    sites = paths.module_names(base.params)
    check_modules(file, config, modules, sites, base)
    check_shapes(file, config, modules, sites, base)
    return _assemble(config, modules, sites, base)


# Saving.


def _render(adapter: Adapter, base: Any) -> dict[str, bytes]:
    """The content of every file of the folder, `SIDE` last."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    ranks, alphas, dropouts = {}, {}, set()
    rslora = bool(dict(adapter.spec.options).get("rslora", False))
    for path in adapter.spec.paths:
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{key}")) for key in "ab")
        scale, rank, dropout = (
            np.asarray(paths.get(adapter.buffers, f"{path}/{key}"))
            for key in ("scale", "rank", "dropout")
        )
        for layer in range(len(a)) if paths.is_stacked(path) else [None]:
            at = () if layer is None else layer
            name, r = paths.module_name(path, layer), int(rank[at])
            _require_sound(name, r, a[at], b[at])
            if r == 0:
                continue
            ranks[name] = r
            alpha = shortest_decimal(scale[at], math.sqrt(r) if rslora else r)
            alphas[name] = int(alpha) if alpha.is_integer() else alpha
            dropouts.add(shortest_decimal(dropout[at]))
            tensors[f"{PREFIX}{name}.lora_A.weight"] = _contiguous(a[at][:, :r].T)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = _contiguous(b[at][:r].T)
    if not ranks:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    if len(dropouts) > 1:
        raise UserError(
            f"PEFT folders hold one dropout rate for all layers, this adapter has {dropouts}."
        )
    values = peft_config.write_values(
        ranks=ranks,
        alphas=alphas,
        dropout=dropouts.pop(),
        rslora=rslora,
        names=paths.module_names(base.params),
        base_name=base.name,
    )
    files = {
        peft_config.FILE: _json(values),
        TENSORS: save(tensors, {"format": "pt"}),
        CARD: _card(base.name, ranks, values).encode(),
    }
    side = {
        "format": FORMAT,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "versions": {name: _version(name) for name in ("jaxpeft", "jax", "flax")},
        "sha256": {
            name: hashlib.sha256(files[name]).hexdigest() for name in (peft_config.FILE, TENSORS)
        },
    }
    return files | {SIDE: _json(side)}


def _require_sound(name: str, rank: int, a: np.ndarray, b: np.ndarray) -> None:
    """Checks that factors are finite and that cutting the padding off changes nothing."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{name}: the adapter holds values that are not finite; it diverged.")
    if np.any(np.any(a[:, rank:] != 0, axis=0) & np.any(b[rank:] != 0, axis=1)):
        raise ValueError(f"{name}: the padding beyond rank {rank} is not zero in both factors.")


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _card(base_name: str, ranks: dict[str, int], values: dict) -> str:
    targets = ", ".join(sorted({name.rpartition(".")[2] for name in ranks}))
    return f"""---
base_model: {json.dumps(base_name)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, jaxpeft]
---

# LoRA adapter

A low-rank adapter of {len(ranks)} modules ({targets}) with rank {values["r"]} and alpha
{values["lora_alpha"]}, trained with jaxpeft on `{base_name}`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), THIS_FOLDER)
```

```python
import jaxpeft as jp

base = jp.load_model(BASE)
adapter = jp.load_adapter(THIS_FOLDER, base)
```
"""


# Loading.


def _no_tensors(folder: pathlib.Path) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            "has only adapter_model.bin, a pickle, which can run code and is never opened here; "
            "save it again with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    return f"has no {TENSORS}; the download or save is incomplete."


def _check_side_file(folder: pathlib.Path, base: Any, allow_other_base: bool) -> None:
    file = folder / SIDE
    if not file.is_file():
        return
    side = read_json(file)
    if side.get("format") != FORMAT:
        raise UserError(
            f"{file}: format: this version reads {FORMAT}, got {side.get('format')!r}; update "
            "jaxpeft."
        )
    known, sums = side.get("base"), side.get("sha256")
    if not isinstance(known, dict) or not isinstance(sums, dict):
        raise UserError(f"{file}: lacks base or sha256; save the adapter again.")
    for name, expected in sums.items():
        if name not in OURS or not (folder / name).is_file():
            raise UserError(f"{file}: sha256: {name!r} is not in this folder.")
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise UserError(
                    f"{folder / name}: changed since it was saved (its sha256 is not the one in "
                    f"{SIDE}); if that was on purpose, remove {SIDE}, which also ends the check "
                    "of the base."
                )
    theirs = known.get("fingerprint")
    if theirs and base.fingerprint and theirs != base.fingerprint and not allow_other_base:
        raise UserError(
            f"{folder}: trained on {known.get('name')!r} (fingerprint {str(theirs)[:12]}), this "
            f"base is {base.name!r} (fingerprint {base.fingerprint[:12]}); load that base, or pass "
            "allow_other_base=True."
        )


def _assemble(
    config: PeftLoraConfig,
    modules: Mapping[str, Mapping[str, TensorInfo]],
    sites: Mapping[str, paths.Site],
    base: Any,
) -> Adapter:
    """Reads the factors and stacks them, with ranks padded to the largest."""
    ranks = {name: config.rank_of(name) for name in modules}
    width = max(ranks.values())
    factors: dict[str, dict[str, np.ndarray]] = {}
    buffers: dict[str, dict[str, np.ndarray]] = {}
    for name, pair in modules.items():
        path, layer = sites[name].path, sites[name].layer
        if path not in factors:
            *stack, d_in, d_out = shape_of(paths.get(base.params, path))
            factors[path] = {
                "a": np.zeros((*stack, d_in, width), np.float32),
                "b": np.zeros((*stack, width, d_out), np.float32),
            }
            buffers[path] = {
                "scale": np.zeros(stack, np.float32),
                "rank": np.zeros(stack, np.int32),
                "dropout": np.full(stack, config.dropout, np.float32),
            }
        at, rank = () if layer is None else layer, ranks[name]
        factors[path]["a"][at][:, :rank] = read_finite(pair["A"], f"{name}.lora_A.weight").T
        factors[path]["b"][at][:rank] = read_finite(pair["B"], f"{name}.lora_B.weight").T
        buffers[path]["scale"][at] = config.scale_of(name)
        buffers[path]["rank"][at] = rank
    spec = Spec(
        kind=LoRA.name,
        paths=tuple(sorted(factors)),
        rank=width,
        options=(("rslora", True),) if config.rslora else (),
    )
    params, frozen = (
        jax.tree.map(jnp.array, paths.unflatten({path: tree[path] for path in spec.paths}))
        for tree in (factors, buffers)
    )
    return Adapter(params, frozen, spec)
