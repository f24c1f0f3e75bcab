"""Combines base and adapter: ``bind`` and ``merge``.

``bind`` is called inside the traced function: ``module.apply(bind(params, adapter), tokens)``.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter, Label
from jaxpeft.methods.family import Leaf, weight_at
from jaxpeft.methods.method import Context, Method
from jaxpeft.methods.mixed import NOT_STACKED, extra_axes, first_of, mixed_leaf
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import SHARED, dtype_of, shape_of, take_shared
from jaxpeft.ops.quant import QuantTensor


def init_adapter(method: Method, base: Any, key: jax.Array, *, batches: Any = None) -> Adapter:
    """A new adapter of `method`.

    Args:
        method: A config such as ``LoRA(rank=16)``.
        base: A `jaxpeft.Model`, or its parameters alone. For random initialisations that need
            nothing else of the model, the shapes of the parameters are enough.
        key: Typed PRNG key (``jax.random.key(0)``).
        batches: Batches for the training step, for initialisations from data.

    Returns:
        An adapter that leaves the model's function unchanged. Exceptions are some soft prompts,
        and LoftQ, which compensates the error of quantising the base.

    Raises:
        UserError: If a target pattern matches no module, or the method needs something that is
            missing.
    """
    if isinstance(base, Mapping):
        return method.init(dict(base), key, Context(batches=batches))
    context = Context(base.config, base.module, base.tokenizer, batches)
    adapter = method.init(base.params, key, context)
    name, revision = Label(base.name), Label(base.revision)
    return dataclasses.replace(adapter, base_name=name, base_revision=revision)


def bind(
    params: dict,
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    weights: Sequence[Any] | None = None,
    index: Any = None,
    dropout_key: Any = None,
) -> dict:
    """Builds the variables that ``module.apply`` takes.

    Call it inside the function that is traced or differentiated; it costs nothing there.

    Args:
        params: Base parameters, a nested dict.
        adapter: One adapter, several, or None for the base alone. Several are applied one after
            the other: changes of a kernel by LoRA add up.
        weights: For several adapters, the factor of each one's change; 1 by default.
        index: For adapters from `jaxpeft.stack_adapters`, the adapter of each row of the batch:
            ``(batch,)`` whole numbers, -1 for none.
        dropout_key: Typed PRNG key of this step; None drops nothing, as at inference.

    Returns:
        ``{"params": tree}``, where the adapted leaves are nodes (see `jaxpeft.ops.linear`). If
        nodes share arrays over all layers, these are in a second collection, ``"shared"``.

    Raises:
        UserError: If the base lacks leaves of an adapter or has other shapes, or if the family
            does not support `weights` or `index`.
    """
    tree, changed = params, {}
    for position, one in enumerate(adapters_of(adapter, weights)):
        key = dropout_key
        if key is not None and position:
            key = jax.random.fold_in(key, position)
        if index is not None and extra_axes(one) == 0:
            raise UserError(NOT_STACKED)
        leaves = make_leaves(tree, one, key)
        _check_leaves(leaves, params, one if index is None else first_of(one))
        _require_unchanged(one, changed)
        for leaf in leaves:
            leaf = _after(leaf, tree)
            kind = KINDS[one.spec.kind]
            nodes = kind.bind(leaf) if index is None else _bind_mixed(leaf, one, index)
            tree = paths.put(tree, nodes)
    tree, shared = take_shared(tree)
    return {"params": tree, SHARED: shared} if shared else {"params": tree}


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


def _require_unchanged(adapter: Adapter, changed: dict[str, bool]) -> None:
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
        layers=shape_of(base)[0] if base is not None and paths.is_stacked(path) else None,
        bound=tree,
    )


def make_leaves(tree: dict, adapter: Adapter, key: Any = None) -> list[Leaf]:
    """Makes the leaf of each of the adapter's places, see `make_leaf`."""
    paths.require_tree(tree)
    return [make_leaf(tree, adapter, path, key) for path in adapter.spec.paths]


def _after(leaf: Leaf, bound: dict) -> Leaf:
    """The leaf in a tree in which the adapter's places before it are bound.

    A tied head then reads the bound table.
    """
    base = weight_at(bound, leaf.path) if leaf.path == paths.HEAD else leaf.base
    return dataclasses.replace(leaf, base=base, bound=bound)


