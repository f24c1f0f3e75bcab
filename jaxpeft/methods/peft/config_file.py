"""Finds and reads an ``adapter_config.json`` of HF PEFT, for any method."""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.files import other_folders, storage
from jaxpeft.files.json_file import read_json
from jaxpeft.files.locate import locate_adapter
from jaxpeft.files.storage import StoragePath
from jaxpeft.methods.peft.values import CONFIG, FORMATS, PeftFormat, Values, require_supported


def read_method(config: Any, revision: str | None = None) -> Any:
    """Reads the `Method` that a PEFT config describes; see `jaxpeft.LoRA.from_peft`.

    Raises:
        UserError: The argument is no PEFT config, or a type, setting or value is not supported.
    """
    if isinstance(config, str | os.PathLike):
        local = storage.expanded(config)
        place: Any = (
            local if local.is_file() else find_config(locate_adapter(config, revision, (CONFIG,)))
        )
        values = read_json(place)
    else:
        place, values = CONFIG, config
        if not isinstance(values, Mapping) and hasattr(values, "to_dict"):
            place, values = type(config).__name__, config.to_dict()
        if not isinstance(values, Mapping):
            raise UserError(
                f"from_peft: expected an {CONFIG}, its folder, a hub id, a dict, or a config of "
                f"PEFT, got {type(config).__name__}."
            )
        values = json.loads(json.dumps(dict(values), default=sorted))  # PEFT's sets and enums
    peft = format_of(values, place)
    require_supported(values, place, peft)
    if peft.config is None:
        raise UserError(f"{place}: peft_type: from_peft does not know {peft.type!r} yet.")
    try:
        return peft.config(Values(values, place, peft.defaults))
    except UserError:
        raise
    except ValueError as error:  # from the config class itself
        raise UserError(f"{place}: {error}") from error


def find_config(folder: StoragePath) -> StoragePath:
    """Finds the config in the folder of an adapter or of a run.

    Raises:
        UserError: There is no config.
    """
    if not (folder / CONFIG).exists() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        found = "" if storage.is_remote(folder) else other_folders.instead_of_adapter(folder)
        if found:
            raise UserError(f"{folder}: {found}.")
        raise UserError(
            f"{folder / CONFIG}: no such file; a PEFT folder has one beside its tensors."
        )
    return folder / CONFIG


def format_of(values: Mapping[str, Any], place: Any) -> PeftFormat:
    """The format that a config's ``peft_type`` names.

    Raises:
        UserError: The type is not supported.
    """
    kind = values.get("peft_type")
    if other_folders.is_mlx(values):
        raise UserError(f"{place}: {other_folders.MLX_ADAPTER}.")
    if not isinstance(kind, str) or kind not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise UserError(f"{place}: peft_type: {kind!r} is not supported; supported: {known}.")
    return FORMATS[kind]
