"""Explains a folder or file that is no model or adapter, and names what to give instead.

Every function returns the end of an error's text: a clause that names the place to give instead, or
"" if nothing helpful is known.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from jaxpeft.core.errors import first_few

_CACHED = re.compile(r"(models|datasets|spaces)--(.+)")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
MLX_FILES = ("adapters.safetensors", "adapters.npz")
MLX_KEYS = ("fine_tune_type", "lora_parameters", "lora_layers")
MLX_ADAPTER = (
    "an adapter of MLX, which is not read: give the dequantized model that `mlx_lm.fuse` makes of "
    "it as the model, or write PEFT's files: its lora_a and lora_b, transposed, are lora_A.weight "
    "and lora_B.weight, r is its rank, and lora_alpha its scale times the rank"
)
_INDEX = (
    "import glob, json, safetensors; json.dump({'weight_map': {key: file for file in "
    "sorted(glob.glob('model-*.safetensors')) for key in safetensors.safe_open(file, 'np').keys()"
    "}}, open('model.safetensors.index.json', 'w'))"
)


def instead_of_model(folder: pathlib.Path) -> str:
    """What a folder without ``config.json`` is, and what to give as the model instead."""
    if cached := _cached(folder, "config.json"):
        return cached
    names = _names(folder)
    if "adapter_config.json" in names:
        base = _text(folder / "adapter_config.json", "base_model_name_or_path")
        of = f", {base}" if base else ""
        return f"an adapter, not a model; give its base as the model{of}, and this as the adapter"
    if any(name in names for name in MLX_FILES):
        return MLX_ADAPTER
    if "config.yaml" in names and ("checkpoints" in names or "metrics.jsonl" in names):
        if (folder / "model" / "config.json").is_file():
            return f"the folder of a run; its model is {folder / 'model'}"
        if "adapter" in names:
            return (
                "the folder of a run that trained an adapter; give the base as the model, and "
                f"{folder / 'adapter'} as the adapter"
            )
        return "the folder of a run that has exported nothing yet; it ends with the same command"
    if "params.json" in names:
        return (
            "a model in the format of its authors (params.json); give the folder in Hugging "
            "Face's format, with config.json and model*.safetensors"
        )
    if "model_index.json" in names:
        return "a pipeline that makes pictures, not a language model"
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return f"a folder with GGUF files; name one: {folder / ggufs[0]}"
    return _inside(folder, "config.json")


def instead_of_adapter(folder: pathlib.Path) -> str:
    """What a folder without ``adapter_config.json`` is, and what to give as the adapter instead."""
    if cached := _cached(folder, "adapter_config.json"):
        return cached
    names = _names(folder)
    if any(name in names for name in MLX_FILES):
        return MLX_ADAPTER
    if "config.yaml" in names and ("checkpoints" in names or "metrics.jsonl" in names):
        if "model" in names:
            return f"the folder of a run that trained a whole model; load {folder / 'model'}"
        return "the folder of a run that has exported no adapter yet; the same command ends it"
    if "config.json" in names:
        return "a model, not an adapter; give it as the model"
    return _inside(folder, "adapter_config.json")


def no_tensors(folder: pathlib.Path) -> str:
    """What an adapter's folder holds instead of ``adapter_model.safetensors``."""
    return MLX_ADAPTER if any(name in _names(folder) for name in MLX_FILES) else ""


def lone_weights(file: pathlib.Path) -> str:
    """What to give instead of a file of weights."""
    folder = file.parent
    if (folder / "adapter_config.json").is_file() or file.name in MLX_FILES:
        return instead_of_model(folder)
    if (folder / "config.json").is_file():
        return f"one file of a model; give its folder, {folder}"
    return "weights alone are no model; give a folder that holds them with their config.json"


def no_weights(folder: pathlib.Path) -> str:
    """What a model's folder holds instead of ``model.safetensors`` and shards with an index."""
    names = _names(folder)
    shards = [match for name in names if (match := _SHARD.fullmatch(name)) and match[1] == "model"]
    if shards:
        total = int(shards[0][3])
        if len(shards) < total:
            return (
                f"{len(shards)} of {total} shards, and no model.safetensors.index.json; download "
                "the others and the index into the folder"
            )
        return (
            f"all {total} shards, and no model.safetensors.index.json, which says what is in "
            f'which; download it into the folder, or write it there: python -c "{_INDEX}"'
        )
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        return (
            "only weights in the format of their authors (consolidated*.safetensors); download "
            "the files model*.safetensors of the same repository into the folder"
        )
    if "adapter_model.safetensors" in names:
        return "only an adapter's weights; give the base as the model, and this as the adapter"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if len(others) == 1:
        return f"no model.safetensors, only {others[0]}; if that is all of it, rename it so"
    if others:
        return f"no model.safetensors and no index of shards, only {first_few(others)}"
    if "weights.npz" in names:
        return "weights of MLX (weights.npz), which are not read; give the model it was made from"
    return ""


def is_mlx(values: Any) -> bool:
    """Whether an ``adapter_config.json`` was written by MLX."""
    return "peft_type" not in values and any(key in values for key in MLX_KEYS)


def _cached(folder: pathlib.Path, wanted: str) -> str:
    """What to give instead of a folder in the hub's cache; "" for any other folder."""
    match = _CACHED.fullmatch(folder.name)
    if folder.name in ("snapshots", "blobs", "refs") and _CACHED.fullmatch(folder.parent.name):
        match, folder = _CACHED.fullmatch(folder.parent.name), folder.parent
    if match is None:
        repos = [name for name in _names(folder) if name.startswith("models--")]
        if not repos or "config.json" in _names(folder):
            return ""
        ids = sorted(name.removeprefix("models--").replace("--", "/", 1) for name in repos)
        return f"the hub's cache; give a hub id: {first_few(ids)}"
    if match[1] != "models":
        return f"a cached repository of {match[1]}, not of a model"
    hub_id = match[2].replace("--", "/", 1)
    held = sorted(place for place in (folder / "snapshots").glob("*") if (place / wanted).is_file())
    main = _text(folder / "refs" / "main")
    newest = [place for place in held if place.name == main] or held[-1:]
    if newest:
        return f"a repository in the hub's cache; give {newest[0]}, or the hub id {hub_id}"
    return (
        f"a repository in the hub's cache, and no snapshot in it has {wanted}; give the hub id "
        f"{hub_id}, which downloads what is missing"
    )


def _inside(folder: pathlib.Path, wanted: str) -> str:
    """The folders inside a folder that hold the `wanted` file."""
    found = sorted(str(file.parent) for file in _safe(folder.glob(f"*/{wanted}")))
    return f"{wanted} lies in {first_few(found, 3)}; give that folder" if found else ""


def _names(folder: pathlib.Path) -> set[str]:
    return {entry.name for entry in _safe(folder.iterdir())}


def _safe(entries: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The entries of a folder; empty if it cannot be read."""
    try:
        return list(entries)
    except OSError:
        return []


def _text(file: pathlib.Path, key: str = "") -> str:
    """A short text in a file, or under a key of a JSON file; "" if there is none."""
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text).get(key) if key else text.strip()
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return value if isinstance(value, str) and len(value) < 200 and value.isprintable() else ""
