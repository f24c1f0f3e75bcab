"""What may change between a run's start and its continuation: one table, `RULES`.

A key may be free to change, may need ``--accept_changes`` with its name, or may be fixed. The
number of steps is a case of its own: it is free if no step depends on it. Changes are recorded in
``metrics.jsonl`` and printed on standard error; ``config.yaml`` gets the new values.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.config import run_config, yaml_reader
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files.storage import StoragePath, as_path
from jaxpeft.methods.method import Method
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.identity import Identity, config_changes, identity_of
from jaxpeft.training.output.result import MODEL, export_path
from jaxpeft.updates.optimizers import make_rule

FINE, ACCEPT, STEPS, REFUSED = "fine", "accept", "steps", "refused"
DATA, TEMPLATE = "data", "chat_template"
"""Inputs that may change while keys stay: the training file's content and the chat template."""

RULES: dict[str, str] = {
    "output_dir": FINE,
    "track.*": FINE,
    "evaluation.*": FINE,
    "checkpoint.*": FINE,
    "mesh.*": FINE,
    "data.eval": FINE,
    "data.workers": FINE,
    "model.chat_template": FINE,
    "train.steps": STEPS,
    "train.epochs": STEPS,
    "data.train": ACCEPT,
    "model.path": ACCEPT,
    "model.revision": ACCEPT,
    "model.compute_dtype": ACCEPT,
    "method.init_from": ACCEPT,
    "optim.learning_rate": ACCEPT,
    "optim.schedule": ACCEPT,
    "optim.warmup_steps": ACCEPT,
    "optim.clip_norm": ACCEPT,
    "optim.weight_decay": ACCEPT,
    "optim.b1": ACCEPT,
    "optim.b2": ACCEPT,
    "train.microbatch_size": ACCEPT,
    "train.remat": ACCEPT,
    "*": REFUSED,
}
"""Rules by pattern of a key; the first pattern that matches counts."""


def rule_of(key: str) -> str:
    """The rule of a key of the config."""
    return next(rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(key, pattern))


def parse_accepted(text: str | None) -> tuple[str, ...]:
    """The keys in ``--accept_changes KEY,...``.

    Raises:
        UserError: Changes of a key cannot be accepted.
    """
    keys = tuple(key for key in re.split(r"[,\s]+", text or "") if key)
    known = [DATA, TEMPLATE, *(key for key, rule in RULES.items() if rule == ACCEPT)]
    for key in keys:
        if key not in known:
            raise UserError(
                f"--accept_changes: {key!r} is no change that can be accepted; they are "
                f"{', '.join(known)}."
            )
    return keys


def check_config(
    old: RunConfig, new: RunConfig, accepted: Collection[str], output: StoragePath
) -> list[str]:
    """Compares the config of a run so far with the config that shall continue it.

    Returns:
        The changes that affect results, each in words.

    Raises:
        UserError: A change is refused, or was not accepted.
    """
    changes = run_config.diff(old, new)
    said = [f"{key}: {was} -> {now}" for key, was, now in changes]
    refused, missing = [], []
    for (key, was, now), text in zip(changes, said, strict=True):
        rule = rule_of(key)
        if rule == STEPS:
            _check_steps(old, new, accepted, output, text)
        elif rule == REFUSED or _changes_the_state(new, key, was, now):
            refused.append(text)
        elif key not in accepted and not (key == "data.train" and DATA in accepted):
            missing.append(text)
    if refused:
        raise UserError(
            f"{output}: holds a run with another config ({first_few(said, 12)}); choose another "
            "output_dir, or discard it with --overwrite."
        )
    if missing:
        keys = ",".join(text.partition(":")[0] for text in missing)
        raise UserError(
            f"{output}: holds a run with another config ({first_few(missing, 12)}); to go on with "
            f"it all the same, add --accept_changes {keys}; or choose another output_dir, or "
            "discard it with --overwrite."
        )
    return said


