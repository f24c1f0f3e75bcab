"""Trained copies that replace base leaves: the arrays ``{"value": array}``.

Full fine-tuning, LayerNorm tuning and BitFit consist of such copies, and so do LoRA's trained
biases and saved modules. Values are float32 whatever the base's dtype, because an update of 1e-3
would be lost in bfloat16.

If only some layers of a stack are trained, a buffer ``rank`` is 1 for those, and 0 for the others,
which hold zeros and leave the base unchanged.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.folded import Folded
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Leaf, require_values
from jaxpeft.ops.linear import materialize, shape_of
from jaxpeft.ops.quant import is_coded

ARRAYS = {"value": ArrayRole(replaces="whole")}
"""The roles of a trained copy for code outside of its family."""


def replacement(kind: str, leaves: dict[str, Any]) -> Adapter:
    """An adapter whose arrays replace the base leaves at their paths; they are equal at first.

    Raises:
        UserError: There are only shapes, or a leaf is quantised.
    """
    leaves = {path: _as_it_is(leaf) for path, leaf in leaves.items()}
    require_dense(kind, leaves)
    values = {path: {"value": jnp.array(leaf, jnp.float32)} for path, leaf in leaves.items()}
    return Adapter(paths.unflatten(values), {}, Spec(kind=kind, paths=tuple(sorted(leaves))))


def require_dense(kind: str, leaves: Mapping[str, Any]) -> None:
    """Checks that all leaves are arrays that can be trained.

    Args:
        kind: The kind of the adapter, for messages.
        leaves: The base's leaves by path.

    Raises:
        UserError: A leaf is quantised.
    """
    for path, leaf in leaves.items():
        require_values(leaf, f"{path}: {kind!r} starts from the base's own values")
        if is_coded(leaf):
            raise UserError(
                f"{path}: is quantised, and {kind!r} trains it itself; load the base without "
                "quantization."
            )


def _as_it_is(leaf: Any) -> Any:
    """A leaf as the model has it, which is replaced whole."""
    return leaf.raw if isinstance(leaf, Folded) else leaf


def bind_value(leaf: Leaf) -> dict[str, Any]:
    """The trained array itself."""
    return {leaf.path: leaf.params["value"]}


def value_shape(params: dict) -> tuple[int, ...]:
    """The shape of the leaf that is replaced."""
    return tuple(params["value"].shape)


# Some layers of a stack.


def selected_replacement(kind: str, params: dict, sites: Mapping[str, paths.Site]) -> Adapter:
    """An adapter that replaces the chosen layers of base leaves; they are equal at first.

    Args:
        kind: Name of the family.
        params: Base parameters.
        sites: The chosen modules by name, from `jaxpeft.core.paths.match`.

    Returns:
        ``{"value": array}`` with the leaf's shape at each path, zero in layers that are not chosen,
        and the buffer ``rank``.
    """
    values, buffers = {}, {}
    leaves = {site.path: _as_it_is(paths.get(params, site.path)) for site in sites.values()}
    require_dense(kind, leaves)
    params = paths.put(params, leaves)
    for path, rank in selected_layers(params, sites).items():
        base = jnp.asarray(materialize(paths.get(params, path)), jnp.float32)
        values[path] = {"value": jnp.where(_over(rank, base), base, 0.0)}
        buffers[path] = {"rank": rank}
    spec = Spec(kind=kind, paths=tuple(sorted(values)))
    return Adapter(paths.unflatten(values), paths.unflatten(buffers), spec)


def selected_layers(params: dict, sites: Mapping[str, paths.Site]) -> dict[str, jax.Array]:
    """By path, the chosen layers: ``(layers,)`` ones and zeros, or a scalar 1 if not stacked."""
    layers: dict[str, list[int | None]] = {}
    for site in sites.values():
        layers.setdefault(site.path, []).append(site.layer)
    ranks = {}
    for path in sorted(layers):
        if layers[path] != [None]:
            count = shape_of(paths.get(params, path))[0]
            ranks[path] = jnp.zeros(count, jnp.int32).at[jnp.array(layers[path])].set(1)
        else:
            base = paths.get(params, path)
            ranks[path] = jnp.ones(base.stack if isinstance(base, Folded) else (), jnp.int32)
    return ranks


def bind_selected(leaf: Leaf) -> dict[str, Any]:
    """The trained array in layers of rank 1, the base in the others."""
    value, base = leaf.params["value"], jnp.asarray(materialize(leaf.base), jnp.float32)
    return {leaf.path: jnp.where(_over(leaf.buffers["rank"], value), value, base)}


def _over(rank: jax.Array, array: jax.Array) -> jax.Array:
    """The chosen layers as a mask that broadcasts over the arrays of a stack."""
    return (rank > 0).reshape(rank.shape + (1,) * (array.ndim - rank.ndim))
