"""Reads and writes HF PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each family interprets the content of the two files (`jaxpeft.methods.peft.values`); this module
reads and writes the folder. Beside PEFT's files there is ``jaxpeft.json`` with the base that the
adapter was trained on and the sha256 of the other files. PEFT ignores it, and folders without it
can be loaded too.

Loading is strict: every tensor must have a place and every place a tensor, and config and tensors
must agree about every module.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.files.folders import real_path, require_replaceable, write_folder
from jaxpeft.files.json_file import json_bytes, read_json
from jaxpeft.files.locate import locate_adapter
from jaxpeft.files.storage import StoragePath
from jaxpeft.lifting.roles import Roles
from jaxpeft.mesh.processes import is_first
from jaxpeft.methods.adapter import Adapter, Label, require_own
from jaxpeft.methods.binding import check_fit
from jaxpeft.methods.chat_settings import ChatSettings, chat_of
from jaxpeft.methods.foreign import fitted
from jaxpeft.methods.peft.config_file import find_config, format_of
from jaxpeft.methods.peft.values import (
    COMMON,
    CONFIG,
    PeftFormat,
    Values,
    require_supported,
)
from jaxpeft.methods.registry import KINDS
from jaxpeft.pretrained import own_folder
from jaxpeft.pretrained.base_check import adapter_notes, check_base, describe_base
from jaxpeft.pretrained.identity import Identity
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.named_base import NamedBase, named_base
from jaxpeft.pretrained.peft_tensors import TENSORS, tensors_in
from jaxpeft.pretrained.shapes import load_shapes

CARD = "README.md"
SIDE = "jaxpeft.json"
FORMAT = 1
FORMAT_PT = {"format": "pt"}
BASE_NAME = "base_model_name_or_path"
OURS = frozenset({CONFIG, TENSORS, CARD, SIDE})


def save_adapter(
    path: str | os.PathLike,
    adapter: Adapter,
    base: Any,
    *,
    roles: Roles | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter as a folder that HF PEFT, vLLM and `load_adapter` read.

    For a model that is not of this package, for which PEFT has no names, the folder is of a format
    of our own, see `jaxpeft.pretrained.own_folder`; only `load_adapter` reads it.

    The folder is written beside its place, synced, and moved there when it is complete; only then
    is an older adapter replaced. In a bucket the older ``jaxpeft.json`` is removed first and the
    new one is written last; in between the folder is incomplete.

    Args:
        path: The folder; it may hold an older adapter, but no other files.
        adapter: An adapter of a method that PEFT has too.
        base: The `jaxpeft.Model` it was trained on; for another model its parameters, or their
            shapes.
        roles: For another model, with `names`: what `jaxpeft.describe` found of it.
        names: For another model: the names of PEFT's modules by patterns of paths, such as
            ``{"layers/*/attn/q/kernel": "model.layers.{}.self_attn.q_proj"}``; "{}" stands for what
            "*" matched, "{layer}" for the index in a stack. The folder is then one of PEFT.

    Raises:
        UserError: If PEFT has no such method, if the adapter does not fit `base` or is not finite,
            or if `path` is a file or holds other files.
        ResourceError: If the disk is full.
    """
    folder = real_path(path)
    if names is not None:
        base = _named(base, roles, names)
        adapter = base.writes(adapter)
    elif not isinstance(base, Model):
        own_folder.save(folder, adapter, base)
        return
    else:
        require_own(adapter, "save_adapter with a jaxpeft.Model")
    require_replaceable(folder, OURS)
    peft = KINDS[adapter.spec.kind].peft
    if peft is None:
        raise UserError(
            f"{folder}: PEFT has no folders for adapters of kind {adapter.spec.kind!r}; save the "
            "merged model instead."
        )
    check_fit(fitted(base.params, adapter), adapter)
    files = _render(peft, adapter, base)
    if is_first():
        write_folder(folder, files)


def load_adapter(
    path: str | os.PathLike,
    base: Any = None,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    roles: Roles | None = None,
    names: Mapping[str, str] | None = None,
) -> Adapter:
    """Reads a folder of PEFT, or one that `save_adapter` wrote, strictly.

    Args:
        path: A PEFT folder, ours or PEFT's own, or a run's folder with one in ``adapter``, on disk
            or in a bucket (``gs://``); or a hub id "org/name".
        base: The `jaxpeft.Model` that the adapter is for. Without it, shapes are checked against
            the config of the base that the adapter names, but weights are not checked. For a model
            that is not of this package, its parameters, or their shapes.
        revision: Branch, tag or commit of a hub id.
        allow_other_base: Accept an adapter that was trained on other weights, or on a base with
            another config or tokenizer.
        roles: For a model that is not of this package, what `jaxpeft.describe` found of it.
        names: For such a model, to read a folder of PEFT: see `save_adapter`.

    Returns:
        The adapter, in float32, ready to train on.

    Raises:
        UserError: If anything is missing, unexpected, damaged, of another shape or rank, not
            finite, not supported yet, or made for another base.

    Example:
        >>> adapter = jp.load_adapter("some/adapter")  # doctest: +SKIP
        >>> revision = adapter.base_revision or None  # doctest: +SKIP
        >>> base = jp.load_model(adapter.base_name, revision=revision)  # doctest: +SKIP
    """
    named = None if names is None else _named(base, roles, names)
    if named is None and (roles is not None or not isinstance(base, Model | None)):
        return own_folder.load(path, base, roles, revision)
    folder, place, values, peft = _open_folder(path, revision)
    if named is not None:
        named.require_kernels(values, place)
        adapter = peft.read(Values(values, place, peft.defaults), tensors_in(folder), named)
        return named.reads(adapter)
    name, version = values.get(BASE_NAME) or "", values.get("revision") or ""
    for key, value in ((BASE_NAME, name), ("revision", version)):
        if not isinstance(value, str):
            raise UserError(f"{place}: {key}: expected a text, got {value!r:.60}.")
    if problem := storage.problem_of(name):
        raise UserError(f"{place}: {BASE_NAME}: {problem}, got {storage.shown(name)}.")
    if storage.expanded(name).exists():
        version = ""  # a local base has no revision
    base = _shapes_of(place, name, version) if base is None else base
    tensors = tensors_in(folder)
    side = _read_side_file(folder)
    chat = ChatSettings.from_values(side.get("chat", {}), str(folder / SIDE))
    check_base(folder, side.get("base", {}), base, chat.template, allow_other_base)
    adapter = peft.read(Values(values, place, peft.defaults), tensors, base)
    return dataclasses.replace(
        adapter, base_name=Label(name), base_revision=Label(version), chat=chat.label()
    )


