"""Starting from a saved adapter: ``method.init_from``.

The method section still describes what is trained, and the saved adapter must match it: the same
family, places, shapes, ranks and scales. Dropout is taken from the new config, and so is what
`Method.go_on` sets anew, such as AdaLoRA's schedule; these change nothing that was learned. All
other frozen arrays come from the saved adapter. So do ranks and scales if the method would compute
them from batches, which are then not read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files.storage import expanded, is_remote, require_path
from jaxpeft.methods.adapter import DROPOUT, RANK, SCALE, Adapter, is_named
from jaxpeft.methods.algebra.stacking import pad_rank
from jaxpeft.methods.method import Context, Method
from jaxpeft.methods.registry import KINDS
from jaxpeft.pretrained.adapters import load_adapter, peek_kind
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.shapes import NeedsWeightsError


def check_init_from(method: Method, base: Model, steps: int) -> None:
    """Checks, before the model is loaded, whether a run can start from the saved adapter.

    Whether it was trained on these weights is checked when they are read. So is everything about an
    adapter that cannot be read without its base's weights.

    Args:
        method: Its `init_from` may be None; then nothing is checked.
        base: The `jaxpeft.Model` without weights, see `jaxpeft.pretrained.shapes`.
        steps: Updates of the run.

    Raises:
        UserError: There is no adapter, it is damaged, does not fit the base, or is not what
            `method` describes.
    """
    if method.init_from is None:
        return
    _require_kind(method)
    path, revision = _place(method.init_from)
    try:
        saved = load_adapter(path, base, revision=revision)
    except NeedsWeightsError:
        return
    leaves = paths.flatten(base.params)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    context = Context(base.config, base.module, base.tokenizer, steps=steps)
    _go_on(method, saved, paths.unflatten(shapes), jax.random.key(0), context)


def _require_kind(method: Method) -> None:
    """Checks that the saved adapter belongs to the method's family.

    Raises:
        UserError: There is no adapter, or it is of another family.
    """
    assert method.init_from is not None
    if KINDS[method.name].peft is None:
        raise UserError(
            f"method.init_from: what {method.name!r} trains is saved as a whole model; give that "
            "as model.path."
        )
    try:
        kind = peek_kind(*_place(method.init_from))
    except UserError as error:
        raise type(error)(f"method.init_from: {error}") from error
    if kind != method.name:
        raise UserError(
            f"method.init_from: {method.init_from} holds an adapter of kind {kind!r}, method.name "
            f"is {method.name!r}; set one to match the other."
        )


def load_start(method: Method, base: Model, key: jax.Array, context: Context) -> Adapter:
    """Loads the adapter that a run starts from.

    Args:
        method: A config with `init_from`.
        base: The `jaxpeft.Model`.
        key: Typed PRNG key, used only for arrays that `Method.go_on` draws anew.
        context: See `Method.init`.

    Returns:
        The saved adapter with the dropout of `method`, after `Method.go_on`.

    Raises:
        UserError: The adapter cannot be loaded, or is not what `method` describes.
    """
    assert method.init_from is not None
    _require_kind(method)
    path, revision = _place(method.init_from)
    saved = load_adapter(path, base, revision=revision)
    return _go_on(method, saved, base.params, key, context)


def _go_on(
    method: Method, saved: Adapter, params: dict, key: jax.Array, context: Context
) -> Adapter:
    """The result of `load_start` for a loaded adapter; only the shapes of `params` are used."""
    context = dataclasses.replace(context, shapes_only=True)
    shapes = jax.eval_shape(lambda leaves: leaves, params)
    described = jax.eval_shape(lambda leaves: method.init(leaves, key, context), shapes)
    if method.needs_batches:
        saved = _with_room(saved, described)
    differences = [*_compare_trees(saved, described)]
    if not differences:
        saved = method.go_on(saved, key, context)
        numbers = _numbers(method, shapes, key, context)  # ranks are values, not shapes
        buffers = paths.flatten(saved.buffers)
        if not method.needs_batches:
            differences += _compare_numbers(buffers, numbers)
        own = {path: value for path, value in numbers.items() if is_named(path, DROPOUT)}
        saved = dataclasses.replace(saved, buffers=paths.unflatten(buffers | own))
    if differences:
        raise UserError(
            f"method.init_from: {method.init_from} is not what the method section describes: "
            f"{first_few(differences, 3)}; describe it as its adapter_config.json does."
        )
    return dataclasses.replace(saved, spec=described.spec)


def _place(init_from: str) -> tuple[str, str | None]:
    """The folder, or the hub id and the part after its "@": a branch, tag or commit."""
    name, at, revision = require_path(init_from).rpartition("@")
    if not at or is_remote(init_from) or expanded(init_from).exists():
        return init_from, None
    return name, revision


def _with_room(saved: Adapter, described: Adapter) -> Adapter:
    """A saved adapter with the padding of a new one, and with places that have rank 0."""
    if saved.spec.kind != described.spec.kind or saved.spec.rank > described.spec.rank:
        return saved
    saved = pad_rank(saved, described.spec.rank)
    empty = set(described.spec.paths) - set(saved.spec.paths)

    def with_empty(ours: dict, theirs: dict) -> dict:
        zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in paths.flatten(theirs).items()}
        fill = {path: x for path, x in zeros.items() if path.rpartition("/")[0] in empty}
        return paths.unflatten(paths.flatten(ours) | fill)

    return dataclasses.replace(
        saved,
        params=with_empty(saved.params, described.params),
        buffers=with_empty(saved.buffers, described.buffers),
        spec=dataclasses.replace(saved.spec, paths=tuple(sorted({*saved.spec.paths, *empty}))),
    )


def _numbers(method: Method, shapes: dict, key: jax.Array, context: Context) -> dict[str, Any]:
    """The ranks, scales, dropout rates and other numbers that a family compares.

    They are computed as the method would set them; nothing else is computed.
    """
    names = (RANK, SCALE, DROPOUT, *KINDS[method.name].compared)

    @jax.jit
    def numbers() -> dict[str, Any]:
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # traced only
        buffers = paths.flatten(method.init(params, key, context).buffers)
        return {path: value for path, value in buffers.items() if is_named(path, *names)}

    return numbers()


def _compare_trees(saved: Adapter, described: Adapter):
    """Describes the differences in places, static choices and shapes."""
    theirs, ours = saved.spec, described.spec
    for path in sorted({*theirs.paths, *ours.paths}):
        if path not in ours.paths:
            yield f"it adapts {path}, the section does not"
        elif path not in theirs.paths:
            yield f"it does not adapt {path}"
    if theirs.rank != ours.rank:
        yield f"its rank is {theirs.rank}, not {ours.rank}"
    notes = KINDS[ours.kind].notes
    before, now = (
        {name: value for name, value in one.options if name not in notes} for one in (theirs, ours)
    )
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"its {name} is {before.get(name)}, not {now.get(name)}"
    for part in ("params", "buffers"):
        shapes, wanted = (
            {path: tuple(leaf.shape) for path, leaf in paths.flatten(getattr(one, part)).items()}
            for one in (saved, described)
        )
        for path in sorted({*shapes, *wanted}):
            if shapes.get(path) != wanted.get(path):
                yield f"{path} is {_shape(shapes.get(path))}, not {_shape(wanted.get(path))}"


def _compare_numbers(buffers: Mapping[str, Any], numbers: Mapping[str, Any]):
    for path, value in numbers.items():
        if is_named(path, DROPOUT):
            continue
        theirs, ours = np.asarray(buffers[path]), np.asarray(value)
        wrong = ~np.isclose(theirs, ours, rtol=1e-6, atol=0)
        if wrong.any():
            form = "" if ours.dtype == bool else "g"
            before, now = (format(side[wrong].flat[0], form) for side in (theirs, ours))
            yield f"{path} is {before}, not {now}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
