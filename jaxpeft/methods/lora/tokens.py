"""Rows of a few tokens that a LoRA trains beside its factors.

PEFT calls them ``trainable_token_indices``: a list for the embedding table, or ids by module. It
stores the rows under ``token_adapter.trainable_tokens_delta``.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.leaves import token_rows
from jaxpeft.methods.lora.peft.config import Arrays, Folder, Part
from jaxpeft.methods.peft.modules import contiguous, require_finite
from jaxpeft.methods.peft.values import PREFIX, Values

FIELDS = {paths.EMBEDDING: "token_ids", paths.HEAD: "head_token_ids"}
"""The config's field for each place."""

KEY = "trainable_token_indices"
ENDING = "token_adapter.trainable_tokens_delta"


def check(config: Any) -> None:
    """Checks the fields of a `jaxpeft.LoRA` about tokens.

    Raises:
        ValueError: The ids are wrong.
    """
    for field in FIELDS.values():
        if getattr(config, field) != ():
            ids = token_rows.check_ids(f"LoRA.{field}", getattr(config, field))
            object.__setattr__(config, field, ids)


def start(config: Any, params: dict, taken: Mapping[str, dict]) -> tuple[dict, dict]:
    """The initial rows, which are copies of the base's.

    Args:
        config: A `jaxpeft.LoRA`.
        params: Base parameters.
        taken: Trained arrays by path, of weights that have factors or are saved whole.

    Returns:
        Trained and frozen arrays by path.

    Raises:
        UserError: An id is beyond the vocabulary, a weight is trained in another way already, or a
            tied head should have other rows than its table.
    """
    asked = {path: ids for path, field in FIELDS.items() if (ids := getattr(config, field))}
    if isinstance(params, paths.NamedTree) and asked:
        asked = {paths.table_of(params): config.token_ids}
    trained, frozen = {}, {}
    for path, ids in asked.items():
        name, field = paths.module_name(path), FIELDS.get(path, "token_ids")
        if path in taken:
            raise UserError(
                f"LoRA.{field}: {name} is adapted or saved whole as well; take it out of "
                "targets and save_modules, or train no tokens of it."
            )
        trained[path], frozen[path] = token_rows.start(params, path, ids, f"LoRA.{field}")
    if paths.EMBEDDING in asked and paths.get(params, paths.HEAD) is None:
        if paths.HEAD in asked:
            raise UserError(
                "LoRA.head_token_ids: this model's head is its embedding table, and sees the "
                "tokens of token_ids already; leave head_token_ids out."
            )
        if "value" in taken.get(paths.HEAD, {}):
            raise UserError(
                "LoRA.token_ids: this model's head is its embedding table and would see the "
                "tokens, but save_modules makes it one of its own; leave one of them out."
            )
    return trained, frozen


def fields(adapter: Adapter) -> dict[str, Any]:
    """The fields of the config that trained rows determine."""
    return {
        FIELDS.get(path, "token_ids"): token_rows.ids_of(adapter, path)
        for path in adapter.spec.paths
    }


# HF PEFT.


def parse(values: Values, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tokens of each weight.

    Args:
        values: The config.
        tied: Whether the base's head is its table.

    Raises:
        UserError: The value is no list of ids, or names other modules.
    """
    found = values.get(KEY)
    if found is None or found == [] or found == {}:
        return {}
    by_name = found if isinstance(found, Mapping) else {"embed_tokens": found}
    tokens = {}
    for name, ids in by_name.items():
        full = {paths.module_name(path): path for path in FIELDS}
        path = next(
            (path for module, path in full.items() if paths.name_matches([name], module)), None
        )
        if path is None:
            raise UserError(
                f"{values.file}: {KEY}: only tokens of embed_tokens and lm_head are supported, got "
                f"{name!r}."
            )
        try:
            tokens[path] = token_rows.check_ids(KEY, ids)
        except ValueError as error:
            raise UserError(f"{values.file}: {error}") from None
    if tied and len(tokens) == 2 and tokens[paths.EMBEDDING] != tokens.pop(paths.HEAD):
        raise UserError(
            f"{values.file}: {KEY}: other tokens of lm_head than of embed_tokens are not supported "
            "where this base ties the two."
        )
    return tokens


def peft_fields(values: Values) -> dict[str, Any]:
    """The fields of the `jaxpeft.LoRA` that a PEFT config describes."""
    return {FIELDS[path]: ids for path, ids in parse(values, tied=False).items()}


def keys(folder: Folder) -> set[str]:
    """The names of the rows' tensors in the file."""
    return {_key(path) for path in folder.config.tokens} & folder.tensors.shapes.keys()


def check_folder(folder: Folder) -> None:
    """Checks that a folder has all rows of tokens, and no other array in their place.

    Raises:
        UserError: Rows are missing, or another array has their place.
    """
    config, base, place = folder.config, folder.base, folder.tensors.file
    for path, ids in config.tokens.items():
        token_rows.require_known(ids, base.config.vocab_size, f"{place}: {KEY}")
        name = paths.module_name(path)
        if config.adapts(name) or config.saves(name):
            raise UserError(f"{place}: {KEY}: {name} is adapted or saved whole as well.")
    tied = paths.get(base.params, paths.HEAD) is None
    if tied and paths.EMBEDDING in config.tokens and config.saves(paths.module_name(paths.HEAD)):
        raise UserError(
            f"{place}: {KEY}: tokens of the table are not supported where its tied head is saved "
            "whole."
        )
    shapes = {_key(path): (len(ids), base.config.d_model) for path, ids in config.tokens.items()}
    folder.tensors.require_some(shapes, base.name)


def read(folder: Folder, width: int) -> Arrays:
    """The trained rows."""
    del width
    return {
        path: (
            {"rows": jnp.array(folder.tensors.read(_key(path)))},
            {"ids": jnp.array(ids, jnp.int32), "rank": jnp.ones((), jnp.int32)},
        )
        for path, ids in folder.config.tokens.items()
    }


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of the rows; see `Part`."""
    del base
    tensors, found = {}, {}
    for path in adapter.spec.paths:
        rows, name = paths.get(adapter.params, f"{path}/rows"), paths.module_name(path)
        require_finite(name, rows)
        tensors[_key(path)] = contiguous(rows)
        found[name.rpartition(".")[2]] = list(token_rows.ids_of(adapter, path))
    return {KEY: found["embed_tokens"] if [*found] == ["embed_tokens"] else found}, tensors


PART = Part(keys=keys, check=check_folder, read=read, write=write)


def _key(path: str) -> str:
    return f"{PREFIX}{paths.module_name(path)}.{ENDING}"
