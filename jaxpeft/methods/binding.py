"""Makes adapters, and combines them with a base: ``init_adapter`` and ``bind``.

``bind`` is called inside the traced function: ``module.apply(bind(params, adapter), tokens)``.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.lifting.folded import Folded, bottom
from jaxpeft.lifting.roles import Roles
from jaxpeft.lifting.trees import is_state
from jaxpeft.methods.adapter import Adapter, Label
from jaxpeft.methods.family import Leaf, weight_at
from jaxpeft.methods.foreign import as_base, as_dicts, fitted, is_foreign, put_back, with_axes
from jaxpeft.methods.method import Context, Method
from jaxpeft.methods.mixed import NOT_STACKED, extra_axes, first_of, mixed_leaf
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import SHARED, shape_of, take_shared


def init_adapter(
    method: Method,
    base: Any,
    key: jax.Array,
    *,
    batches: Any = None,
    roles: Roles | None = None,
    tied: bool = False,
    embedding: str = "",
) -> Adapter:
    """A new adapter of `method`.

    Args:
        method: A config such as ``LoRA(rank=16)``.
        base: A `jaxpeft.Model`, or its parameters alone. For random initialisations that need
            nothing else of the model, the shapes of the parameters are enough.
        key: Typed PRNG key (``jax.random.key(0)``).
        batches: Batches for the training step, for initialisations from data.
        roles: For parameters of a model that is not ours, what `jaxpeft.describe` found.
        tied: With roles: a table that is also a kernel, such as the head, is adapted for both uses.
        embedding: With roles: the path of the table whose rows stand for tokens, for soft prompts
            and trained tokens; needed if the model has several tables.

    Returns:
        An adapter that leaves the model's function unchanged. Exceptions are some soft prompts,
        and LoftQ, which compensates the error of quantising the base.

    Raises:
        UserError: If a target pattern matches no module, the method needs something that is
            missing, or parameters that are not ours come without roles.
    """
    if roles is not None:
        method.check_any_model()
        tree = as_base(base, roles, embedding)
        return with_axes(method.init(tree, key, Context(batches=batches)), tree, roles, tied)
    if tied or embedding:
        raise UserError(
            "init_adapter: tied and embedding are for models that are not of jaxpeft; they go with "
            "roles=."
        )
    if paths.is_own(base):
        return method.init(dict(base), key, Context(batches=batches))
    if not hasattr(base, "config"):
        raise UserError(
            "init_adapter: these are not the parameters of a model of jaxpeft, and what a model "
            "does with its parameters is not guessed; pass roles=jaxpeft.describe(function, "
            "params, inputs)."
        )
    context = Context(base.config, base.module, base.tokenizer, batches)
    adapter = method.init(base.params, key, context)
    name, revision = Label(base.name), Label(base.revision)
    return dataclasses.replace(adapter, base_name=name, base_revision=revision)


def bind(
    params: Any,
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    weights: Sequence[Any] | None = None,
    index: Any = None,
    dropout_key: Any = None,
) -> Any:
    """Builds the variables that ``module.apply`` takes.

    Call it inside the function that is traced or differentiated; it costs nothing there.

    Args:
        params: Base parameters: a nested dict, or for models that are not of this package any tree
            of parameters, such as an ``nnx.State``.
        adapter: One adapter, several, or None for the base alone. Several are applied one after
            the other: changes of a kernel by LoRA add up.
        weights: For several adapters, the factor of each one's change; 1 by default.
        index: For adapters from `jaxpeft.stack_adapters`, the adapter of each row of the batch:
            ``(batch,)`` whole numbers, -1 for none.
        dropout_key: Typed PRNG key of this step; None drops nothing, as at inference.

    Returns:
        ``{"params": tree}``, where the adapted leaves are nodes (see `jaxpeft.ops.linear`). If
        nodes share arrays over all layers, these are in a second collection, ``"shared"``. For
        adapters that were made with roles, a function wrapped by `jaxpeft.lift` takes the tree: as
        it is for an ``nnx.State`` or Linen's whole variables, else under ``"params"``.

    Raises:
        UserError: If the base lacks leaves of an adapter or has other shapes, or if the family
            does not support `weights` or `index`.
    """
    adapters = adapters_of(adapter, weights)
    if is_foreign(params, adapters):
        tree = put_back(params, _bound(as_dicts(params), adapters, index, dropout_key))
        whole = is_state(tree) or not isinstance(tree, Mapping) or "params" in tree
        return tree if whole else {"params": tree}
    tree, shared = take_shared(_bound(params, adapters, index, dropout_key))
    return {"params": tree, SHARED: shared} if shared else {"params": tree}


def _bound(params: dict, adapters: Sequence[Adapter], index: Any, dropout_key: Any) -> dict:
    """The tree of `bind`, with the arrays that nodes share still in them."""
    tree, changed = params, {}
    for position, one in enumerate(adapters):
        key = dropout_key
        if key is not None and position:
            key = jax.random.fold_in(key, position)
        if index is not None and extra_axes(one) == 0:
            raise UserError(NOT_STACKED)
        tree = fitted(tree, one)
        require_unchanged(one, changed)
        leaves = make_leaves(tree, one, key)
        check_leaves(leaves, fitted(params, one), one if index is None else first_of(one))
        for leaf in leaves:
            leaf = after_others(leaf, tree)
            kind = KINDS[one.spec.kind]
            nodes = kind.bind(leaf) if index is None else _bind_mixed(leaf, one, index)
            tree = paths.put(tree, nodes)
    return tree


def _bind_mixed(leaf: Leaf, adapter: Adapter, index: Any) -> dict[str, Any]:
    """The bound tree's entries at one place of stacked adapters, see `jaxpeft.methods.mixed`."""

    def bind_one(base: Any, bound: dict, arrays: tuple[dict, dict, dict]) -> dict[str, Any]:
        params, buffers, shared = arrays
        changes = {"base": base, "bound": bound, "params": params, "buffers": buffers}
        one = dataclasses.replace(leaf, **changes, shared=shared, key=None)
        return KINDS[adapter.spec.kind].bind(one)

    arrays = first_of((leaf.params, leaf.buffers, leaf.shared))
    probe = jax.eval_shape(bind_one, leaf.base, leaf.bound, arrays)
    return mixed_leaf(leaf, adapter, probe, index)