def check_start(
    meta: Mapping[str, Any],
    config: RunConfig,
    rows: Any,
    model: ModelConfig,
    tokenizer: Any,
    accepted: Collection[str],
) -> tuple[Any, list[str]]:
    """Compares what a checkpoint was made from with what shall continue it.

    Args:
        meta: The metadata of the checkpoint.
        config: The config of the run.
        rows: Its data, a `jaxpeft.training.rows.Rows`.
        model: The architecture of its base.
        tokenizer: The tokenizer of its base.
        accepted: Keys whose changes are accepted.

    Returns:
        The data with the run's number of steps, and notes for the user: accepted changes, and what
        could not be compared.

    Raises:
        UserError: A change is refused, or was not accepted.
    """
    output = as_path(config.output_dir)
    old = yaml_reader.loads(run_config.SCHEMA, meta["config"], f"{output}: checkpoint")
    notes = check_config(old, config, accepted, output)
    # This comes first, because another tokenizer or template gives other training data.
    notes += _check_identity(
        Identity.from_values(meta.get("identity")), model, tokenizer, accepted, output
    )
    same_data = meta["data_hash"] == rows.plan.hash
    if not same_data:
        sums = f"sha256 {meta['data_hash'][:12]}, now {rows.plan.hash[:12]}"
        if DATA not in accepted:
            raise UserError(
                f"{output}: the training data are not those this run began with ({sums}); put "
                f"{config.data.train} back, add --accept_changes data to go on with the rows as "
                "they are now, or start anew with --overwrite or another output_dir."
            )
        notes.append(f"the training data changed ({sums})")
    began = int(meta.get("steps") or _steps_before(old, rows))
    asked = (old.train.steps, old.train.epochs) != (config.train.steps, config.train.epochs)
    if rows.steps != began and not asked:
        if not same_data and _any_count(old, config, accepted):
            notes.append(f"the run has {rows.steps} steps, not the {began} it began with")
        else:
            notes.append(f"the run keeps the {began} steps it began with, not {rows.steps}")
            rows = dataclasses.replace(rows, steps=began)
    return rows, notes


def _any_count(old: RunConfig, new: RunConfig, accepted: Collection[str]) -> bool:
    """Whether no step of the run depends on the number of steps."""
    constant = new.optim.schedule == "constant" and (
        old.optim.schedule == "constant" or "optim.schedule" in accepted
    )
    return constant and type(new.method).wrap_optimizer is Method.wrap_optimizer


def _check_steps(
    old: RunConfig, new: RunConfig, accepted: Collection[str], output: StoragePath, change: str
) -> None:
    if _any_count(old, new, accepted):
        return
    by_method = type(new.method).wrap_optimizer is not Method.wrap_optimizer
    why = (
        f"the method {new.method.name} plans its ranks for all steps"
        if by_method
        else f"under optim.schedule {new.optim.schedule} the learning rate of every step depends "
        "on how many there are"
    )
    key = "model.path" if export_path(new).name == MODEL else "method.init_from"
    raise UserError(
        f"{output}: {change}: {why}; to train on, start a run in another output_dir from what this "
        f"one learned, with {key}: {export_path(new)}."
    )


def _changes_the_state(config: RunConfig, key: str, was: Any, now: Any) -> bool:
    """Whether the change gives the optimizer's state another structure."""
    if key == "optim.clip_norm":
        return (was is None) != (now is None)
    if key != "optim.weight_decay":
        return False

    def form(weight_decay: float) -> Any:
        optim = dataclasses.replace(config.optim, weight_decay=weight_decay)
        leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
        return jax.tree.structure(jax.eval_shape(make_rule(optim, 1).init, {"leaf": leaf}))

    return form(was) != form(now)


def _check_identity(
    before: Identity,
    model: ModelConfig,
    tokenizer: Any,
    accepted: Collection[str],
    output: StoragePath,
) -> list[str]:
    if not before.known:
        return [
            "the run began with an earlier version of jaxpeft: whether the config, the tokenizer "
            "and the chat template of the base are those it began with is not known"
        ]
    now = identity_of(model, tokenizer)
    what = []
    if changes := config_changes(before.config, now.config):
        what.append(f"config of the base changed: {first_few(changes)}")
    if before.tokenizer != now.tokenizer:
        sums = f"{before.tokenizer[:12]}, now {now.tokenizer[:12]}"
        what.append(f"tokenizer of the base encodes otherwise ({sums})")
    if what:
        raise UserError(
            f"{output}: the {'; the '.join(what)}; put the files back, or start anew with "
            "--overwrite or another output_dir."
        )
    if before.chat_template == now.chat_template:
        return []
    sums = f"{before.chat_template[:12] or 'none'}, now {now.chat_template[:12] or 'none'}"
    change = f"the chat template ({sums})"
    if TEMPLATE not in accepted:
        raise UserError(
            f"{output}: {change} is not that this run began with; put it back, add "
            f"--accept_changes {TEMPLATE}, or start anew with --overwrite or another output_dir."
        )
    return [f"{change} changed"]


def _steps_before(old: RunConfig, rows: Any) -> int:
    """The number of steps of a run that did not record it; it was rounded to the nearest."""
    if old.train.steps is not None:
        return old.train.steps
    epochs = old.train.epochs or 1
    return max(1, round(epochs * rows.plan.num_sequences / old.train.batch_size))
