"""Makes any pure function of a parameter tree accept nodes in the place of parameters: ``lift``.

Reference:
    The JAX authors, "Writing custom Jaxpr interpreters in JAX",
    https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.core.errors import UserError
from jaxpeft.core.notes import note
from jaxpeft.lifting import control, moves, products
from jaxpeft.lifting.coded import Coded
from jaxpeft.lifting.folded import Axes, Folded, bottom, folded
from jaxpeft.lifting.interpreter import Context, interpret
from jaxpeft.lifting.rows import Rows, index_of, map_rows
from jaxpeft.lifting.trees import is_node, path_text, traced_shape
from jaxpeft.lifting.views import UnroutableError, View, fresh
from jaxpeft.ops.linear import shape_of
from jaxpeft.ops.quant import QuantTensor

RULES = {**moves.MOVES, **control.RULES}


def lift(
    function: Callable[..., Any], *, materialize: bool = False, rows: Rows = None
) -> Callable[..., Any]:
    """A function that computes the same, and takes nodes in the place of parameters.

    The function is traced, and every operation that a node enters is answered by the node. No sum
    of a weight and its change is formed. Call it under ``jax.jit``, as the function itself.

    Args:
        function: A pure function of a tree of parameters and other arguments, such as a Linen
            module's ``apply``. For NNX: ``lambda p, rest, x: nnx.merge(graphdef, p, rest)(x)``.
        materialize: Whether a weight may be formed where a node cannot answer for what is done with
            it; a note says where.
        rows: For stacked adapters that were bound with an index: the axis of the batch's rows in
            all inputs and results, or for each positional input its axis, None for one without.

    Returns:
        The function. For arguments without nodes it is `function` itself.

    Raises:
        UserError: A node cannot answer for an operation. The message has the parameter's path, the
            primitive, and the line of the model. Or an array is sharded over Explicit mesh axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxpeft as jp
        >>> params, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
        >>> apply = lambda params, x: x @ params["w"]
        >>> roles = jp.describe(apply, params, x)
        >>> method = jp.LoRA(rank=1, targets="all-linear")
        >>> adapter = jp.init_adapter(method, params, jax.random.key(0), roles=roles)
        >>> jp.lift(apply)(jp.bind(params, adapter)["params"], x)
        Array([[1., 1.]], dtype=float32)
        >>> merged = jp.merge(params, adapter)
    """

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        found, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_node)
        leaves = [leaf for _, leaf in found]
        at = [position for position, leaf in enumerate(leaves) if is_node(leaf)]
        if not at:
            return function(*args, **kwargs)
        names = [path_text(found[position][0][2:]) for position in at]
        mixed = [name for p, name in zip(at, names, strict=True) if index_of(leaves[p]) is not None]
        if mixed and rows is None:
            raise UserError(
                f"lift: {mixed[0]}: every row of the batch has an adapter of its own; say which "
                "axis of the inputs has the rows, as in jp.lift(function, rows=0)."
            )
        if mixed:
            return map_rows(lifted, rows, args, kwargs)
        nodes = [_with_array(leaves[position]) for position in at]
        _require_auto_axes(found)
        stand_ins = [_stand_in(folded(node)) for node in nodes]
        outputs: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            given = list(leaves)
            for position, array in zip(at, arrays, strict=True):
                given[position] = array
            inner_args, inner_kwargs = jax.tree.unflatten(tree, given)
            results, out_tree = jax.tree.flatten(function(*inner_args, **inner_kwargs))
            traced = [isinstance(x, jax.Array) for x in results]
            others = [
                None if is_traced else x for x, is_traced in zip(results, traced, strict=True)
            ]
            outputs[:] = [out_tree, others, traced]
            return [x for x, is_traced in zip(results, traced, strict=True) if is_traced]

        closed = jax.make_jaxpr(flat)(*stand_ins)
        out_tree, others, traced = outputs
        inputs = [fresh(node, name) for node, name in zip(nodes, names, strict=True)]
        context = _Lift(materialize)
        values = iter(interpret(closed.jaxpr, closed.consts, inputs, context))
        final = [
            _output(next(values), leaves, at, inputs, context) if is_traced else x
            for x, is_traced in zip(others, traced, strict=True)
        ]
        return jax.tree.unflatten(out_tree, final)

    return lifted


def _with_array(node: Any) -> Any:
    """The node around a `Folded`; an array of a model of ours has its layers in front."""
    inner = bottom(node)
    if isinstance(inner, Folded):
        return node
    coded = isinstance(inner, QuantTensor)
    if is_node(inner) and not coded:
        raise UserError(f"lift: {type(inner).__name__} is no node around an array.")
    shape = shape_of(inner)
    rank = len(shape)
    axes = Axes((rank - 2,), (rank - 1,), tuple(range(rank - 2)))
    under = Coded(inner, axes, None, shape) if coded else Folded(inner, axes)

    def around(inner: Any) -> Any:
        return inner.replace(base=around(inner.base)) if hasattr(inner, "base") else under

    return around(node)


def _require_auto_axes(found: list[tuple[Any, Any]]) -> None:
    """Checks that no argument is sharded over Explicit axes of a mesh: nodes reshape what they get.

    Raises:
        UserError: One is.
    """
    for keys, leaf in found:
        for array in jax.tree.leaves(leaf):
            if not isinstance(array, jax.Array):
                continue
            axes = [axis for axis in jax.typeof(array).sharding.spec if axis is not None]
            if axes:
                raise UserError(
                    f"lift: {path_text(keys[2:]) or 'an input'} is sharded over the Explicit mesh "
                    f"axis {axes[0]!r}, and nodes know Auto axes only; make the mesh with "
                    "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n)."
                )


def _stand_in(node: Folded) -> Any:
    """The type with which a node is traced; in a ``shard_map`` it says where values differ."""
    if isinstance(node.raw, jax.Array):
        return jax.typeof(node.raw)
    return traced_shape(jax.ShapeDtypeStruct(node.raw_shape, node.dtype))


def _output(value: Any, leaves: list, at: list[int], inputs: list[View], context: Context) -> Any:
    """A result of the function; a parameter that is handed back is the node that was given."""
    if not isinstance(value, View):
        return value
    for position, view in zip(at, inputs, strict=True):
        if value is view:
            return leaves[position]
    return context.force(value, None, "a changed form of it is a result of the function")


class _Lift(Context):
    """Nodes answer; where none can, that is an error or a note."""

    rules = RULES

    def __init__(self, materialize: bool):
        super().__init__()
        self._materialize = materialize
        self._noted: set[str] = set()

    def use(self, eqn: Any, values: list[Any]) -> list[Any]:
        """See `Context.use`."""
        name = eqn.primitive.name
        if name not in products.USES:
            raise UnroutableError("a node has no answer for it")
        return products.USES[name](eqn, values)

    def force(self, view: View, eqn: Any, why: str) -> Any:
        """See `Context.force`.

        Raises:
            UserError: Weights may not be formed.
        """
        where = "" if eqn is None else f", {self.where(eqn)}"
        if not self._materialize:
            raise UserError(
                f"{view.path}{where}: {why}, so its adapter cannot be applied without forming the "
                "whole weight; leave it out of the adapter, or call lift with materialize=True."
            )
        text = f"{view.path}{where}: {why}; the whole weight is formed there."
        if text not in self._noted:
            note(text)
        self._noted.add(text)
        return view.materialize()
