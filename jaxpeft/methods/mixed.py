"""Mixed batches: every row of a batch has its own adapter, or none.

Adapters stacked by `jaxpeft.stack_adapters` are bound with an index ``(batch,)``. Each adapted
place holds the arrays of all adapters and, inside the layer, picks those of every row. The
family's own node then runs under ``jax.vmap`` over the rows with the base unbatched. For LoRA:

    y[i] = x[i] W + scale[index[i]] * (x[i] A[index[i]]) B[index[i]],

This takes one product with the base and two batched products for all rows, so the work does not
grow with the number of adapters. Index -1 means no adapter: zeros, the identity in
`jaxpeft.methods.family`. A prefix is picked for every row before the layers run, and rows without
an adapter attend to none.

Reference:
    Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023, https://arxiv.org/abs/2310.18547,
    section 4 (the same sum, gathered in a kernel).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import RANK, Adapter
from jaxpeft.methods.family import Leaf
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import Node, OnBase, Transposed, attend, embed, linear

NOT_STACKED = "index: the adapters are not stacked; use jaxpeft.stack_adapters([...])."


@flax.struct.dataclass
class Mixed(OnBase):
    """A weight with another adapter for each row of a batch.

    Attributes:
        base: The weight without adapters, an array or a node.
        params: Trained arrays of this place, ``(adapters, ...)``.
        buffers: Its frozen arrays, ``(adapters, ...)``.
        shared: ``index``, the adapter of every row ``(batch,)``, and ``arrays``, those that all
            places of an adapter share, ``(adapters, ...)``.
        key: PRNG key of this step and place, or None to drop nothing.
        kind: The family.
        path: The place.
        options: The spec's options.
        attends_base: Whether a tied head reads the base alone, as with the family's own node.
    """

    base: Any
    params: Any
    buffers: Any
    shared: Any
    key: Any = None
    kind: str = flax.struct.field(pytree_node=False, default="")
    path: str = flax.struct.field(pytree_node=False, default="")
    options: tuple = flax.struct.field(pytree_node=False, default=())
    attends_base: bool = flax.struct.field(pytree_node=False, default=False)  # pyright: ignore

    def multiply(self, x: Float[Array, "rows *batch d_in"]) -> Float[Array, "rows *batch d_out"]:
        """Multiplies every row of `x` by that row's weight.

        Raises:
            UserError: The batch has another number of rows than the index.
        """
        return self._by_row(lambda node, row: linear(row, node), x)

    def lookup(self, ids: Int[Array, "rows *batch"]) -> Float[Array, "rows *batch d_model"]:
        """Looks up every row's ids in that row's table.

        Raises:
            UserError: The batch has another number of rows than the index.
        """
        return self._by_row(lambda node, row: embed(row, node), ids)

    def attend(self, x: Float[Array, "rows *batch d_model"]) -> Float[Array, "rows *batch vocab"]:
        """Multiplies every row of `x` by that row's transposed table, in float32.

        Raises:
            UserError: The batch has another number of rows than the index.
        """
        if self.attends_base:
            return attend(x, self.base)
        return self._by_row(lambda node, row: attend(row, node), x)

    def of_row(self, position: Any, index: Any) -> Any:
        """The family's own node for one row, see `jaxpeft.lifting.rows`.

        Args:
            position: The number of the row, for its dropout.
            index: Its adapter, -1 for none.
        """
        behind = len(self.shape) - 2

        def chosen(stored: Any) -> Any:
            return pick(jnp.moveaxis(stored, behind, 0), index[None])[0]

        arrays = jax.tree.map(chosen, (self.params, self.buffers))
        shared = jax.tree.map(lambda stored: pick(stored, index[None])[0], self.shared["arrays"])
        key = self.key
        if key is not None:
            fold = lambda one: jax.random.fold_in(one, position)  # noqa: E731
            key = jax.vmap(fold)(key.reshape(-1)).reshape(key.shape) if behind else fold(key)
        return self._bound(self.base, arrays, shared, key)

    def _bound(self, base: Any, arrays: tuple[dict, dict], shared: dict, key: Any) -> Any:
        """The family's own node for the arrays of one adapter."""
        leaf = Leaf(
            path=self.path,
            base=base,
            params=arrays[0],
            buffers=arrays[1],
            shared=shared,
            options=dict(self.options),
            key=key,
        )
        return KINDS[self.kind].bind(leaf)[self.path]

    def _by_row(self, operation: Callable[[Any, Any], Any], x: Any) -> Any:
        index = self.shared["index"]
        rows = index.shape[0]
        if x.shape[0] != rows:
            raise UserError(f"index: {rows} adapters for a batch of {x.shape[0]} rows.")
        arrays = (self.params, self.buffers, self.shared["arrays"])
        picked = jax.tree.map(lambda stored: pick(stored, index), arrays)
        keys = None if self.key is None else jax.random.split(self.key, rows)

        def run(picked: Any, key: Any, row: Any) -> Any:
            *own, shared = picked
            return operation(self._bound(self.base, tuple(own), shared, key), row)

        return jax.vmap(run)(picked, keys, x)