def notes_of(
    path: str | os.PathLike, adapter: Adapter, base: Model, revision: str | None = None
) -> list[str]:
    """Notes for the user of an adapter, one line each; see `adapter_notes`.

    Args:
        path: The place from which `adapter` was loaded.
        adapter: From `load_adapter`.
        base: The `jaxpeft.Model` that it is used on.
        revision: The revision that `load_adapter` was given.

    Raises:
        UserError: There is no such folder any more.
    """
    folder = _open_folder(path, revision)[0]
    side = read_json(folder / SIDE) if (folder / SIDE).is_file() else None
    return [f"{folder}: {note}." for note in adapter_notes(adapter, base, side)]


def peek_kind(path: str | os.PathLike, revision: str | None = None) -> str:
    """The family of a saved adapter, from its ``adapter_config.json`` alone.

    Args:
        path: See `load_adapter`.
        revision: See `load_adapter`.

    Returns:
        A key of ``jaxpeft.methods.registry.KINDS``.

    Raises:
        UserError: If there is no such adapter, or its family is not supported.
    """
    peft = _open_folder(path, revision)[3]
    return next(name for name, kind in KINDS.items() if kind.peft is peft)


# Saving.


def _render(peft: PeftFormat, adapter: Adapter, base: Model | NamedBase) -> dict[str, bytes]:
    """The content of every file of the folder, `SIDE` last."""
    from safetensors.numpy import save

    own, tensors = peft.write(adapter, base)
    named = {"peft_type": peft.type, BASE_NAME: base.name}
    if base.revision:
        named["revision"] = base.revision
    elif str(adapter.base_name) == base.name and adapter.base_revision:
        named["revision"] = str(adapter.base_revision)
    values = COMMON | dict(peft.defaults) | own | named
    files = {
        CONFIG: json_bytes(values),
        TENSORS: save({key: np.ascontiguousarray(x) for key, x in tensors.items()}, FORMAT_PT),
    }
    if isinstance(base, NamedBase):
        return files
    files[CARD] = _card(peft, base.name, sum(x.size for x in tensors.values())).encode()
    side = {
        "format": FORMAT,
        "base": describe_base(base, chat_of(adapter).template),
        "versions": {name: _version(name) for name in ("jaxpeft", "jax", "flax")},
        "sha256": {name: hashlib.sha256(files[name]).hexdigest() for name in (CONFIG, TENSORS)},
    }
    if chat := chat_of(adapter).to_values():
        side["chat"] = chat
    return files | {SIDE: json_bytes(side)}


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


def _open_folder(
    path: str | os.PathLike, revision: str | None
) -> tuple[StoragePath, StoragePath, dict[str, Any], PeftFormat]:
    """The folder, the place and the values of its config, and its format."""
    folder = locate_adapter(path, revision, (CONFIG, TENSORS, SIDE))
    if (folder / own_folder.RECORD).is_file():
        raise UserError(f"{folder}: {own_folder.OTHER_MODEL}")
    place = find_config(folder)
    values = read_json(place)
    peft = format_of(values, place)
    require_supported(values, place, peft)
    return place.parent, place, values, peft


def _shapes_of(place: StoragePath, name: str, version: str) -> Model:
    """The base that an adapter names, without its weights."""
    if not name:
        raise UserError(f"{place}: names no base in {BASE_NAME}; pass it: load_adapter(..., base).")
    try:
        return load_shapes(name, version or None)
    except UserError as error:
        raise type(error)(
            f"{place}: the base it names cannot be found ({error}); load a base yourself and pass "
            "it: load_adapter(..., base)."
        ) from error


def _named(base: Any, roles: Roles | None, names: Mapping[str, str]) -> NamedBase:
    """The base with PEFT's names of a model that is not ours.

    Raises:
        UserError: It is a model of ours, or there are no roles.
    """
    if isinstance(base, Model) or base is None or roles is None:
        raise UserError(
            "names: are for models that are not of jaxpeft; they go with the model's parameters "
            "and roles=jaxpeft.describe(function, params, inputs)."
        )
    return named_base(base, roles, names)


def _read_side_file(folder: StoragePath) -> dict[str, Any]:
    """The content of ``jaxpeft.json`` after its hashes were checked; empty if there is none."""
    file = folder / SIDE
    if not file.is_file():
        return {}
    side = read_json(file)
    if side.get("format") != FORMAT:
        newer = isinstance(side.get("format"), int) and side["format"] > FORMAT
        raise UserError(
            f"{file}: format: this version reads {FORMAT}, got {side.get('format')!r:.60}; "
            + ("update jaxpeft." if newer else "save the adapter again.")
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
    if not Identity.is_whole(known):
        raise UserError(f"{file}: base: lacks a part of what it is; save the adapter again.")
    return side
