"""The placement of parameters that no rule names: those of models that are not of this package.

With roles, a kernel's outputs are cut over ``tensor`` and its inputs over ``fsdp``, and a table's
rows over ``tensor`` and its columns over ``fsdp``, as for the models of this package. Of several
such axes the largest that divides is cut. If no input divides, ``fsdp`` cuts another axis. Axes of
a stack are never cut, because a loop over layers reads one slice after the other. Of a convolution
the channels that leave are cut and nothing else. Biases and norms are replicated, and for
everything else the rule is that without roles.

Without roles, the last axis is cut over ``fsdp``, or the one before it if the last does not divide,
and vectors are replicated. There flax keeps outputs and inputs, and in front of them stacks, the
windows of convolutions, and positions. These stay whole for another reason, too: a placement should
never change results, but XLA's partitioner was seen to give wrong ones for a dilated convolution
behind which an array of positions was cut. Nothing is cut over ``tensor``: a shape does not tell
inputs from outputs.
"""

from collections.abc import Iterable, Sequence

from jaxpeft.lifting.folded import Folded
from jaxpeft.lifting.roles import BIAS, CONVOLUTION, EMBEDDING, NORM, Role
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
    free = [axis for axis in range(len(role.shape)) if axis not in role.axes.stack]
    if role.role == EMBEDDING:
        ins, outs = outs, ins
    elif role.role == CONVOLUTION:
        ins, free = (), list(outs)
    cuts: dict[int, str] = {}
    if (cut := _largest(role.shape, outs, layout.shape["tensor"])) is not None:
        cuts[cut] = "tensor"
    for axes in (ins, free):
        left = [axis for axis in axes if axis not in cuts]
        if (cut := _largest(role.shape, left, layout.shape["fsdp"])) is not None:
            cuts[cut] = "fsdp"
            break
    return tuple(cuts.get(axis) for axis in range(len(role.shape)))


def folded_axes(leaf: Folded) -> Axes:
    """The mesh axes of a kernel ``(*stack, d_in, d_out)`` that lies folded."""
    return (*(None for _ in leaf.stack), "fsdp", "tensor")


def axes_by_size(shape: Sequence[int], layout: Layout) -> Axes:
    """The mesh axes of a parameter's dimensions by their sizes; empty for vectors and scalars."""
    if len(shape) < 2:
        return ()
    axes = range(len(shape))
    fitting = (axis for axis in (axes[-1], axes[-2]) if shape[axis] % layout.shape["fsdp"] == 0)
    cut = next(fitting, None) if layout.shape["fsdp"] > 1 else None
    return tuple("fsdp" if axis == cut else None for axis in axes)


def _largest(shape: Sequence[int], axes: Iterable[int], shards: int) -> int | None:
    """The largest of some axes that divides into shards; None if there is none, or one shard."""
    fitting = [axis for axis in axes if shape[axis] % shards == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None) if shards > 1 else None
