"""Trees of parameters of any library: nested dicts, ``FrozenDict`` and ``nnx.State``."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.dtypes
import jax.numpy as jnp

from jaxpeft.ops.linear import Node

_IN_VARIABLE = "value"


def is_node(value: Any) -> bool:
    """Whether a value is a node."""
    return isinstance(value, Node)


def path_text(keys: Any) -> str:
    """The path of a leaf: names and numbers with "/" between them.

    The collection ``params`` of Linen and the ``value`` inside a variable of NNX are left out.
    """
    names = [_key(key) for key in keys]
    if names and names[0] == "params":
        names = names[1:]
    if keys and type(keys[-1]).__name__ == "GetAttrKey" and names[-1] == _IN_VARIABLE:
        names = names[:-1]
    return "/".join(names)


def _key(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def traced_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype with which JAX traces an array or a shape: 64 bits only if enabled."""
    dtype = leaf.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths; nodes are leaves."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]
    return {path_text(keys): leaf for keys, leaf in found}


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree of the same kind with other leaves at some paths."""
    return map_named(lambda path, leaf: leaves.get(path, leaf), tree)


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of the same kind whose leaves are those of a function of their path and themselves."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(path_text(keys), leaf), tree, is_leaf=is_node
    )


def is_state(tree: Any) -> bool:
    """Whether a tree is an ``nnx.State``; flax.nnx is not imported for that."""
    return type(tree).__module__.startswith("flax.nnx")
