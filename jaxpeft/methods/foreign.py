"""Trees of models that are not ours, in the form in which methods know a base.

A method asks for kernels ``(*stack, d_in, d_out)`` in nested dicts. `as_base` makes such a tree of
any tree of parameters and the roles of its leaves; `put_back` returns values to a tree of the kind
that was given.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few, nearest
from jaxpeft.lifting import roles as names_of_roles
from jaxpeft.lifting.folded import Axes, Folded, raw_shape
from jaxpeft.lifting.roles import Role, Roles
from jaxpeft.lifting.trees import is_node, named_leaves, with_leaves
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.registry import KINDS

_LEAVES = {
    names_of_roles.KERNEL: "kernel",
    names_of_roles.CONVOLUTION: "kernel",
    names_of_roles.EMBEDDING: "embedding",
    names_of_roles.NORM: "scale",
    names_of_roles.BIAS: "bias",
}
"""By role, what such a leaf is called in models of this package."""


def as_base(params: Any, roles: Roles, embedding: str = "") -> paths.NamedTree:
    """The parameters as nested dicts, kernels and tables folded, with the names of modules.

    Args:
        params: The parameters, or their shapes.
        roles: What `jaxpeft.describe` found.
        embedding: The path of the table whose rows stand for tokens; needed if there are several.

    Raises:
        UserError: The roles are those of another tree, or there is no such table.
    """
    leaves = named_leaves(params)
    if lost := sorted(leaves.keys() ^ roles.keys()):
        raise UserError(
            f"roles: {first_few(lost)} are not in both the parameters and the roles; describe the "
            "model with these parameters."
        )
    rows: dict[str, list[Role]] = {name: [] for name in _LEAVES.values()}
    values = {}
    for path, leaf in leaves.items():
        row = roles[path]
        if raw_shape(leaf) != row.shape:
            raise UserError(f"roles: {path} has shape {row.shape} there, here {raw_shape(leaf)}.")
        values[path] = leaf if row.axes is None or isinstance(leaf, Folded) else row.fold(leaf)
        if row.role in _LEAVES and not (row.role == names_of_roles.EMBEDDING and row.stacked):
            rows[_LEAVES[row.role]].append(row)
    added = rows.pop(_LEAVES[names_of_roles.BIAS])
    sites = {name: dict(_named(some)) for name, some in rows.items()}
    owners = {site.path: name for name, site in sites["kernel"].items()}
    biases = {row.of: row.path for row in added}
    sites[_LEAVES[names_of_roles.BIAS]] = {
        owners[row.of] if biases[row.of] == row.path else row.path: paths.Site(row.path, None, row)
        for row in added
    }
    return paths.NamedTree(
        paths.unflatten(values), sites, _table(rows["embedding"], embedding), biases
    )


def _named(rows: Sequence[Role]) -> Iterator[tuple[str, paths.Site]]:
    """The places of leaves by the names of their modules, or their own where these are the same."""
    counts = collections.Counter(module_name(row.path) for row in rows)
    for row in rows:
        name = module_name(row.path)
        name = row.path.replace("/", ".") if counts[name] > 1 else name
        yield name, paths.Site(row.path, None, row)


def _table(rows: Sequence[Role], embedding: str) -> str:
    known = [row.path for row in rows]
    if embedding and embedding not in known:
        close = nearest(embedding, known) or known
        raise UserError(
            f"embedding: {embedding!r} is no table of this model; tables: {first_few(close, 8)}."
        )
    return embedding or (known[0] if len(known) == 1 else "")


def module_name(path: str) -> str:
    """The name of the module that owns a leaf, with dots.

    Example:
        >>> module_name("layers/attention/query/kernel")
        'layers.attention.query'
    """
    owner, _, last = path.rpartition("/")
    is_leaf = last in ("kernel", "embedding", "bias", "scale", "weight")
    return (owner if owner and is_leaf else path).replace("/", ".")


def with_axes(adapter: Adapter, base: paths.NamedTree, roles: Roles, tied: bool) -> Adapter:
    """The adapter with what it needs to know of the model, see `jaxpeft.methods.adapter.Spec`.

    Args:
        adapter: A new adapter for `base`.
        base: From `as_base`.
        roles: What `jaxpeft.describe` found.
        tied: Whether tables that are kernels, too, may be adapted, for both uses.

    Raises:
        UserError: Such a table is adapted and may not be, or may be and is not.
    """
    kind, spec = KINDS[adapter.spec.kind], adapter.spec
    both = [path for path in spec.paths if roles[path].tied and not kind.virtual_tokens(adapter)]
    if both and not (tied or kind.replaces_base):
        raise UserError(
            f"{both[0]}: this table is also a kernel of the model, such as its head, and an "
            "adapter would change both uses; pass tied=True to init_adapter if that is what you "
            "want, or leave the table out."
        )
    if tied and not both:
        raise UserError("tied: no table that is also a kernel is adapted; leave tied out.")
    axes: list[tuple[str, Axes | None]] = []
    for path in spec.paths:
        arrays = paths.get(adapter.params, path, {})
        whole = any(kind.role(name).replaces == "whole" for name in arrays)
        axes.append((path, None if whole else roles[path].axes))
    biases = [(path, base.biases[path]) for path in spec.paths if path in base.biases]
    spec = dataclasses.replace(spec, axes=tuple(axes), biases=tuple(biases))
    return dataclasses.replace(adapter, spec=spec)


def is_foreign(params: Any, adapters: Sequence[Adapter]) -> bool:
    """Whether parameters are no plain nested dicts, or an adapter was made for a foreign model."""
    other_tree = isinstance(params, Mapping) and type(params) is not dict
    return other_tree or any(one.spec.axes for one in adapters)


def as_dicts(params: Any) -> dict:
    """The leaves of any tree in nested dicts, by their paths."""
    return paths.unflatten(named_leaves(params))


def fitted(tree: dict, adapter: Adapter) -> dict:
    """Nested dicts in which the leaves that an adapter is for have the form that it knows.

    For an adapter of a model of this package, that is the tree itself.

    Raises:
        UserError: The tree lacks a leaf, or has one with another number of axes.
    """
    changed = {}
    for path, axes in adapter.spec.axes:
        leaf = paths.get(tree, path)
        if leaf is None or isinstance(leaf, Mapping):
            raise UserError(
                f"the adapter addresses {path}, which this base lacks; it was made for another "
                "model."
            )
        if axes is None:
            changed[path] = leaf.whole() if isinstance(leaf, Folded) else leaf
        elif not is_node(leaf):
            count = len((*axes.ins, *axes.outs, *axes.stack))
            if len(leaf.shape) != count:
                raise UserError(
                    f"{path}: has shape {tuple(leaf.shape)}, but the adapter was made for {count} "
                    "axes; it belongs to another model."
                )
            changed[path] = Folded(leaf, axes)
    return paths.put(tree, changed) if changed else tree


def put_back(params: Any, tree: Mapping[str, Any]) -> Any:
    """A tree of the kind of `params` with the leaves of nested dicts; folded ones are unfolded."""
    before = named_leaves(params)
    leaves = {
        path: before[path] if isinstance(leaf, Folded) else leaf
        for path, leaf in paths.flatten(tree).items()
    }
    return with_leaves(params, leaves)
