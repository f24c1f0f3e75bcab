"""The node protocol: how model code uses a weight that may be more than an array.

Model code never multiplies with a weight itself. It calls the functions below, and a weight is
either an array or a `Node`: a small pytree that answers for an adapted (or quantised) weight.
Nodes nest: the ``base`` of a node is again an array or a node.

=================  =======================  ====================  =============================
model code calls   an array does            a node answers        shapes
=================  =======================  ====================  =============================
``linear(x, w)``   ``x @ w``                ``multiply(x)``       (*, d_in) -> (*, d_out)
``embed(ids, t)``  ``t[ids]``               ``lookup(ids)``       (*,) -> (*, d_model)
``attend(x, t)``   ``x @ t.T`` in float32   ``attend(x)``         (*, d_model) -> (*, vocab)
``materialise(w)`` itself                   ``materialise()``     the logical shape
``shape_of(w)``    ``w.shape``              ``shape``             (d_in, d_out), (vocab, d_model)
``dtype_of(w)``    ``w.dtype``              ``dtype``             the dtype of the base
=================  =======================  ====================  =============================

**Layer axis.** Stacked layers put one axis in front of *every* leaf of a node, scalars
included (a scale is an ``(L,)`` array), and ``nn.scan`` slices it off: inside a layer a node
looks as if it had never been stacked. `materialise`, `shape_of` and `dtype_of` also answer for
the whole stack. What all layers share (VeRA's matrices) is a node's field ``shared``: `take_shared`
moves it to a second collection, which ``nn.scan`` broadcasts, and `give_shared` puts it back
inside the layer.

**Tied heads.** A model whose head is the embedding table has no ``lm_head/kernel``; `Transposed`
stands for the table in that role, and a node that is looked up differently from how it is attended
says so with ``attends_base``.

**Changes.** A node that stands for ``base + A @ B`` gives these factors by `OnBase.product`, so
that what converts it need not form the sum.

**dtype.** Results have the dtype of `x`; a table is read in its own dtype and its reader casts.
A method adds a node class (around a base: `OnBase`), nothing else changes;
``tests/ops/test_linear.py`` runs every node through scan, remat, vmap, grad and jit, also on a
sharded base.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.ops.products import kept, product, scores

PRODUCT = "product"
"""Name of products with kernels, for policies of ``jax.checkpoint``; see `linear`."""

SHARED = "shared"
"""What all layers, or all places of an adapter, share: a collection, a field, a key of trees."""

CAPTURE = "capture"
"""The collection in which linear modules keep their inputs, where it is mutable."""


class Node:
    """Base class of weights that are more than an array. See the module's table.

    Attributes:
        attends_base: Whether `attend` reads the frozen base alone: what is trained in the table
            then does not reach a tied head.
    """

    attends_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("shape")

    @property
    def dtype(self) -> Any:
        """The dtype of the weight it stands for.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("dtype")

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x`` times the weight.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("multiply")

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of the table.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("lookup")

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """``x`` times the transposed table, in float32.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("attend")

    def materialise(self) -> Float[Array, "..."]:
        """The weight as one array.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("materialise")

    def _unsupported(self, operation: str) -> TypeError:
        return TypeError(f"{type(self).__name__} does not support {operation!r}.")


class OnBase(Node):
    """A node around another weight, its `base`, whose shape and dtype it has.

    Attributes:
        base: An array or a node.
    """

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return shape_of(self.base)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return dtype_of(self.base)

    def product(self) -> tuple[np.ndarray, np.ndarray] | None:
        """A and B in float64, layers included, if the weight is ``base + A @ B``; else None."""
        return None


def linear(x: Float[Array, "*batch d_in"], kernel: Any) -> Float[Array, "*batch d_out"]:
    """Multiplies activations with a kernel of logical shape ``(d_in, d_out)``.

    What arrays give, and what nodes give, is named `PRODUCT`: under a policy that keeps these names
    the backward pass multiplies with no kernel again. A node names so what its own gradient needs.
    """
    y = kernel.multiply(x) if isinstance(kernel, Node) else product(x, kernel.astype(x.dtype))
    return kept(y, PRODUCT)


def embed(ids: Int[Array, "*batch"], table: Any) -> Float[Array, "*batch d_model"]:
    """Looks ids up in a table ``(vocab, d_model)``; ids are checked in the data pipeline."""
    if isinstance(table, Node):
        return table.lookup(ids)
    return jnp.take(table, ids, axis=0, mode="clip")


def attend(x: Float[Array, "*batch d_model"], table: Any) -> Float[Array, "*batch vocab"]:
    """Scores of all rows of a tied table, in float32."""
    if isinstance(table, Node):
        return table.attend(x)
    return scores(x, table.astype(x.dtype))


def materialise(weight: Any) -> Any:
    """The weight as one array of its logical shape, stacked or not.

    What only stands for a weight, see `jaxpeft.pretrained.shapes`, is given back as it is.
    """
    return weight.materialise() if isinstance(weight, Node) else weight


def shape_of(weight: Any) -> tuple[int, ...]:
    """The logical shape of a weight."""
    return tuple(weight.shape)


def dtype_of(weight: Any) -> Any:
    """The dtype of a weight, that of its innermost base."""
    return weight.dtype


@flax.struct.dataclass
class Transposed(Node):
    """An embedding table in the role of a head's kernel.

    Attributes:
        table: ``(vocab, d_model)``, an array or a node.
    """

    table: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """``(d_model, vocab)``."""
        return shape_of(self.table)[::-1]

    @property
    def dtype(self) -> Any:
        """The dtype of the table."""
        return dtype_of(self.table)

    def multiply(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of all rows, in the dtype of `x`."""
        return attend(x, self.table).astype(x.dtype)

    def materialise(self) -> Float[Array, "d_model vocab"]:
        """The transpose of what `attend` scores with."""
        table = self.table
        while getattr(table, "attends_base", False):
            table = table.base
        return materialise(table).T


def take_shared(tree: Mapping) -> tuple[dict, dict]:
    """Moves what the layers of nodes share out of a bound tree.

    Args:
        tree: Nested dicts of arrays and nodes.

    Returns:
        The tree with None in the nodes' fields ``shared``, and those fields by the same paths: a
        tuple of them, outermost node first. Places without any are left out.
    """
    rest, shared = {}, {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rest[key], inner = take_shared(value)
        else:
            rest[key], inner = _take(value)
        if inner:
            shared[key] = inner
    return rest, shared


def give_shared(node: Any, shared: tuple) -> Any:
    """Puts back what `take_shared` took off a node: the inverse, inside a layer."""
    if not isinstance(node, Node) or not shared:
        return node
    own, rest = (shared[0], shared[1:]) if hasattr(node, "shared") else (None, shared)
    changes: dict[str, Any] = {} if own is None else {"shared": own}
    if hasattr(node, "base"):
        changes["base"] = give_shared(node.base, rest)  # pyright: ignore
    return node.replace(**changes)  # pyright: ignore[reportAttributeAccessIssue]


def _take(node: Any) -> tuple[Any, tuple]:
    if not isinstance(node, Node):
        return node, ()
    found, changes = (), {}
    if getattr(node, "shared", None) is not None:
        found, changes["shared"] = (node.shared,), None  # pyright: ignore
    if hasattr(node, "base"):
        changes["base"], inner = _take(node.base)  # pyright: ignore
        found += inner
    return (node.replace(**changes) if found else node), found  # pyright: ignore
