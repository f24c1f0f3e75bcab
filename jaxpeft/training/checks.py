"""Checks of a run that need only sizes; they are made before any weight is read."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.config.run_config import RunConfig
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath
from jaxpeft.mesh.processes import from_first, together
from jaxpeft.methods.adapter import Adapter, ranks_at
from jaxpeft.methods.method import Context
from jaxpeft.methods.registry import KINDS
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.load import check_weights
from jaxpeft.pretrained.saved_files import check_copied
from jaxpeft.pretrained.shapes import without_weights
from jaxpeft.pretrained.weights.fingerprint import comparable
from jaxpeft.pretrained.weights.names import param_shapes
from jaxpeft.training.init_from import check_init_from
from jaxpeft.training.output.folder import (
    CHECKPOINTS,
)
from jaxpeft.training.output.result import (
    export_path,
    is_exported,
)
from jaxpeft.updates.lora_rules import check_factors
from jaxpeft.updates.optimizers import WHOLE_ARRAYS


def check_model(config: RunConfig, model: ModelConfig, tokenizer: Any = None) -> None:
    """Checks from sizes alone whether method and optimizer fit a model.

    Raises:
        UserError: A pattern matches nothing, a rank is too large, or two choices exclude each
            other.
    """
    check_dense_start(config)
    optim, shapes = config.optim, param_shapes(model)
    start = start_on_zeros(config, model, tokenizer)
    adapter = jax.eval_shape(start)
    spec = adapter.spec
    check_factors(optim, spec.kind, adapter.params)
    if config.model.quantization is not None and export_path(config).name == "model":
        raise UserError(
            f"model.quantization: method {spec.kind!r} with optim.trainable "
            f"{list(optim.trainable)} ends in a whole model, and a quantised one has no Hugging "
            "Face format; set it to null, or train an adapter that PEFT has."
        )
    for pattern in optim.trainable:
        if not any(paths.ends_in(path, (pattern,)) for path in shapes):
            raise UserError(
                f"optim.trainable: {pattern!r} is the end of no base path; they are "
                f"{', '.join(shapes)}."
            )
    for pattern in config.mesh.rules:
        if not any(re.fullmatch(pattern, path) for path in shapes):
            raise UserError(
                f"mesh.rules: {pattern!r} is the whole path of no base leaf; they are "
                f"{', '.join(shapes)}."
            )
    both = [path for path in spec.paths if paths.ends_in(path, optim.trainable)]
    if both:
        raise UserError(f"optim.trainable: the method trains {first_few(both)} already.")
    if optim.name in WHOLE_ARRAYS:  # ranks are values, so jit it; the zeros are never made
        ranked = dataclasses.replace(adapter, buffers=jax.jit(lambda: start().buffers)())
        if any(_is_padded(ranked, path) for path in spec.paths):
            raise UserError(
                f"optim.name: {optim.name} scales by the mean over a whole stack, which layers "
                "that are not adapted would change; adapt all layers of a kernel, or take adamw."
            )


def _is_padded(adapter: Adapter, path: str) -> bool:
    """Whether the arrays of a place hold zeros that are no part of the adapter."""
    ranks, kind = ranks_at(adapter, path), KINDS[adapter.spec.kind]
    if ranks is None:
        return False
    roles = [kind.role(name) for name in paths.get(adapter.params, path)]
    ranked = any(role.rank_axis is not None for role in roles)
    return bool((ranks < (adapter.spec.rank if ranked else 1)).any())


def start_on_zeros(
    config: RunConfig, model: ModelConfig, tokenizer: Any = None
) -> Callable[[], Adapter]:
    """A function to trace that makes a new adapter on a base of zeros; no base is allocated."""
    context = Context(config=model, tokenizer=tokenizer, shapes_only=True)

    def start() -> Adapter:
        zeros = {path: jnp.zeros(shape) for path, shape in param_shapes(model).items()}
        return config.method.init(paths.unflatten(zeros), jax.random.key(0), context)

    return start


def starts_dense(config: RunConfig, restored: bool) -> bool:
    """Whether the adapter starts from the weights before they are quantised."""
    return config.method.starts_dense and config.method.init_from is None and not restored


def check_dense_start(config: RunConfig) -> None:
    """Checks that the method can start from the weights before this quantisation.

    Raises:
        UserError: The base is not quantised to NF4 with float32 scales, or LoftQ takes several
            steps.
    """
    if starts_dense(config, restored=False):
        model = config.model
        config.method.check_quantization(model.quantization, model.double_quantization)


def check_batches(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Checks that all batches can be split over the mesh.

    Raises:
        UserError: The devices of the axes data and fsdp do not divide a batch size.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    train = config.train
    sizes = {"train.batch_size": train.batch_size}
    if train.microbatch_size is not None:
        sizes["train.microbatch_size"] = train.microbatch_size
    if config.data.eval is not None:
        sizes["evaluation.batch_size"] = config.evaluation.batch_size
    for name, size in sizes.items():
        if size % shards:
            lower = size // shards * shards
            near = f"{lower} or {lower + shards}" if lower else str(shards)
            raise UserError(
                f"{name}: {size} does not divide by the {shards} devices of the mesh's data and "
                f"fsdp axes; nearest: {near}."
            )


def check_unchanged(what: str, saved: str, now: str, output: StoragePath) -> None:
    """Checks that a run continues with the data or base it began with.

    Args:
        what: What is compared, in the plural, for messages.
        saved: Its fingerprint when the run began.
        now: Its fingerprint now.
        output: The run's folder.

    Raises:
        UserError: The fingerprints differ or cannot be compared.
    """
    if saved == now:
        return
    anew = "start anew with --overwrite or another output_dir."
    if not comparable(saved, now):
        raise UserError(
            f"{output}: this run began with a version of jaxpeft whose fingerprints of the {what} "
            f"cannot be compared with today's ({saved[:12]}, now {now[:12]}); go on with that "
            f"version, or {anew}"
        )
    raise UserError(
        f"{output}: the {what} are not those this run began with ({saved[:12]}, now {now[:12]}); "
        f"put them back, or {anew}"
    )


def check_sources(
    config: RunConfig, model: ModelConfig, tokenizer: Any, steps: int, *, overwrite: bool
) -> None:
    """Checks the files of weights and of a saved adapter, before anything is written.

    A run that has begun no longer needs the adapter it started from, and a finished run needs no
    weights.

    Raises:
        UserError: Something is missing, damaged or does not fit.
    """
    output, path = storage.as_path(config.output_dir), config.model.path
    if overwrite or not from_first(lambda: is_exported(config)):
        check_weights(path, config.model.revision)
        if export_path(config).name == "model":
            together(lambda: check_copied(path, config.model.revision))
    if overwrite or not (output / CHECKPOINTS).is_dir():
        base = without_weights(model, path).replace(tokenizer=tokenizer)
        together(lambda: check_init_from(config.method, base, steps))


def check_steps_done(latest: int, steps: int, config: RunConfig) -> None:
    """Checks that a run has not done more steps than the config asks for.

    Args:
        latest: The number of steps done.
        steps: The number of steps that the run is to have.
        config: Its config.

    Raises:
        UserError: More steps are done.
    """
    output, epochs = storage.as_path(config.output_dir), config.train.epochs
    if latest <= steps:
        return
    if config.train.steps is not None:
        what, way_out = f"train.steps: {steps} are", "give at least as many"
    else:
        what, way_out = f"train.epochs: {epochs or 1:g} make {steps} steps, which are", "give more"
    raise UserError(
        f"{output}: {what} fewer than the {latest} that are done; {way_out}, or choose another "
        "output_dir."
    )
