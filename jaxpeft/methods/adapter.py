"""The adapter: trained arrays, frozen arrays, and the static description that reads them.

An adapter is a separate tree, never spliced into the base:

* ``params``: the trained arrays, which alone are differentiated, optimised and donated;
* ``buffers``: frozen arrays it needs (scales, ranks, dropout rates);
* ``spec``: static and hashable. All numbers are arrays, so adapters that differ in alpha or
  dropout share one compilation and stack under ``jax.vmap``.

Both trees are nested like the base parameters, with one dict of arrays at each adapted place.
Arrays that all places share (VeRA's matrices) are under the key ``shared``.

Each family chooses the names of its arrays, with three exceptions: the buffers `RANK`, `SCALE` and
`DROPOUT` mean the same in every family that has them. The family declares further properties of
its arrays, see `jaxpeft.methods.family.Kind`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

import flax.struct
import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.folded import Axes

RANK = "rank"
"""The buffer with the rank of every layer of a place, 0 for a layer that is not adapted."""

SCALE = "scale"
"""The buffer with the factor of the change of every layer of a place."""

DROPOUT = "dropout"
"""The buffer with the dropout rate of every layer of a place; every run sets its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of an adapter.

    Attributes:
        kind: Name of the method family, a key of ``jaxpeft.methods.registry.KINDS``.
        paths: "/"-joined paths of the adapted places, sorted.
        rank: Inner width to which all layers are padded; 0 for families without one.
        options: Further static choices of the family, as sorted pairs.
        axes: For a model that is not of this package, a pair for each place: its path and what the
            axes of the weight there mean; None for a leaf that is replaced as it is. For a model
            of this package there are no pairs.
        biases: In the same case, pairs of the path of an adapted kernel and that of its bias.
        names: While such an adapter is written for PEFT, pairs of a path and the name of PEFT's
            module, with "{layer}" for the index in a stack.
    """

    kind: str
    paths: tuple[str, ...]
    rank: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    axes: tuple[tuple[str, Axes | None], ...] = ()
    biases: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def stack_axes(self, path: str) -> int:
        """The number of axes over which the weight at a place is stacked."""
        return len(self.stack_positions(path))

    def stack_positions(self, path: str) -> tuple[int, ...]:
        """The axes of the weight at a place over which it is stacked; its arrays' are in front."""
        if not self.axes:
            return (0,) if paths.is_stacked(path) else ()
        axes = dict(self.axes)[path]
        return () if axes is None else axes.stack

    def is_table(self, path: str) -> bool:
        """Whether the weight at a place is an embedding table."""
        if not self.axes:
            return path == paths.EMBEDDING
        axes = dict(self.axes)[path]
        return axes is not None and axes.table

    def bias_of(self, path: str) -> str:
        """The path of the bias that is added to a kernel's products; "" for none."""
        if not self.axes:
            return f"{path.rpartition('/')[0]}/bias"
        return dict(self.biases).get(path, "")


class Label(str):
    """A note about an adapter that never affects equality.

    All labels compare equal, so they do not cause recompilation.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label)

    def __hash__(self) -> int:
        return 0


@flax.struct.dataclass
class Adapter:
    """Trained arrays, frozen arrays and the static description that reads them.

    Attributes:
        params: Nested like the base; at each path of the spec a dict of trained arrays.
        buffers: The same nesting with frozen arrays.
        spec: The static description of the trees.
        base_name: The base it was trained on, as for `jaxpeft.load_model`; "" if unknown.
        base_revision: The base's branch, tag or commit on the hub; "" for none.
        chat: The chat settings of its training, see `jaxpeft.methods.chat_settings`; "" if unknown.
    """

    params: dict
    buffers: dict
    spec: Spec = flax.struct.field(pytree_node=False)
    base_name: Label = flax.struct.field(pytree_node=False, default=Label(""))
    base_revision: Label = flax.struct.field(pytree_node=False, default=Label(""))
    chat: Label = flax.struct.field(pytree_node=False, default=Label(""))

    if TYPE_CHECKING:  # flax adds it

        def replace(self, **updates: Any) -> Self:
            """A copy with other values in some fields."""
            ...

    def __repr__(self) -> str:
        """One line instead of all arrays."""
        sizes = [math.prod(getattr(x, "shape", ())) for x in jax.tree.leaves(self.params)]
        rank = f", rank {self.spec.rank}" if self.spec.rank else ""
        places = f"{len(self.spec.paths)} places"
        return f"Adapter({self.spec.kind}{rank}, {places}, {sum(sizes):,} trained numbers)"


def require_own(adapter: Adapter, what: str) -> None:
    """Checks that an adapter is for a model of this package.

    Args:
        adapter: The adapter.
        what: What is going to be done, for the message.

    Raises:
        UserError: It was made with roles, for another model.
    """
    if adapter.spec.axes:
        raise UserError(
            f"{what}: this adapter was made with roles, for a model that is not of this package; "
            "that is not supported yet. Merge it with jaxpeft.merge, or keep its arrays."
        )


def ranks_at(adapter: Adapter, path: str) -> np.ndarray | None:
    """The rank of every layer at `path`, or None for a family without ranks."""
    rank = paths.get(adapter.buffers, f"{path}/{RANK}")
    return None if rank is None else np.asarray(rank)


def is_named(path: str, *names: str) -> bool:
    """Whether the last part of a path, the name of an array, is one of `names`."""
    return path.rpartition("/")[2] in names


def weigh_scales(adapter: Adapter, weight: Any) -> Adapter:
    """The adapter with all its scales multiplied by `weight`; see `Kind.weigh`."""
    scaled = {
        path: value * weight if is_named(path, SCALE) else value
        for path, value in paths.flatten(adapter.buffers).items()
    }
    return dataclasses.replace(adapter, buffers=paths.unflatten(scaled))
