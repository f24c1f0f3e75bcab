"""Trees of models that are not ours, in the form in which methods know a base.

A method asks for kernels ``(*stack, d_in, d_out)`` in nested dicts. `as_base` makes such a tree of
any tree of parameters and the roles of its leaves; `put_back` returns values to a tree of the kind
that was given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.lifting import roles as names_of_roles
from jaxpeft.lifting.folded import Axes, Folded
from jaxpeft.lifting.roles import Roles
from jaxpeft.lifting.trees import named_leaves, with_leaves
from jaxpeft.methods.adapter import Adapter


def as_base(params: Any, roles: Roles) -> paths.NamedTree:
    """The parameters as nested dicts, kernels and tables folded, with the names of modules.

    Raises:
        UserError: The roles are those of another tree.
    """
    leaves = named_leaves(params)
    if lost := sorted(leaves.keys() ^ roles.keys()):
        raise UserError(
            f"roles: {first_few(lost)} are not in both the parameters and the roles; describe the "
            "model with these parameters."
        )
    sites: dict[str, dict[str, paths.Site]] = {"kernel": {}, "bias": {}}
    values = {}
    for path, leaf in leaves.items():
        role = roles[path]
        if tuple(leaf.shape) != role.shape:
            raise UserError(f"roles: {path} has shape {role.shape} there, here {leaf.shape}.")
        is_weight = role.role in (names_of_roles.KERNEL, names_of_roles.EMBEDDING)
        values[path] = Folded(leaf, role.axes) if is_weight and role.axes else leaf
        if role.role in sites:
            sites[role.role][module_name(path)] = paths.Site(path, None)
    return paths.NamedTree(paths.unflatten(values), sites)


def module_name(path: str) -> str:
    """The name of the module that owns a leaf, with dots.

    Example:
        >>> module_name("layers/attention/query/kernel")
        'layers.attention.query'
    """
    owner, _, last = path.rpartition("/")
    return (
        owner.replace("/", ".")
        if last in ("kernel", "embedding", "bias")
        else path.replace("/", ".")
    )


def axes_of(adapter: Adapter) -> dict[str, Axes]:
    """The axes of the weights that an adapter of a foreign model was made for, by path."""
    return {path: Axes(*axes) for path, axes in adapter.spec.axes if axes}


def with_axes(roles: Roles, places: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """What an adapter records of its places, see `jaxpeft.methods.adapter.Spec`."""
    found = []
    for path in places:
        axes = roles[path].axes
        found.append((path, () if axes is None else (axes.ins, axes.outs, axes.stack)))
    return tuple(found)


def is_foreign(params: Any, adapters: Sequence[Adapter]) -> bool:
    """Whether parameters are no plain nested dicts, or an adapter was made for a foreign model."""
    other_tree = isinstance(params, Mapping) and type(params) is not dict
    return other_tree or any(one.spec.axes for one in adapters)


def folded_tree(params: Any, adapters: Sequence[Adapter]) -> dict:
    """The leaves of a tree by the adapters' recorded axes, in nested dicts.

    Raises:
        UserError: The tree lacks a leaf, or has one with another number of axes.
    """
    leaves = dict(named_leaves(params))
    for one in adapters:
        for path, axes in axes_of(one).items():
            leaf = leaves.get(path)
            if leaf is None or isinstance(leaf, Folded):
                continue
            count = len((*axes.ins, *axes.outs, *axes.stack))
            if len(leaf.shape) != count:
                raise UserError(
                    f"{path}: has shape {tuple(leaf.shape)}, but the adapter was made for {count} "
                    "axes; it belongs to another model."
                )
            leaves[path] = Folded(leaf, axes)
    return paths.unflatten(leaves)


def unfolded_leaves(base: Mapping[str, Any], merged: Mapping[str, Any]) -> dict:
    """Merged kernels, in nested dicts, in the shapes of the model's own arrays."""
    before, leaves = paths.flatten(base), paths.flatten(merged)
    for path, leaf in leaves.items():
        bottom = before.get(path)
        if isinstance(bottom, Folded) and leaf is not bottom:
            leaves[path] = bottom.unfold(leaf)
    return paths.unflatten(leaves)


def put_back(params: Any, tree: Mapping[str, Any]) -> Any:
    """A tree of the kind of `params` with the leaves of nested dicts; folded ones are unfolded."""
    leaves = {
        path: leaf.raw if isinstance(leaf, Folded) else leaf
        for path, leaf in paths.flatten(tree).items()
    }
    return with_leaves(params, leaves)
