"""LoRA and DoRA on the embedding table.

A table ``E`` of shape ``(vocab, d)`` is looked up as ``E + scale * A @ B`` with
``A: (vocab, rank)``, ``B: (rank, d)``: ``E[i] + scale * (A[i] @ B)``. Here A starts at zero and B
at random normal numbers, the reverse of a kernel's factors. There is no dropout.

Only look-ups change. A tied head still scores with the base's rows, as in HF PEFT, unless the head
is adapted as well with factors of its own. Merging such a table gives the model a separate head.
The table of a model that is not ours can have no second head, so there the change is that of both
uses.

With DoRA there is a magnitude for each of the ``d`` columns.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685, section 4.1.
    HF PEFT 0.21, ``tuners/lora/layer.py``, ``Embedding``.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.lifting.folded import Folded, bottom
from jaxpeft.methods.family import Leaf
from jaxpeft.methods.lora import dora
from jaxpeft.methods.lora.nodes import product_of
from jaxpeft.ops.linear import OnBase, attend, embed, materialize

HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class LoRATable(OnBase):
    """A frozen table with its low-rank factors.

    Attributes:
        base: ``(vocab, d_model)``, an array or a node.
        a: ``(vocab, rank)``, float32.
        b: ``(rank, d_model)``, float32.
        scale: Scalar.
        tied: Whether scores see the change, too.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    tied: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def attends_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether scores are those of the base's rows."""
        return not self.tied

    def branch(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """The change of the rows; zero for ids of virtual tokens, which are beyond the table."""
        low = (jnp.take(self.a, ids, axis=0, mode="clip") @ self.b) * self.scale
        return jnp.where((ids < self.a.shape[0])[..., None], low, 0.0)

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of ``base + scale * a @ b`` in the dtype of the base, rounded once."""
        rows = embed(ids, self.base)
        return (rows.astype(self.a.dtype) + self.branch(ids)).astype(rows.dtype)

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of the base's rows, in a tied table of the changed ones; in float32."""
        scores = attend(x, self.base)
        if not self.tied:
            return scores
        low = (x.astype(self.b.dtype) @ self.b.T) * self.scale
        return scores + low @ self.a.T

    def materialize(self) -> Float[Array, "vocab d_model"]:
        """``base + scale * a @ b`` in float32, rounded to the base's dtype."""
        product = jnp.matmul(self.a, self.b, precision=HIGHEST)
        total = materialize(self.base).astype(jnp.float32) + self.scale * product
        return total.astype(self.dtype)

    def product(self) -> tuple[np.ndarray, np.ndarray] | None:
        """See `OnBase.product`."""
        return product_of(self.a, self.b, self.scale)


@flax.struct.dataclass
class DoRATable(LoRATable):
    """A frozen table with its low-rank factors and magnitudes.

    Attributes:
        m: Magnitudes ``(d_model,)``, float32.
        norm: Norms of the base's columns ``(d_model,)``, float32.
        rank: Scalar; 0 leaves the table as it is.
    """

    m: Any = None
    norm: Any = None
    rank: Any = None

    def factor(self) -> Float[Array, "d_model"]:
        """The factor of every column, see `jaxpeft.methods.lora.dora`."""
        table = materialize(self.base)
        return dora.DoRAKernel(
            table, self.a, self.b, self.m, self.norm, self.scale, self.rank
        ).factor()

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of the base's rows, in a tied table of the changed ones; in float32."""
        return super().attend((x * self.factor()).astype(x.dtype) if self.tied else x)

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of ``g * (base + scale * a @ b)`` in the dtype of the base, rounded once."""
        rows = embed(ids, self.base)
        known = (ids < self.a.shape[0])[..., None]
        g = jnp.where(known, self.factor(), 1.0)
        return (g * (rows.astype(self.a.dtype) + self.branch(ids))).astype(rows.dtype)

    def materialize(self) -> Float[Array, "vocab d_model"]:
        """``g * (base + scale * a @ b)`` in float32, rounded to the base's dtype."""
        return dora.DoRAKernel(
            materialize(self.base), self.a, self.b, self.m, self.norm, self.scale, self.rank
        ).materialize()

    def product(self) -> None:
        """None, because the magnitudes change the base too."""


def start(
    key: jax.Array, shape: tuple[int, ...], rank: int, width: int
) -> tuple[Float[Array, "vocab width"], Float[Array, "width d_model"]]:
    """Factors of a new adapter of a table: A is zero, B is normal, and zero beyond the rank."""
    vocab, d_model = shape
    b = jax.random.normal(key, (width, d_model))
    return jnp.zeros((vocab, width)), jnp.where(jnp.arange(width)[:, None] < rank, b, 0.0)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for the table, adapted with LoRA or DoRA."""
    params, buffers, inner = leaf.params, leaf.buffers, bottom(leaf.base)
    tied = isinstance(inner, Folded) and inner.axes.tied
    parts = leaf.base, params["a"], params["b"], buffers["scale"]
    if not leaf.options.get("dora"):
        return {leaf.path: LoRATable(*parts, tied=tied)}
    node = DoRATable(
        *parts,
        tied=tied,
        m=params["m"],
        norm=buffers["norm"],
        rank=buffers["rank"],
    )
    return {leaf.path: node}
