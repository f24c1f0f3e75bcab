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
``through``        ``op(x, w)``             ``through(x, op)``    (*, c_in) -> (*, d_out)
``materialize(w)`` itself                   ``materialize()``     the logical shape
``shape_of(w)``    ``w.shape``              ``shape``             (d_in, d_out), (vocab, d_model)
``dtype_of(w)``    ``w.dtype``              ``dtype``             the dtype of the base
=================  =======================  ====================  =============================

**Layer axis.** Stacked layers put one axis in front of *every* leaf of a node, scalars
included (a scale is an ``(L,)`` array), and ``nn.scan`` slices it off, so inside a layer a node
has no layer axis. `materialize`, `shape_of` and `dtype_of` also accept a whole stack. Arrays that
all layers share (VeRA's matrices) are in a node's field ``shared``: `take_shared` moves them to a
second collection, which ``nn.scan`` broadcasts, and `give_shared` puts them back inside the layer.

**Tied heads.** A model whose head is the embedding table has no ``lm_head/kernel``; `Transposed`
wraps the table as a head's kernel. A node sets ``attends_base`` if `attend` must read the frozen
base although `lookup` reads trained values.

**Changes.** A node that stands for ``base + A @ B`` returns these factors from `OnBase.product`,
so that a conversion need not form the sum.

**dtype.** Results have the dtype of `x`. A table is read in its own dtype, and the caller casts.

A method adds a node class (a node around a base derives from `OnBase`); nothing else changes.
``tests/ops/test_linear.py`` runs every node through scan, remat, vmap, grad and jit, also on a
sharded base.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.ops.products import kept, product, scores

Operation = Callable[[Any, Any], Any]
"""An operation of an input and a kernel that is linear in the kernel, see `Node.through`."""

PRODUCT = "product"
"""The tag of products with kernels, for policies of ``jax.checkpoint``; see `linear`."""

SHARED = "shared"
"""Name of the collection, the field and the tree key for arrays that all layers share."""

CAPTURE = "capture"
"""The collection in which linear modules store their inputs while it is mutable."""


class Node:
    """Base class of weights that are more than an array. See the module's table.

    Attributes:
        attends_base: Whether `attend` reads the frozen base alone. Trained values in the table then
            do not affect a tied head.
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

    def through(self, x: Any, operation: Operation) -> Any:
        """The result of an operation that is linear in the weight, such as a convolution.

        Args:
            x: The operation's other input.
            operation: ``operation(x, kernel)`` takes a kernel ``(d_in, n)`` for any ``n``, and
                gives a result ``(*, n)`` in the dtype of `x`.

        Raises:
            TypeError: The node's class does not define `materialize`.
        """
        return operation(x, self.materialize())

    def materialize(self) -> Float[Array, "..."]:
        """The weight as one array.

        Raises:
            TypeError: The node's class does not define it.
        """
        raise self._unsupported("materialize")

    def __jax_array__(self) -> Any:
        """Not an array; `jax.numpy` asks for it.

        Raises:
            TypeError: Always; the message has the way out.
        """
        raise _no_array(self)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Not an array; NumPy asks for it.

        Raises:
            TypeError: Always; the message has the way out.
        """
        raise _no_array(self)

    def __getattr__(self, name: str) -> Any:
        """What arrays have and a node has not.

        Raises:
            AttributeError: Always.
        """
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        raise AttributeError(str(_no_array(self)))

    def _unsupported(self, operation: str) -> TypeError:
        return TypeError(f"{type(self).__name__} does not support {operation!r}.")


def _no_array(node: Node) -> TypeError:
    return TypeError(
        f"a {type(node).__name__} reached code that expects an array: the model does not know "
        "adapters; wrap its function, as in jp.lift(module.apply)"
    )


def _refuse(node: Node, *operands: Any) -> Any:
    raise _no_array(node)


_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "pow", "mod", "floordiv")
for _name in _OPERATORS:
    setattr(Node, f"__{_name}__", _refuse)
    setattr(Node, f"__r{_name}__", _refuse)