def pick(stored: Array, index: Int[Array, "rows"]) -> Array:
    """The entries of ``stored`` at ``index``: zeros for -1, NaN for an unknown index."""
    count = stored.shape[0]
    place = jnp.where(index == -1, count, index)
    taken = jnp.take(stored, place, axis=0, mode="fill", fill_value=0)
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return taken
    known = (index >= -1) & (index < count)
    return jnp.where(known.reshape(-1, *[1] * (stored.ndim - 1)), taken, jnp.nan)


def mixed_leaf(leaf: Leaf, adapter: Adapter, probe: dict[str, Any], index: Any) -> dict[str, Any]:
    """The entries of the bound tree at one place of stacked adapters.

    Args:
        leaf: The place, with the stacked arrays.
        adapter: The stacked adapters.
        probe: The entries that the family binds there for a single adapter: shapes are enough.
        index: The adapter of every row ``(batch,)``, -1 for none.

    Raises:
        UserError: The family binds something other than one node, or the base's rows differ
            already.
    """
    under = leaf.base.table if isinstance(leaf.base, Transposed) else leaf.base
    if isinstance(under, Mixed) and not (under is not leaf.base and under.attends_base):
        raise UserError(
            f"index: another adapter with an index changes {leaf.path} already; run one batch for "
            "each adapter."
        )
    kind, index = KINDS[adapter.spec.kind], jnp.asarray(index, jnp.int32)
    if kind.bind_rows is not None:
        arrays = (leaf.params, leaf.buffers)
        params, buffers = jax.tree.map(lambda stored: pick(stored, index), arrays)
        rows = dataclasses.replace(leaf, params=params, buffers=buffers)
        return kind.bind_rows(rows, index != -1)
    node = probe.get(leaf.path)
    acts = isinstance(node, Node) and (
        type(node).multiply is not Node.multiply or type(node).lookup is not Node.lookup
    )
    if set(probe) != {leaf.path} or not acts:
        raise UserError(
            f"index: an adapter of kind {kind.name!r} changes {leaf.path} in a way that "
            "cannot differ from row to row; run one batch for each adapter."
        )
    params, buffers = leaf.params, leaf.buffers
    if leaf.stack:
        behind = len(leaf.stack)
        params, buffers = jax.tree.map(lambda x: jnp.moveaxis(x, 0, behind), (params, buffers))
    mixed = Mixed(
        leaf.base,
        params,
        buffers,
        {"index": index, "arrays": leaf.shared},
        key=leaf.keys(),
        kind=kind.name,
        path=leaf.path,
        options=adapter.spec.options,
        attends_base=bool(getattr(node, "attends_base", False)),
    )
    return {leaf.path: mixed}


def first_of(stacked: Any) -> Any:
    """The shapes of one of several stacked adapters, or of a part of one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def extra_axes(adapter: Adapter) -> int | None:
    """The number of axes in front of an adapter's own: 1 for several stacked adapters.

    None if the family does not tell.
    """
    for path in adapter.spec.paths:
        rank = paths.get(adapter.buffers, f"{path}/{RANK}")
        if rank is not None:
            return rank.ndim - adapter.spec.stack_axes(path)
    arrays = paths.get(adapter.params, adapter.spec.paths[0])
    own = KINDS[adapter.spec.kind].own_axes
    return next((arrays[name].ndim - axes for name, axes in own.items() if name in arrays), None)


def check_index(adapter: Adapter | Sequence[Adapter] | None, index: Any, rows: int) -> np.ndarray:
    """The adapter of every row as an array, checked on the host.

    Args:
        adapter: Stacked adapters.
        index: One number per row, -1 for none.
        rows: The number of rows.

    Returns:
        ``(rows,)``, int32.

    Raises:
        UserError: Adapters are not stacked, or a number is missing or addresses none of them.
    """
    if adapter is None:
        raise UserError("index: there is no adapter; pass adapter=jaxpeft.stack_adapters([...]).")
    if not isinstance(adapter, Adapter):
        raise UserError(NOT_STACKED)
    leaves = jax.tree.leaves((adapter.params, adapter.buffers))
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or extra_axes(adapter) == 0:
        raise UserError(NOT_STACKED)
    chosen = np.asarray(index)
    if chosen.shape != (rows,) or not np.issubdtype(chosen.dtype, np.integer):
        raise UserError(f"index: expected one whole number for each of {rows} rows.")
    wrong = sorted({int(i) for i in chosen if not -1 <= i < count})
    if wrong:
        raise UserError(
            f"index: {wrong[0]} addresses none of {count} adapters; use 0 to {count - 1}, or -1 "
            "for none."
        )
    return chosen.astype(np.int32)
