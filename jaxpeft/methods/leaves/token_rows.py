"""Trained rows of an embedding table, and trained columns of a head, for a few tokens.

A table ``E`` of shape ``(vocab, d)`` is used with its rows ``ids`` replaced by trained ones,
``E[ids[i]] = rows[i]``. Neither a copy of the table nor a gradient of its size is made: a look-up
reads the base and the few rows, and a tied head replaces ``n`` of its scores. Rows are kept in
float32 and rounded to the dtype of the table where they are used.

In a separate head with a kernel ``(d, vocab)``, the same rows are columns.
"""

import collections
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.folded import Folded
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Leaf, require_values
from jaxpeft.ops.linear import OnBase, attend, embed, linear, materialize, shape_of

PLACES = (paths.EMBEDDING, paths.HEAD)
"""The weights whose rows may be trained."""

ARRAYS = {
    "rows": ArrayRole(
        replaces="part",
        unreached="the batches so far hold none of these tokens; compare method.token_ids with the "
        "tokens of data.train",
    )
}
"""The roles of trained rows for code outside of their family."""

COMPARED = ("ids",)
"""Buffers that must be equal if a run starts from saved rows."""


@flax.struct.dataclass
class _TokenWeight(OnBase):
    """The common part of a table and a head with trained rows.

    Attributes:
        base: An array or a node.
        rows: ``(n, d_model)``, float32.
        ids: ``(n,)`` tokens, int32, each one once.
        rank: Scalar; 0 leaves the base unchanged.
    """

    base: Any
    rows: Any
    ids: Any
    rank: Any

    def _rounded(self) -> Float[Array, "n d_model"]:
        return self.rows.astype(self.dtype)

    def _places(self, vocab: int) -> Int[Array, "n"]:
        """The ids; if the rank is 0, ids outside of the vocabulary."""
        return jnp.where(self.rank > 0, self.ids, vocab + jnp.arange(self.ids.shape[0]))

    def _replace_scores(
        self, scores: Float[Array, "*batch vocab"], new: Float[Array, "*batch n"]
    ) -> Float[Array, "*batch vocab"]:
        at = scores.at[..., self._places(scores.shape[-1])]
        return at.set(new.astype(scores.dtype), mode="drop", unique_indices=True)


@flax.struct.dataclass
class TokenTable(_TokenWeight):
    """An embedding table ``(vocab, d_model)`` with trained rows."""

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of the base and trained rows, in the dtype of the base.

        Trained rows are selected by a product with zeros and ones, which is exact. Its gradient is
        a product too, and so is deterministic, while a sum of rows would depend on their order.
        """
        rows = embed(ids, self.base)
        chosen = ids[..., None] == self._places(self.shape[0])
        own = jnp.matmul(
            chosen.astype(self.rows.dtype), self.rows, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.where(chosen.any(axis=-1)[..., None], own.astype(rows.dtype), rows)

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of all rows, in float32; a tied head sees the trained rows too."""
        return self._replace_scores(attend(x, self.base), attend(x, self._rounded()))

    def materialize(self) -> Float[Array, "vocab d_model"]:
        """The table as one array, in the dtype of the base."""
        table = materialize(self.base)
        return table.at[self._places(table.shape[0])].set(self._rounded(), mode="drop")


@flax.struct.dataclass
class TokenHead(_TokenWeight):
    """A head's kernel ``(d_model, vocab)`` with trained columns."""

    def multiply(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of all tokens, in the dtype of `x`."""
        return self._replace_scores(linear(x, self.base), attend(x, self._rounded()))

    def materialize(self) -> Float[Array, "d_model vocab"]:
        """The kernel as one array, in the dtype of the base."""
        kernel = materialize(self.base)
        return kernel.at[:, self._places(kernel.shape[1])].set(self._rounded().T, mode="drop")


def check_ids(owner: str, ids: Any) -> tuple[int, ...]:
    """Checks token ids and makes a tuple of them.

    Args:
        owner: The field that holds them; messages begin with it.
        ids: A sequence of whole numbers.

    Raises:
        ValueError: There are no ids, or they are not distinct whole numbers of at least 0.
    """
    try:
        known = tuple(ids)
    except TypeError:
        known = ()
    if not known or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in known):
        raise ValueError(f"{owner} must be whole numbers of at least 0, one or more, got {ids!r}.")
    if twice := [token for token, count in collections.Counter(known).items() if count > 1]:
        raise ValueError(f"{owner}: {twice[0]} is named twice.")
    return known


def start(params: dict, path: str, ids: Sequence[int], owner: str) -> tuple[dict, dict]:
    """Trained and frozen arrays of a new place: the base's own rows.

    Args:
        params: Base parameters.
        path: A table, or the kernel of a head; the head of a tied model has the table's rows.
        ids: Tokens, see `check_ids`.
        owner: The config's field, for errors.

    Returns:
        ``{"rows": (n, d_model)}`` in float32, and ``{"ids": (n,), "rank": 1}``.

    Raises:
        UserError: If an id is beyond the vocabulary, or there are only shapes.
    """
    own = paths.get(params, path)
    kernel = own is not None and not paths.is_table(params, path)
    weight = own if own is not None else paths.get(params, paths.EMBEDDING)
    require_known(ids, shape_of(weight)[1 if kernel else 0], owner)
    require_values(weight, f"{owner}: trained tokens start from rows of the base")
    which = jnp.array(ids, jnp.int32)
    rows = jnp.take(materialize(weight), which, axis=1).T if kernel else embed(which, weight)
    return {"rows": rows.astype(jnp.float32)}, {"ids": which, "rank": jnp.ones((), jnp.int32)}


def require_known(ids: Sequence[int], vocab_size: int, where: Any) -> None:
    """Checks that token ids belong to a vocabulary.

    Raises:
        UserError: An id is not below `vocab_size`; the message begins with `where`.
    """
    if beyond := [token for token in ids if token >= vocab_size]:
        raise UserError(
            f"{where}: token id {beyond[0]} is outside the model's vocabulary of {vocab_size}; "
            f"ids go from 0 to {vocab_size - 1}."
        )


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for the table or the head."""
    node = TokenTable if leaf.is_table else TokenHead
    buffers = leaf.buffers
    return {leaf.path: node(leaf.base, leaf.params["rows"], buffers["ids"], buffers["rank"])}


def check(params: dict, adapter: Adapter) -> None:
    """Checks that all trained rows of an adapter are as wide as those of the base.

    Raises:
        UserError: Rows have another width.
    """
    for path in adapter.spec.paths:
        rows = paths.get(adapter.params, f"{path}/rows")
        if rows is None:
            continue
        weight = paths.get(params, path)
        if isinstance(weight, Folded):
            width = shape_of(weight)[1 if weight.axes.table else 0]
        else:
            width = shape_of(paths.get(params, paths.EMBEDDING))[1]
        if rows.shape[-1] != width:
            raise UserError(
                f"{path}: the adapter has rows of {rows.shape[-1]} numbers, this base has rows of "
                f"{width}; it belongs to another model."
            )


def ids_of(adapter: Adapter, path: str) -> tuple[int, ...]:
    """The token ids of a place."""
    return tuple(np.asarray(paths.get(adapter.buffers, f"{path}/ids")).tolist())