def require_unchanged(adapter: Adapter, changed: dict[str, bool]) -> None:
    """Checks that an adapter does not replace leaves that adapters before it changed.

    Args:
        adapter: The adapter.
        changed: Paths that earlier adapters changed, and whether the base's own leaf is changed
            (virtual tokens only extend the table). This adapter's own paths are added.

    Raises:
        UserError: It replaces such a leaf.
    """
    kind = KINDS[adapter.spec.kind]
    virtual = kind.virtual_tokens(adapter) > 0
    for path in adapter.spec.paths:
        replaces = {kind.role(name).replaces for name in paths.get(adapter.params, path, {})}
        if path in changed and ("whole" in replaces or ("part" in replaces and changed[path])):
            raise UserError(
                f"{path}: this adapter replaces this weight (DoRA does, and modules or tokens that "
                "are trained whole), but an adapter before it changes the weight; put this one "
                "first, or merge the other one."
            )
        changed[path] = changed.get(path, False) or not virtual


def adapters_of(
    adapter: Adapter | Sequence[Adapter] | None, weights: Sequence[Any] | None = None
) -> list[Adapter]:
    """The adapters in an argument that may hold one, several or none, scaled by their weights.

    Raises:
        UserError: There is not one weight for each adapter, or an adapter cannot be weighted.
    """
    if adapter is None:
        return []
    several = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    if weights is None:
        return several
    check_weights(weights, len(several))
    for one in several:
        if KINDS[one.spec.kind].weigh is None:
            raise UserError(
                f"weights: the change of an adapter of kind {one.spec.kind!r} has no factor; leave "
                "weights out."
            )
    return [
        KINDS[one.spec.kind].weigh(one, weight)  # pyright: ignore[reportOptionalCall]
        for one, weight in zip(several, weights, strict=True)
    ]