for _name in ("__getitem__", "__neg__", "__iter__", "__len__"):
    setattr(Node, _name, _refuse)


class OnBase(Node):
    """A node around another weight, its `base`, with the shape and dtype of that weight.

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
    """Multiplies activations ``(*, d_in)`` with a kernel of logical shape ``(d_in, d_out)``.

    Every product is tagged `PRODUCT`. A remat policy that saves that name lets the backward pass
    reuse the product instead of multiplying again. A node tags whatever its own gradient needs.
    """
    y = kernel.multiply(x) if isinstance(kernel, Node) else product(x, kernel.astype(x.dtype))
    return kept(y, PRODUCT)


def embed(ids: Int[Array, "*batch"], table: Any) -> Float[Array, "*batch d_model"]:
    """Looks ids up in a table ``(vocab, d_model)``; the data pipeline has checked the ids."""
    if isinstance(table, Node):
        return table.lookup(ids)
    return jnp.take(table, ids, axis=0, mode="clip")


def attend(x: Float[Array, "*batch d_model"], table: Any) -> Float[Array, "*batch vocab"]:
    """Scores of all rows of a tied table, in float32."""
    if isinstance(table, Node):
        return table.attend(x)
    return scores(x, table.astype(x.dtype))


def through(x: Any, weight: Any, operation: Operation) -> Any:
    """The result of an operation that is linear in a weight, see `Node.through`."""
    return weight.through(x, operation) if isinstance(weight, Node) else operation(x, weight)


def materialize(weight: Any) -> Any:
    """The weight as one array of its logical shape, stacked or not.

    A stand-in without values, see `jaxpeft.pretrained.shapes`, is returned as it is.
    """
    return weight.materialize() if isinstance(weight, Node) else weight


def shape_of(weight: Any) -> tuple[int, ...]:
    """The logical shape of a weight."""
    return tuple(weight.shape)


def dtype_of(weight: Any) -> Any:
    """The dtype of a weight, which is the dtype of its innermost base."""
    return weight.dtype


@flax.struct.dataclass
class Transposed(Node):
    """An embedding table used as the kernel of a head.

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
        """Scores of all rows of the table, in the dtype of `x`."""
        return attend(x, self.table).astype(x.dtype)

    def materialize(self) -> Float[Array, "d_model vocab"]:
        """The transpose of the table that `attend` reads."""
        table = self.table
        while getattr(table, "attends_base", False):
            table = table.base
        return materialize(table).T


def take_shared(tree: Mapping) -> tuple[dict, dict]:
    """Moves the arrays that all layers share out of a bound tree.

    Args:
        tree: Nested dicts of arrays and nodes.

    Returns:
        The tree with None in the nodes' fields ``shared``, and a dict from paths to those fields: a
        tuple per path, outermost node first. Places without such fields are left out.
    """
    rest, shared = {}, {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rest[key], inner = take_shared(value)
        else:
            rest[key], inner = take_field(value)
        if inner:
            shared[key] = inner
    return rest, shared


def give_shared(node: Any, shared: tuple) -> Any:
    """Puts back into a node, inside a layer, what `take_shared` moved out of it."""
    if not isinstance(node, Node) or not shared:
        return node
    own, rest = (shared[0], shared[1:]) if hasattr(node, "shared") else (None, shared)
    changes: dict[str, Any] = {} if own is None else {"shared": own}
    if hasattr(node, "base"):
        changes["base"] = give_shared(node.base, rest)  # pyright: ignore
    return node.replace(**changes)  # pyright: ignore[reportAttributeAccessIssue]


def take_field(node: Any) -> tuple[Any, tuple]:
    """A node with None in the fields ``shared`` of its parts, and the tuple of these fields."""
    if not isinstance(node, Node):
        return node, ()
    found, changes = (), {}
    if getattr(node, "shared", None) is not None:
        found, changes["shared"] = (node.shared,), None  # pyright: ignore
    if hasattr(node, "base"):
        changes["base"], inner = take_field(node.base)  # pyright: ignore
        found += inner
    return (node.replace(**changes) if found else node), found  # pyright: ignore
