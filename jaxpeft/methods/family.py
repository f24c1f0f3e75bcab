"""What a family of adapters is: how it is read, bound, merged and written, as one record.

A family is one file: a config class (`Method`), its nodes, and a `Kind` that says how they are
bound. Code outside of the family knows neither the family's name nor the names of its arrays: what
it has to know stands in the `Kind`.

**Identity:** where a place has a buffer ``rank``, a layer of rank 0 whose arrays are all zero is
left as it is, with zero gradients; so layers of a stack that are not adapted stay, and an adapter
of zeros is "no adapter" in a mixed batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ORDINARY, ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.method import Method
from jaxpeft.methods.peft.values import PeftFormat
from jaxpeft.ops.linear import Node, Transposed, materialise

Factors = tuple[np.ndarray, np.ndarray, float]
"""A product ``scale * A @ B`` of one layer: ``A: (d_in, r)``, ``B: (r, d_out)``, and the scale."""

Products = dict[str, list[list[Factors]]]
"""By path, and by layer, the products whose sum is the change of a kernel."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a family sees of one adapted place when it is bound.

    Attributes:
        path: The place.
        base: The base's leaf there: an array, a node, or None where the base has none.
        params: The adapter's trained arrays of this place.
        buffers: Its frozen arrays.
        shared: Trained and frozen arrays that all places share.
        options: The spec's options as a dict.
        key: Typed PRNG key of this step and place, or None to drop nothing.
        layers: How many layers the arrays are stacks of, None where they are not stacked.
        bound: The tree as bound so far, for neighbours such as a kernel's bias.
    """

    path: str
    base: Any
    params: dict
    buffers: dict
    shared: dict
    options: dict
    key: Any = None
    layers: int | None = None
    bound: dict = dataclasses.field(default_factory=dict)

    def beside(self, name: str) -> str:
        """The path of another leaf of the same module: ``beside("bias")``."""
        return f"{self.path.rpartition('/')[0]}/{name}"

    def keys(self) -> Any:
        """The key as every leaf of a node: one a layer where layers are stacked; None stays."""
        if self.key is None or self.layers is None:
            return self.key
        return jax.random.split(self.key, self.layers)


def weight_at(params: Mapping, path: str) -> Any:
    """The base's leaf at a path, for the head of a tied model the table's transpose; or None."""
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
    """The usual way to merge: every bound node as the matrix it stands for, by path."""
    del leaf
    return {
        path: jax.jit(materialise)(node) if isinstance(node, Node) else node
        for path, node in nodes.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How one family of adapters is read: pure functions of a place.

    Attributes:
        config: The family's config class; its ``name`` is the kind's.
        bind: What stands in the bound tree, by path: usually ``{leaf.path: node}``.
        leaf_shape: The shape, layer axis included, of the base leaf that a place's trained arrays
            belong to; None where any fits.
        config_of: The config that describes an adapter, rebuilt from its spec and buffers.
        arrays: By the name of a place's array what it is to code outside of the family, see
            `ArrayRole`. Arrays without any of these properties are left out.
        bind_rows: For families whose `bind` leaves no node that a mixed batch could map over its
            rows: ``bind_rows(leaf, used)`` gives the same from arrays with an axis of rows in
            front; `used` says which rows have an adapter at all. See `jaxpeft.methods.mixed`.
        own_axes: Names of arrays of a place and how many axes each has in a single adapter, for
            families without a buffer ``rank``: it tells stacked adapters.
        needs_base: Whether nodes hold the base's leaf; where not, the base may lack it.
        replaces_base: Whether an adapter stands in for every leaf of the base, so that a run does
            not hold the base's own beside it.
        merge: Merged arrays by path, from a place and its nodes.
        no_merge: Why adapters of this family cannot be merged, "" if they can.
        weigh: ``weigh(adapter, weight)``: the adapter with its change of the model multiplied by a
            scalar; None where that has no meaning.
        products: ``products(adapter)``: the adapter's change as a sum of products, which can be
            combined with others. It raises a UserError for an adapter whose change is no such sum;
            None where that is so for all adapters of the family. It goes with a `leaf_shape`.
        pads_rank: Whether zeros beyond the rank, along the axes that `arrays` declares, change
            neither what an adapter computes nor how it trains. Adapters of several ranks are then
            padded to one.
        lora_fa: The names of A and B where the change of a kernel is ``scale * A @ B``, for
            LoRA-FA; None for other families.
        compared: Names of frozen arrays that a run that goes on from a saved adapter must find
            there as its config sets them. `RANK` and `SCALE` are compared in any case.
        notes: Options of the spec that say where an adapter comes from and not what it is: they
            are not compared.
        virtual_tokens: How many virtual tokens an adapter puts in front of every segment.
        offset: How many positions an adapter takes in front of every segment beside its virtual
            tokens, without a slot of the input.
        check: ``check(params, adapter)`` raises a UserError where shapes alone don't tell that an
            adapter fits.
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
    offset: Callable[[Adapter], int] = lambda adapter: 0
    check: Callable[[dict, Adapter], None] | None = None
    peft: PeftFormat | None = None

    @property
    def name(self) -> str:
        """The family's name."""
        return self.config.name

    def role(self, name: str) -> ArrayRole:
        """What a place's array of this name is to code outside of the family."""
        return self.arrays.get(name, ORDINARY)