def merge(params: dict, adapter: Adapter | Sequence[Adapter]) -> dict:
    """Merges an adapter into the base: plain arrays that compute the same function.

    Args:
        params: Base parameters; they are not changed.
        adapter: An adapter of a mergeable kind, or several to merge one after the other.

    Returns:
        A tree like `params`, in its dtypes; leaves that no adapter changes are shared with it.
        If a tied table and the head come to differ, there is a new leaf ``lm_head/kernel``.

    Raises:
        UserError: If an adapter does not fit the base or cannot be merged, or a leaf that it
            changes is quantised.
    """
    paths.require_tree(params)
    tree, parted, changed = params, False, {}
    for one in adapters_of(adapter):
        _require_unquantized(params, one)
        kind = KINDS[one.spec.kind]
        if kind.no_merge:
            raise UserError(f"an adapter of kind {kind.name!r} cannot be merged: {kind.no_merge}")
        leaves = make_leaves(tree, one)
        _check_leaves(leaves, params, one)
        _require_unchanged(one, changed)
        if parted and paths.EMBEDDING in one.spec.paths and not unties(params, one):
            raise UserError(
                f"{paths.EMBEDDING}: an adapter before this one leaves the tied head to the base, "
                "and this one does not; put it first."
            )
        merged: dict[str, Any] = {}
        bound = tree
        for leaf in leaves:
            leaf = dataclasses.replace(_after(leaf, bound), bound=paths.put(tree, merged))
            nodes = kind.bind(leaf)
            bound = paths.put(bound, nodes)
            for place, array in kind.merge(leaf, nodes).items():
                before = paths.get(tree, place)
                before = leaf.base if before is None and place == leaf.path else before
                merged[place] = array if before is None else array.astype(dtype_of(before))
        if unties(tree, one) and paths.HEAD not in merged:
            merged[paths.HEAD], parted = paths.get(tree, paths.EMBEDDING).T, True
        tree = paths.put(tree, merged)
    return tree


def _require_unquantized(params: dict, adapter: Adapter) -> None:
    coded = [p for p in adapter.spec.paths if isinstance(paths.get(params, p), QuantTensor)]
    if coded:
        raise UserError(
            f"merge: {len(coded)} kernels of this base are quantised: {first_few(coded)}; merge "
            "into the weights it was made from (load_model without quantization), or call "
            "merge_quantized of jaxpeft.methods.algebra.merge_quantized, which rounds the sum to "
            "codes again."
        )


def unties(params: dict, adapter: Adapter) -> bool:
    """Whether an adapter of a tied model changes the table for look-ups, but not for the head."""
    if paths.get(params, paths.HEAD) is not None or paths.EMBEDDING not in adapter.spec.paths:
        return False
    node = KINDS[adapter.spec.kind].bind(make_leaf(params, adapter, paths.EMBEDDING))
    return bool(getattr(node[paths.EMBEDDING], "attends_base", False))


def check_fit(params: dict, adapter: Adapter) -> None:
    """Checks from names and shapes alone whether an adapter fits a base.

    Args:
        params: Base parameters, or their shapes.
        adapter: The adapter, or its shapes.

    Raises:
        UserError: A leaf of the adapter belongs to no leaf of the base, or to one of another shape;
            or these are several stacked adapters.
    """
    _check_leaves(make_leaves(params, adapter), params, adapter)


def _check_leaves(leaves: Sequence[Leaf], params: dict, adapter: Adapter) -> None:
    """Does the checks of `check_fit` for leaves that are made already.

    Args:
        leaves: All places of the adapter, perhaps on top of other adapters' nodes.
        params: Base parameters.
        adapter: The adapter; for stacked adapters, the shapes of one.
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


def head_is_frozen(params: dict, adapter: Adapter | None, trained: Any = None) -> bool:
    """Whether no weight of the head is trained, so that the loss omits its gradient.

    Args:
        params: Base parameters: arrays, nodes or shapes.
        adapter: The adapter that is trained.
        trained: Base leaves that are trained as well, nested like `params`, None elsewhere.
    """
    head = paths.HEAD if paths.get(params, paths.HEAD) is not None else paths.EMBEDDING
    if trained is not None and paths.get(trained, head) is not None:
        return False
    if adapter is None:
        return True
    if paths.HEAD in adapter.spec.paths:
        return False
    return head not in adapter.spec.paths or unties(params, adapter)
