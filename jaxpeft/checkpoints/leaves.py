"""A training state as named leaves: what is given to Orbax, and how it comes back.

Orbax writes nested dicts of arrays. It joins keys with ".", so that ``{"a.b": x}`` and ``{"a":
{"b": y}}`` silently overwrite each other; it refuses empty arrays and numpy scalars; and it casts
to whatever dtype is asked for. So a state is flattened here into leaves with unambiguous names. The
checkpoint's manifest holds a signature such as ``float32[30,576,8]`` for each, and `check` compares
the signatures before anything is read. Typed PRNG keys are stored as their ``uint32`` data.
``None`` and empty containers have no leaves and are taken from `like`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.errors import CheckpointError, first_few

Leaves = dict[str, Any]


def named_leaves(state: Any) -> Leaves:
    """Flattens a tree into ``{"adapter/layers/q_proj/a": leaf}``.

    Args:
        state: Nested dicts, lists or pytree nodes of jax or numpy arrays and numbers. A list and a
            dict with keys "0", "1", ... give the same names.

    Returns:
        Arrays by name, in tree order; numbers become numpy arrays.

    Raises:
        TypeError: A leaf is not an array or number, or two leaves share a name.
    """
    leaves: Leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = "/".join(_key_text(key).replace("%", "%25").replace("/", "%2F") for key in path)
        if not hasattr(leaf, "shape") or isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            raise TypeError(f"state leaf {name!r} holds {leaf.dtype}; only arrays and numbers do")
        if name in leaves:
            raise TypeError(f"state has two leaves named {name!r}")
        leaves[name] = leaf
    return leaves


def signature(leaf: Any) -> str:
    """Dtype and shape in one string, e.g. ``bfloat16[4,8]``; ``key<fry>[]`` for one PRNG key."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def num_bytes(leaves: Leaves) -> int:
    """The number of bytes that the leaves take in memory."""
    return sum(int(np.prod(v.shape)) * v.dtype.itemsize for v in map(_stored, leaves.values()))


def check(like: Leaves, saved: dict[str, str], where: str) -> None:
    """Compares the leaves that a run wants with the signatures in a checkpoint.

    Args:
        like: Leaves with shape and dtype.
        saved: Signatures by name, from the manifest.
        where: The checkpoint's path, for the error.

    Raises:
        CheckpointError: A leaf is missing, unexpected, or of another shape or dtype.
    """
    wrong = [f"{name} is not in the checkpoint" for name in like if name not in saved]
    wrong += [f"{name} is in the checkpoint but not in this run" for name in saved.keys() - like]
    wrong += [
        f"{name} is {saved[name]} in the checkpoint, {signature(leaf)} in this run"
        for name, leaf in like.items()
        if name in saved and saved[name] != signature(leaf)
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: does not fit this run: {first_few(sorted(wrong))}. Resume with the config "
            "the checkpoint was saved with, or start afresh with --overwrite or another output_dir."
        )


def to_orbax(leaves: Leaves) -> dict[str, Any]:
    """Nested dicts of non-empty arrays, with no "." in a key."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if 0 not in leaf.shape:
            *parents, last = _orbax_keys(name)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = _to_data(leaf)
    return tree


def targets(like: Leaves) -> dict[str, Any]:
    """What Orbax shall load: the tree of `to_orbax`, each leaf a shape, dtype and sharding."""
    return to_orbax({name: _target(leaf) for name, leaf in like.items() if 0 not in leaf.shape})


def from_orbax(tree: dict[str, Any], like: Any) -> Any:
    """Puts loaded arrays into the structure of `like`.

    Leaves that are uncommitted in `like` come back uncommitted, so they can be combined with arrays
    on any mesh.

    Args:
        tree: What Orbax loaded for `targets`.
        like: The tree wanted: arrays, or `jax.ShapeDtypeStruct` with or without a sharding.

    Returns:
        A tree of the structure of `like` with the loaded values.

    Raises:
        CheckpointError: `like` holds a PRNG key of an unknown kind.
    """
    values = []
    for name, leaf in named_leaves(like).items():
        value: Any = tree
        if 0 in leaf.shape:
            value = np.zeros(_stored(leaf).shape, _stored(leaf).dtype)
        else:
            for key in _orbax_keys(name):
                value = value[key]
        values.append(_place(value, leaf))
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _orbax_keys(name: str) -> list[str]:
    return name.replace(".", "%2E").split("/")


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    """The shape and dtype in which a leaf is stored."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _to_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and _is_key(leaf) else leaf


def _target(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = _stored(leaf)
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def _place(value: Any, like: Any) -> Any:
    """A loaded array, converted to the kind and place of `like`."""
    if isinstance(like, np.ndarray):
        return np.asarray(value)
    committed = getattr(like, "committed", getattr(like, "sharding", None) is not None)
    if not committed:
        value = jnp.asarray(np.asarray(value))
    elif isinstance(value, np.ndarray):
        value = jax.device_put(value, like.sharding)
    return jax.random.wrap_key_data(value, impl=_key_impl(like)) if _is_key(like) else value


def _key_impl(like: Any) -> str:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.random.key(0, impl=name).dtype == like.dtype:
            return name
    raise CheckpointError(f"a PRNG key of dtype {like.dtype} cannot be restored; use threefry2x32")
