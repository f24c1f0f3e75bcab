"""HF PEFT folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

What the two files say of a method is its family's business (`jaxpeft.methods.exchange`); this
module reads and writes the folder. Beside PEFT's files lies ``jaxpeft.json``: which base the
adapter was trained on, and the sha256 of the other files. PEFT ignores it, and folders without it
load too.

Loading is strict: every tensor has its place, every place its tensor, and the config must say of
every module what the tensors say.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import numpy as np

from jaxpeft.errors import UserError
from jaxpeft.folders import real_path, require_replaceable, write_folder
from jaxpeft.methods import KINDS, Adapter, check_fit
from jaxpeft.methods.base import Label
from jaxpeft.methods.exchange import COMMON, CONFIG, PeftFormat, Tensors, Values, require_supported
from jaxpeft.models.hf import read_header, read_json
from jaxpeft.models.source import decode

TENSORS = "adapter_model.safetensors"
CARD = "README.md"
SIDE = "jaxpeft.json"
FORMAT = 1
FORMAT_PT = {"format": "pt"}
BASE_NAME = "base_model_name_or_path"
OURS = frozenset({CONFIG, TENSORS, CARD, SIDE})


def save_adapter(path: str | os.PathLike, adapter: Adapter, base: Any) -> None:
    """Writes an adapter as a folder that HF PEFT, vLLM and `load_adapter` read.

    The folder is written beside its place, synced, and moved there whole; an older adapter in
    that place is replaced only then.

    Args:
        path: The folder; it may hold an older adapter, but no other files.
        adapter: An adapter of a method that PEFT has too.
        base: The `jaxpeft.Model` it was trained on.

    Raises:
        UserError: If PEFT has no such method, if the adapter does not fit `base` or is not finite,
            or if `path` is a file or holds other files.
        ResourceError: If the disk is full.
    """
    folder = real_path(path)
    require_replaceable(folder, OURS)
    peft = KINDS[adapter.spec.kind].peft
    if peft is None:
        raise UserError(
            f"{folder}: PEFT has no folders for adapters of kind {adapter.spec.kind!r}; save the "
            "merged model instead."
        )
    check_fit(base.params, adapter)
    write_folder(folder, _render(peft, adapter, base))


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
    if not (folder / CONFIG).exists() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; an adapter on the hub is fetched with `hf download`."
        )
    place = folder / CONFIG
    if not place.is_file():
        raise UserError(f"{place}: no such file; a PEFT folder has one beside its tensors.")
    values = read_json(place)
    peft = _format_of(values, place)
    require_supported(values, place, peft)
    file = folder / TENSORS
    if not file.is_file():
        raise UserError(f"{folder}: {_no_tensors(folder)}")
    _check_side_file(folder, base, allow_other_base)
    adapter = peft.read(Values(values, place, peft.defaults), _open(file), base)
    return dataclasses.replace(adapter, base_name=Label(values.get(BASE_NAME) or ""))


# Saving.


def _render(peft: PeftFormat, adapter: Adapter, base: Any) -> dict[str, bytes]:
    """The content of every file of the folder, `SIDE` last."""
    from safetensors.numpy import save

    own, tensors = peft.write(adapter, base)
    values = COMMON | dict(peft.defaults) | own | {"peft_type": peft.type, BASE_NAME: base.name}
    files = {
        CONFIG: _json(values),
        TENSORS: save({key: np.ascontiguousarray(x) for key, x in tensors.items()}, FORMAT_PT),
        CARD: _card(peft, base.name, sum(x.size for x in tensors.values())).encode(),
    }
    side = {
        "format": FORMAT,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "versions": {name: _version(name) for name in ("jaxpeft", "jax", "flax")},
        "sha256": {name: hashlib.sha256(files[name]).hexdigest() for name in (CONFIG, TENSORS)},
    }
    return files | {SIDE: _json(side)}


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _card(peft: PeftFormat, base_name: str, size: int) -> str:
    return f"""---
base_model: {json.dumps(base_name)}
library_name: peft
pipeline_tag: text-generation
tags: [{peft.type.lower()}, jaxpeft]
---

# {peft.title}

{size:,} numbers, trained with jaxpeft on `{base_name}`.

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


def _format_of(values: dict, place: pathlib.Path) -> PeftFormat:
    formats = {kind.peft.type: kind.peft for kind in KINDS.values() if kind.peft is not None}
    kind = values.get("peft_type")
    if kind not in formats:
        known = ", ".join(sorted(formats))
        raise UserError(f"{place}: peft_type: {kind!r} is not supported; supported: {known}.")
    return formats[kind]


def _open(file: pathlib.Path) -> Tensors:
    infos = read_header(file)

    def read(key: str) -> np.ndarray:
        info = infos[key]
        return decode(np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset), info)

    shapes = {key: info.shape for key, info in infos.items()}
    return Tensors(file, shapes, {key: info.dtype for key, info in infos.items()}, read)


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
