"""The embedding table with rows of virtual tokens behind those of the vocabulary."""

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpeft.core.errors import UserError
from jaxpeft.methods.family import Leaf
from jaxpeft.ops.linear import OnBase, attend, embed, materialize


@flax.struct.dataclass
class PromptTable(OnBase):
    """An embedding table, extended by the rows of virtual tokens.

    Attributes:
        base: ``(vocab, d_model)``, an array or a node.
        prompt: ``(rows, d_model)``, float32; id ``vocab + i`` is its row ``i``.
    """

    base: Any
    prompt: Any
    attends_base: ClassVar[bool] = True

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of the base and of the prompt, in the dtype of the base.

        Rows of the prompt are selected by a product with zeros and ones, which is exact. Its
        gradient is a product too, and so is deterministic, while a sum of rows would depend on
        their order.
        """
        vocab = self.shape[0]
        rows = embed(jnp.minimum(ids, vocab - 1), self.base)
        chosen = ids[..., None] == vocab + jnp.arange(self.prompt.shape[0])
        virtual = jnp.matmul(
            chosen.astype(self.prompt.dtype), self.prompt, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.where((ids < vocab)[..., None], rows, virtual.astype(rows.dtype))

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of the base's rows; a virtual token is never predicted."""
        return attend(x, self.base)

    def materialize(self) -> Float[Array, "vocab d_model"]:
        """The base's rows."""
        return materialize(self.base)


def bind_rows(leaf: Leaf, rows: Float[Array, "rows d_model"]) -> dict[str, Any]:
    """Extends the table by rows of virtual tokens.

    Raises:
        UserError: The table has such rows already.
    """
    if isinstance(leaf.base, PromptTable):
        raise UserError("two soft prompts cannot stand on one base; pass one of them.")
    return {leaf.path: PromptTable(leaf.base, rows)}
