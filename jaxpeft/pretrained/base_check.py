"""Checks that an adapter's base is the one it was trained on, and reports what is unknown.

``jaxpeft.json`` holds the fingerprint of the base's weights and its further identity
(`jaxpeft.pretrained.identity`). Other weights, another config or another tokenizer are errors.
Another chat template is a warning, since people replace it on purpose.
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files.storage import StoragePath
from jaxpeft.methods.adapter import SCALE, Adapter, is_named, ranks_at
from jaxpeft.ops.quant import scheme_of
from jaxpeft.pretrained.identity import Identity, config_changes, identity_of
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.weights.fingerprint import comparable


def describe_base(base: Model, template: str = "") -> dict[str, Any]:
    """The facts about a base that `check_base` compares, as JSON values.

    Args:
        base: A `jaxpeft.Model`.
        template: A chat template that replaced the tokenizer's; "" for none.
    """
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "quantization": scheme_of(base.params),
        **identity_of(base.config, base.tokenizer, template).to_values(),
    }


def check_base(
    folder: StoragePath, known: Mapping, base: Model, template: str, allow_other_base: bool
) -> None:
    """Compares a base with the one that an adapter was trained on.

    Args:
        folder: The adapter's folder.
        known: The values of `describe_base`; values that older versions left out are not compared.
        base: The `jaxpeft.Model` that the adapter is to be used on.
        template: The chat template that the adapter brings along; "" for none.
        allow_other_base: Whether another base is accepted.

    Raises:
        UserError: The base is another one.
    """
    if not base.fingerprint:
        return
    if not allow_other_base:
        _check_weights(folder, known, base)
        _check_identity(folder, known, base, template)
    before, now = known.get("quantization", ""), scheme_of(base.params)
    if "quantization" in known and before != now:
        warnings.warn(
            f"{folder}: trained on a base in {before or 'full precision'}, this one is in "
            f"{now or 'full precision'}: answers differ by what rounding the base changes.",
            stacklevel=5,
        )


def _check_weights(folder: StoragePath, known: Mapping, base: Model) -> None:
    theirs = str(known.get("fingerprint") or "")
    if not theirs or theirs == base.fingerprint:
        return
    if comparable(theirs, base.fingerprint):
        raise UserError(
            f"{folder}: trained on {known.get('name')!r} (fingerprint {theirs[:12]}), this "
            f"base is {base.name!r} (fingerprint {base.fingerprint[:12]}); load that base, or "
            "pass allow_other_base=True."
        )
    warnings.warn(
        f"{folder}: saved by a version of jaxpeft with another fingerprint of weights: whether "
        f"{base.name!r} is the base it was trained on cannot be checked. Save the adapter "
        "again to have it checked, or pass allow_other_base=True.",
        stacklevel=6,
    )


def _check_identity(folder: StoragePath, known: Mapping, base: Model, template: str) -> None:
    theirs, ours = Identity.from_values(known), identity_of(base.config, base.tokenizer, template)
    changes = config_changes(theirs.config, ours.config) if theirs.known else []
    what = f"config changed: {first_few(changes)}" if changes else ""
    if theirs.tokenizer and ours.tokenizer and theirs.tokenizer != ours.tokenizer:
        tokenizer = (
            f"tokenizer encodes otherwise ({theirs.tokenizer[:12]}, now {ours.tokenizer[:12]})"
        )
        what = f"{what}; its {tokenizer}" if what else tokenizer
    if what:
        raise UserError(
            f"{folder}: {base.name!r} has the weights that the adapter was trained on, but its "
            f"{what}; put the files of the base back, or pass allow_other_base=True."
        )
    before, now = theirs.chat_template, ours.chat_template
    if theirs.known and ours.tokenizer and before != now:
        warnings.warn(
            f"{folder}: trained with another chat template than that of {base.name!r} "
            f"({before[:12] or 'none'}, now {now[:12] or 'none'}): it may answer worse under it.",
            stacklevel=6,
        )


def adapter_notes(adapter: Adapter, base: Model, side: Mapping | None) -> list[str]:
    """Notes for the user about what is not known of an adapter's base or numbers.

    Args:
        adapter: The loaded adapter.
        base: The `jaxpeft.Model` that it is used on.
        side: The values of its ``jaxpeft.json``; None if there is none, as in PEFT's own folders.

    Returns:
        Lines; none if everything is known.
    """
    if side is not None:
        known = side.get("base")
        if isinstance(known, Mapping) and Identity.from_values(known).known:
            return []
        return [
            "saved by an earlier version of jaxpeft, which did not write down the config, the "
            "tokenizer and the chat template of the base: only its weights were compared"
        ]
    notes = []
    if scale := _scale(adapter):
        notes.append(
            "has no checksum, so a change of its numbers is not seen; its effective scale (alpha "
            f"by rank) is {scale}"
        )
    named = str(adapter.base_name)
    if named and base.name and _short(named) != _short(base.name):
        notes.append(
            f"names {named!r} as its base and is used on {base.name!r}; nothing tells whether they "
            "are the same"
        )
    return notes


def _scale(adapter: Adapter) -> str:
    """The scales of all adapted places; "" for a family without scales."""
    values = []
    for path, scale in paths.flatten(adapter.buffers).items():
        if is_named(path, SCALE):
            ranks = ranks_at(adapter, path.rpartition("/")[0])
            on = np.ones(np.shape(scale), bool) if ranks is None else ranks > 0
            values += np.asarray(scale)[on].tolist()
    ends = dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def _short(name: str) -> str:
    """The last part of a folder's name or hub id; in the hub's cache, the repository."""
    parts = pathlib.PurePath(name).parts
    repository = next((part for part in parts if part.startswith("models--")), None)
    return (repository.rpartition("--")[2] if repository else parts[-1] if parts else "").lower()
