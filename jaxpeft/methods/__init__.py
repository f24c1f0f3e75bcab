"""Binds adapters to base parameters, merges them, and lists the methods.

``bind`` is the one place where base and adapter meet, inside the traced function:
``module.apply(bind(params, adapter), tokens)``.
"""

import zlib
from types import ModuleType
from typing import Any

import jax

from jaxpeft import paths
from jaxpeft.errors import UserError, first_few
from jaxpeft.linear import Node, dtype_of, materialise, shape_of
from jaxpeft.methods import full, lora
from jaxpeft.methods.base import Adapter, Method, Spec
from jaxpeft.methods.full import Full
from jaxpeft.methods.lora import LoRA

__all__ = [
    "KINDS",
    "METHODS",
    "Adapter",
    "Full",
    "LoRA",
    "Method",
    "Spec",
    "bind",
    "init_adapter",
    "merge",
]

METHODS: dict[str, Any] = {LoRA.name: LoRA, Full.name: Full}
"""Config class by the name that YAML's ``method.name`` uses."""

KINDS: dict[str, ModuleType] = {LoRA.name: lora, Full.name: full}
"""By ``Spec.kind`` the module that reads such adapters: see `jaxpeft.methods.base.Kind`."""


def init_adapter(method: Method, params: dict, key: jax.Array) -> Adapter:
    """A new adapter of `method` for base `params`.

    Args:
        method: A config such as ``LoRA(rank=16)``.
        params: Base parameters; for methods that draw at random, shapes are enough.
        key: Typed PRNG key (``jax.random.key(0)``).

    Returns:
        An adapter that leaves the model's function unchanged.

    Raises:
        UserError: If a target pattern matches no module.
    """
    return method.init(params, key)


def bind(params: dict, adapter: Adapter | None = None, *, dropout_key: Any = None) -> dict:
    """Builds the variables that ``module.apply`` takes.

    Call it inside the function that is traced or differentiated; it costs nothing there.

    Args:
        params: Base parameters, a nested dict.
        adapter: What to put on them; None gives the base alone.
        dropout_key: Typed PRNG key of this step; None drops nothing, as at inference.

    Returns:
        ``{"params": tree}``, where the adapted leaves are nodes (see `jaxpeft.linear`).

    Raises:
        UserError: If the adapter addresses leaves that the base lacks, or with other shapes.
    """
    if adapter is None:
        return {"params": params}
    check_fit(params, adapter)
    kind, options = KINDS[adapter.spec.kind], dict(adapter.spec.options)
    bound = {}
    for path in adapter.spec.paths:
        key = dropout_key
        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound[path] = kind.bind_leaf(
            paths.get(params, path),
            paths.get(adapter.params, path),
            paths.get(adapter.buffers, path, {}),
            key,
            options,
        )
    return {"params": paths.put(params, bound)}


def merge(params: dict, adapter: Adapter) -> dict:
    """Plain arrays that compute what base and adapter compute together.

    Args:
        params: Base parameters; they stay as they are.
        adapter: An adapter of a mergeable kind.

    Returns:
        A tree like `params`, in its dtypes; leaves that no adapter touches are shared with it.

    Raises:
        UserError: If the adapter does not fit the base.
    """
    merged = paths.flatten(bind(params, adapter)["params"])
    for path, leaf in merged.items():
        if isinstance(leaf, Node):
            merged[path] = jax.jit(materialise)(leaf)
    for path in adapter.spec.paths:
        if (base := paths.get(params, path)) is not None:
            merged[path] = merged[path].astype(dtype_of(base))
    return paths.unflatten(merged)


def check_fit(params: dict, adapter: Adapter) -> None:
    """Raises a UserError unless every leaf of the adapter belongs to a leaf of the base.

    `bind` calls it: it looks at names and shapes only, and costs nothing in a traced function.
    """
    kind = KINDS[adapter.spec.kind]
    lost = [path for path in adapter.spec.paths if paths.get(params, path) is None]
    if lost and kind.NEEDS_BASE:
        raise UserError(
            f"the adapter addresses {len(lost)} leaves that this base lacks: {first_few(lost)}; "
            "it was made for another model."
        )
    for path in adapter.spec.paths:
        base = paths.get(params, path)
        theirs = kind.leaf_shape(paths.get(adapter.params, path))
        if base is not None and theirs != shape_of(base):
            raise UserError(
                f"{path}: the adapter was made for shape {theirs}, this base has "
                f"{shape_of(base)}; it belongs to another model."
            )