def check_weights(weights: Any, count: int) -> None:
    """Checks that there is one weight for each of `count` adapters.

    Raises:
        UserError: `weights` is no list, or has another length.
    """
    try:
        given = len(weights)
    except TypeError:
        raise UserError(
            f"weights: expected a list with one number for each adapter, got {weights!r}."
        ) from None
    if given != count:
        raise UserError(f"weights: {given} weights for {count} adapters.")


def make_leaf(tree: dict, adapter: Adapter, path: str, key: Any = None) -> Leaf:
    """Collects the arrays of `adapter` at `path` and the base's leaf there.

    Args:
        tree: Base parameters, with the nodes of earlier adapters.
        adapter: The adapter.
        path: One of its places.
        key: Typed PRNG key of the step, or None.
    """
    base = weight_at(tree, path)
    if key is not None:
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return Leaf(
        path=path,
        base=base,
        params=paths.get(adapter.params, path, {}),
        buffers=paths.get(adapter.buffers, path, {}),
        shared=adapter.params.get(SHARED, {}) | adapter.buffers.get(SHARED, {}),
        options=dict(adapter.spec.options),
        key=key,
        stack=_stack_of(base, path),
        bound=tree,
        bias=adapter.spec.bias_of(path),
        own=not adapter.spec.axes,
    )


def _stack_of(base: Any, path: str) -> tuple[int, ...]:
    """The sizes of the axes over which a weight is stacked."""
    inner = bottom(base)
    if isinstance(inner, Folded):
        return inner.stack
    return (shape_of(base)[0],) if base is not None and paths.is_stacked(path) else ()


def make_leaves(tree: dict, adapter: Adapter, key: Any = None) -> list[Leaf]:
    """Makes the leaf of each of the adapter's places, see `make_leaf`."""
    paths.require_tree(tree)
    return [make_leaf(tree, adapter, path, key) for path in adapter.spec.paths]


def after_others(leaf: Leaf, bound: dict) -> Leaf:
    """The leaf in a tree in which the adapter's places before it are bound.

    A tied head then reads the bound table.
    """
    base = weight_at(bound, leaf.path) if leaf.path == paths.HEAD else leaf.base
    return dataclasses.replace(leaf, base=base, bound=bound)


def check_fit(params: dict, adapter: Adapter) -> None:
    """Checks from names and shapes alone whether an adapter fits a base.

    Args:
        params: Base parameters, or their shapes.
        adapter: The adapter, or its shapes.

    Raises:
        UserError: A leaf of the adapter belongs to no leaf of the base, or to one of another shape;
            or these are several stacked adapters.
    """
    check_leaves(make_leaves(params, adapter), params, adapter)


def check_leaves(leaves: Sequence[Leaf], params: dict, adapter: Adapter) -> None:
    """Does the checks of `check_fit` for leaves that are made already.

    Args:
        leaves: All places of the adapter, perhaps on top of other adapters' nodes.
        params: Base parameters.
        adapter: The adapter; for stacked adapters, the shapes of one.

    Raises:
        UserError: As for `check_fit`.
    """
    kind = KINDS[adapter.spec.kind]
    lost = [leaf.path for leaf in leaves if leaf.base is None]
    if lost and kind.needs_base:
        raise UserError(
            f"the adapter addresses {len(lost)} leaves that this base lacks: {first_few(lost)}; "
            "it was made for another model."
        )
    if extra_axes(adapter) == 1:
        count = jax.tree.leaves(adapter.params)[0].shape[0]
        raise UserError(
            f"{adapter.spec.paths[0]}: {count} stacked adapters; pass index= to say which one each "
            "row of the batch gets, or take one: jax.tree.map(lambda leaf: leaf[0], adapter)."
        )
    for leaf in leaves:
        theirs = kind.leaf_shape(paths.get(adapter.params, leaf.path, {}))
        if leaf.base is not None and theirs is not None and theirs != shape_of(leaf.base):
            raise UserError(
                f"{leaf.path}: the adapter was made for shape {theirs}, this base has "
                f"{shape_of(leaf.base)}; it belongs to another model."
            )
    if kind.check is not None:
        kind.check(params, adapter)
