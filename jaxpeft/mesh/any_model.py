"""The placement of parameters that no rule names: those of models that are not of this package.

With roles, a kernel's outputs are cut over ``tensor`` and its inputs over ``fsdp``, and a table's
rows over ``tensor`` and its columns over ``fsdp``, as for the models of this package. Of several
such axes the largest that divides is cut. If no input divides, ``fsdp`` cuts another axis. Axes of
a stack are never cut, because a loop over layers reads one slice after the other. Biases, norms and
what the roles say nothing about are treated as without roles.

Without roles, the largest axis that divides is cut over ``fsdp``, the first among equals, and
vectors are replicated. Nothing is cut over ``tensor``: a shape does not tell inputs from outputs.
A placement never changes results; it decides memory and traffic alone.
"""

from collections.abc import Iterable, Sequence

from jaxpeft.lifting.roles import BIAS, EMBEDDING, NORM, Role
from jaxpeft.mesh.layouts import Layout, first_match

Axes = tuple[str | None, ...]


def axes_by_role(role: Role, layout: Layout) -> Axes:
    """The mesh axes of a parameter's dimensions by the meaning of its axes.

    Args:
        role: Its row from `jaxpeft.describe`.
        layout: The mesh; its own rules come first, those for the models of this package are not
            asked.
    """
    own = first_match(role.path, layout.rules)
    if own is not None:
        return own
    if role.role in (BIAS, NORM):
        return ()
    if role.axes is None:
        return axes_by_size(role.shape, layout)
    ins, outs = role.axes.ins, role.axes.outs
    if role.role == EMBEDDING:
        ins, outs = outs, ins
    free = [axis for axis in range(len(role.shape)) if axis not in role.axes.stack]
    cuts: dict[int, str] = {}
    if (cut := _largest(role.shape, outs, layout.shape["tensor"])) is not None:
        cuts[cut] = "tensor"
    for axes in (ins, free):
        left = [axis for axis in axes if axis not in cuts]
        if (cut := _largest(role.shape, left, layout.shape["fsdp"])) is not None:
            cuts[cut] = "fsdp"
            break
    return tuple(cuts.get(axis) for axis in range(len(role.shape)))


def axes_by_size(shape: Sequence[int], layout: Layout) -> Axes:
    """The mesh axes of a parameter's dimensions by their sizes; empty for vectors and scalars."""
    if len(shape) < 2:
        return ()
    cut = _largest(shape, range(len(shape)), layout.shape["fsdp"])
    return tuple("fsdp" if axis == cut else None for axis in range(len(shape)))


def _largest(shape: Sequence[int], axes: Iterable[int], shards: int) -> int | None:
    """The largest of some axes that divides into shards; None if there is none, or one shard."""
    fitting = [axis for axis in axes if shape[axis] % shards == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None) if shards > 1 else None
