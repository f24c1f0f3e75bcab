"""A family of adapters as one record: how it is read, bound, merged and written.

A family is one file: a config class (`Method`), its nodes, and a `Kind` that declares how they are
bound. Code outside of the family knows neither the family's name nor the names of its arrays; the
`Kind` holds everything that it needs.

**Identity:** in a place with a buffer ``rank``, a layer of rank 0 whose arrays are all zero must
leave the base unchanged, with zero gradients. So layers of a stack that are not adapted stay as
they are, and an adapter of zeros is "no adapter" in a mixed batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ORDINARY, ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.folded import Folded, bottom
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.method import Method
from jaxpeft.methods.peft.values import PeftFormat
from jaxpeft.ops.linear import Node, Transposed, materialize

Factors = tuple[np.ndarray, np.ndarray, float]
"""A product ``scale * A @ B`` of one layer: ``A: (d_in, r)``, ``B: (r, d_out)``, and the scale."""

Products = dict[str, list[list[Factors]]]
"""By path and by layer, the products whose sum is the change of a kernel."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One adapted place, with the arrays that a family needs to bind it.

    Attributes:
        path: The place.
        base: The base's leaf there: an array, a node, or None if the base has none.
        params: The adapter's trained arrays of this place.
        buffers: Its frozen arrays.
        shared: Trained and frozen arrays that all places share.
        options: The spec's options as a dict.
        key: Typed PRNG key of this step and place, or None to drop nothing.
        stack: The sizes of the axes over which the arrays are stacked; empty for one kernel.
        bound: The tree as bound so far, for neighbours such as a kernel's bias.
        bias: The path of the bias that is added to the kernel's products; "" for none.
        own: Whether the base is a model of this package.
    """

    path: str
    base: Any
    params: dict
    buffers: dict
    shared: dict
    options: dict
    key: Any = None
    stack: tuple[int, ...] = ()
    bound: dict = dataclasses.field(default_factory=dict)
    bias: str = ""
    own: bool = True

    @property
    def is_table(self) -> bool:
        """Whether the place is an embedding table."""
        inner = bottom(self.base)
        if isinstance(inner, Folded):
            return inner.axes.table
        return self.own and self.path == paths.EMBEDDING

    def keys(self) -> Any:
        """The key as a leaf of a node: one key per layer if layers are stacked; None stays None."""
        if self.key is None or not self.stack:
            return self.key
        return jax.random.split(self.key, self.stack)


def weight_at(params: Mapping, path: str) -> Any:
    """The base's leaf at a path, or None; for the head of a tied model, the table's transpose."""
    weight = paths.get(params, path)
    table = paths.get(params, paths.EMBEDDING) if weight is None and path == paths.HEAD else None
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    return weight if table is None else Transposed(table)


def require_values(weight: Any, what: str) -> None:
    """Checks that a weight has values, not only a shape.

    Args:
        weight: An array or a `jax.ShapeDtypeStruct`.
        what: Why the values are needed; the message begins with it.

    Raises:
        UserError: There is only a shape.
    """
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise UserError(f"{what}; pass parameters, not their shapes.")


def merge_leaf(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """The usual way to merge: the matrix of every bound node, by path."""
    del leaf
    return {
        path: jax.jit(materialize)(node) if isinstance(node, Node) else node
        for path, node in nodes.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """The pure functions and properties of one family of adapters.

    Attributes:
        config: The family's config class; its ``name`` is the kind's.
        bind: The entries of the bound tree, by path: usually ``{leaf.path: node}``.
        leaf_shape: The shape, layer axis included, of the base leaf that a place's trained arrays
            belong to; None if any shape fits.
        config_of: The config that describes an adapter, rebuilt from its spec and buffers.
        arrays: The role of a place's arrays for code outside of the family, by name, see
            `ArrayRole`. Arrays without any of these properties are left out.
        bind_rows: For families whose bound value cannot be vmapped over rows. ``bind_rows(leaf,
            used)`` builds one value per row from arrays with a leading row axis; `used` marks rows
            that have an adapter. See `jaxpeft.methods.mixed`.
        own_axes: Number of axes of each array in a single adapter, used to detect stacked adapters
            if there is no ``rank`` buffer.
        needs_base: Whether nodes hold the base's leaf; if not, the base may lack it.
        replaces_base: Whether an adapter replaces every leaf of the base, so that a run does not
            hold the base's own leaves beside it.
        merge: Merged arrays by path, from a place and its nodes.
        no_merge: Why adapters of this family cannot be merged, "" if they can.
        weigh: ``weigh(adapter, weight)`` returns the adapter with its change of the model
            multiplied by a scalar; None if that has no meaning.
        products: ``products(adapter)`` returns the adapter's change as a sum of products, which can
            be combined with others. It raises a UserError for an adapter whose change is no such
            sum; None if that holds for all adapters of the family. It needs a `leaf_shape`.
        pads_rank: Whether zeros beyond the rank, along the axes that `arrays` declares, affect
            neither the result nor the training. Adapters of several ranks are then padded to one.
        lora_fa: For LoRA-FA, the names of A and B if the change of a kernel is ``scale * A @ B``;
            None for other families.
        compared: Names of frozen arrays that must be equal in a saved adapter and in the config of
            a run that starts from it. `RANK` and `SCALE` are compared in any case.
        notes: Options of the spec that record an adapter's origin and are not compared.
        virtual_tokens: The number of virtual tokens that an adapter puts in front of every segment.
        first_virtual_id: The id of its first virtual token, above those of the vocabulary.
        tasks: The number of tasks that have virtual tokens of their own; 0 without tasks.
        offset: The number of positions that an adapter takes in front of every segment without
            slots of the input, beside its virtual tokens.
        check: ``check(params, adapter)`` raises a UserError if an adapter does not fit; for checks
            that need more than shapes.
        peft: How HF PEFT writes such adapters, None if it has none.
    """

    config: type[Method]
    bind: Callable[[Leaf], dict[str, Any]]
    leaf_shape: Callable[[dict], tuple[int, ...] | None] = lambda params: None
    config_of: Callable[[Adapter], Method]
    arrays: Mapping[str, ArrayRole] = dataclasses.field(default_factory=dict)
    bind_rows: Callable[[Leaf, Any], dict[str, Any]] | None = None
    own_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    needs_base: bool = True
    replaces_base: bool = False
    merge: Callable[[Leaf, dict[str, Any]], dict[str, Any]] = merge_leaf
    no_merge: str = ""
    weigh: Callable[[Adapter, Any], Adapter] | None = None
    products: Callable[[Adapter], Products] | None = None
    pads_rank: bool = False
    lora_fa: tuple[str, str] | None = None
    compared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    virtual_tokens: Callable[[Adapter], int] = lambda adapter: 0
    first_virtual_id: Callable[[Adapter], int] = lambda adapter: 0
    tasks: Callable[[Adapter], int] = lambda adapter: 0
    offset: Callable[[Adapter], int] = lambda adapter: 0
    check: Callable[[dict, Adapter], None] | None = None
    peft: PeftFormat | None = None

    @property
    def name(self) -> str:
        """The family's name."""
        return self.config.name

    def role(self, name: str) -> ArrayRole:
        """The role of a place's array of this name for code outside of the family."""
        return self.arrays.get(name, ORDINARY)
