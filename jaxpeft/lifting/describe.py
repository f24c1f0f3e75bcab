"""Finds from a trace what a model does with each of its parameters: ``describe``.

Nothing is guessed from names or shapes. The model is traced with a view in the place of every
parameter, by the interpreter that `jaxpeft.lift` uses too; what a view meets says what it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, jaxprs_in_params

from jaxpeft.core.errors import UserError
from jaxpeft.lifting import control, moves, roles
from jaxpeft.lifting.folded import Axes, Folded
from jaxpeft.lifting.interpreter import Context, interpret, run
from jaxpeft.lifting.roles import Role, Roles, Uses
from jaxpeft.lifting.trees import is_node, named_leaves, path_text, traced_shape
from jaxpeft.lifting.views import UnroutableError, View, fresh

_MOVES = frozenset(moves.MOVES)
_ROOTS = ("rsqrt", "sqrt")


def describe(function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Roles:
    """What a model does with each of its parameters.

    Args:
        function: A pure function whose first argument is the tree of parameters, as for
            `jaxpeft.lift`.
        params: The parameters, or their shapes.
        args: The function's other arguments, such as a batch; shapes are enough.
        kwargs: Its keyword arguments.

    Returns:
        A row for each parameter, by its path.

    Raises:
        UserError: Two parameters have the same path, or one is a node.

    Example:
        >>> import jax.numpy as jnp
        >>> describe(lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
        ...          jnp.ones((1, 2)))
        parameter  shape  role    all-linear  axes
        b          3      bias                of w
        w          2 x 3  kernel  yes         in 0, out 1
    """
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [path_text(keys) for keys, _ in found]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"describe: two parameters have the path {double!r}.")
    if any(map(is_node, jax.tree.leaves(params, is_leaf=is_node))):
        raise UserError(
            "describe: parameters are quantised or bound to an adapter; describe the model with "
            "its own arrays, or their shapes."
        )
    shapes = [traced_shape(leaf) for _, leaf in found]
    others, other_tree = jax.tree.flatten((args, kwargs))
    traced = [at for at, leaf in enumerate(others) if _has_shape(leaf)]
    inputs = [traced_shape(others[at]) for at in traced]

    def flat(arrays: list[Any], given: list[Any]) -> list[Any]:
        now = list(others)
        for at, leaf in zip(traced, given, strict=True):
            now[at] = leaf
        inner_args, inner_kwargs = jax.tree.unflatten(other_tree, now)
        out = function(jax.tree.unflatten(tree, arrays), *inner_args, **inner_kwargs)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    record = _Record(dict(zip(names, (tuple(one.shape) for one in shapes), strict=True)))

    def walk(arrays: list[Any], given: list[Any]) -> list[Any]:
        closed = jax.make_jaxpr(flat)(shapes, inputs)
        views = [
            fresh(Folded(array, Axes((), (), tuple(range(len(array.shape))))), name)
            for array, name in zip(arrays, names, strict=True)
        ]
        out = interpret(closed.jaxpr, closed.consts, [*views, *given], record)
        return [x.materialize() if isinstance(x, View) else x for x in out]

    jax.eval_shape(walk, shapes, inputs)
    leaves = named_leaves(params)
    return Roles({name: record.role(name, leaves[name]) for name in names})


def _is_whole(eqn: Any) -> bool:
    """Whether every output of a convolution sees all channels."""
    return eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1


def _sums(eqn: Any) -> bool:
    """Whether an equation sums, itself or inside."""
    if eqn.primitive.name in _SUMS:
        return True
    inner = (getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in jaxprs_in_params(eqn.params))
    return any(_sums(one) for jaxpr in inner for one in jaxpr.eqns)


def _turned_tag(tag: tuple[str, str]) -> tuple[str, str]:
    """What is known of a value, after its axes were moved."""
    return ("turned", tag[1]) if tag[0] == "product" else tag


def _has_shape(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


_OWN = ("param", "shifted")
_SUMMED = ("summed", "")
_SUMS = ("reduce_sum", "dot_general")
_ELEMENTWISE = ("add", "sub", "mul", "div")

Tags = frozenset[tuple[str, str]]
"""What is known of a value: ("param", path) for a parameter that was only moved, ("shifted", path)
for one plus a constant, ("scaled", path) for what was multiplied with one of these, ("product",
path) for a product with a kernel, ("turned", path) for such a product whose axes were moved,
("summed", "") for what depends on a sum, ("root", "") for what a root of such a value divides,
("normed", path) for what is normalised and scaled by a parameter."""


class _Record(Context):
    """Notes what views meet; every operation is then done with arrays."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.rules = {**moves.MOVES, **control.RULES, "broadcast_in_dim": self._broadcast}
        super().__init__()
        self._shapes = shapes
        self._uses = {path: Uses() for path in shapes}
        self._tags: dict[Any, Tags] = {}

    def role(self, name: str, leaf: Any) -> Role:
        """The row of a parameter."""
        row = Role(name, tuple(leaf.shape), leaf.dtype, roles.UNUSED)
        return self._uses[name].role(row)

    def use(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Notes the use.

        Raises:
            UnroutableError: Always, so that the operation is done with arrays.
        """
        for at, view in enumerate(values):
            if isinstance(view, View) and eqn.primitive.name not in _ELEMENTWISE:
                self._note(eqn, at, view)
        raise UnroutableError("")

    def force(self, view: View, eqn: Any, why: str) -> Any:
        """The array; what is no use of a known form is noted."""
        if why:
            self._uses[view.path].others.append(f"{self.where(eqn)}: {why}")
        return view.materialize()

    def enter(self, eqn: Any, inner: Any) -> None:
        """What is known of the inputs is known inside."""
        super().enter(eqn, inner)
        if len(inner.invars) == len(eqn.invars):
            for outside, inside in zip(eqn.invars, inner.invars, strict=True):
                self._tags[inside] = self._tags_of(outside)

    def leave(self, eqn: Any, inner: Any) -> None:
        """What is known of the results is known outside."""
        super().leave(eqn, inner)
        if len(inner.outvars) == len(eqn.outvars):
            for outside, inside in zip(eqn.outvars, inner.outvars, strict=True):
                self._tags[outside] = self._tags_of(inside)

    def passed(self, eqn: Any, values: list[Any]) -> None:
        """Carries what is known of the inputs on to the results."""
        name = eqn.primitive.name
        summed = _sums(eqn) or any(_SUMMED in self._tags_of(v) for v in eqn.invars)
        if name in control.RULES:
            for result in eqn.outvars if summed else ():
                self._tags[result] = self._tags_of(result) | {_SUMMED}
            return
        known = [
            frozenset({("param", value.path)}) if isinstance(value, View) else self._tags_of(v)
            for v, value in zip(eqn.invars, values, strict=True)
        ]
        tags: Tags = frozenset()
        if name in _ROOTS:
            tags = frozenset({("root", "")}) if summed else tags
        elif name in _MOVES:
            tags = known[0]
            if name == "transpose":
                tags = frozenset(map(_turned_tag, tags))
        elif name in _ELEMENTWISE:
            tags = self._elementwise(eqn, name, known)
        else:
            is_product = name in ("dot_general", "ragged_dot_general", "conv_general_dilated")
            if is_product:
                tags = frozenset(("product", v.path) for v in values if isinstance(v, View))
            ends = ("scaled",) if is_product else (*_OWN, "scaled")
            for path in (path for one in known for tag, path in one if tag in ends):
                if not any(isinstance(value, View) and value.path == path for value in values):
                    self._uses[path].others.append(self.where(eqn))
        for result in eqn.outvars:
            self._tags[result] = tags | {_SUMMED} if summed else tags

    def _elementwise(self, eqn: Any, name: str, known: list[Tags]) -> Tags:
        """Notes what a parameter is added to or multiplied with."""
        for at, tags in enumerate(known):
            for tag, path in tags:
                if tag in _OWN:
                    return self._met(eqn, name, tag, path, 1 - at, dict(known[1 - at]))
        for at, tags in enumerate(known):
            for path in (path for tag, path in tags if tag == "scaled"):
                divides = name == "mul" or (name == "div" and at == 0)
                # A root of the scaled value itself takes the parameter's size out again.
                if divides and ("root", "") in known[1 - at] and not self._uses[path].others:
                    return self._normed(path)
                self._uses[path].others.append(self.where(eqn))
        if name == "mul":
            return frozenset(tag for tags in known for tag in tags if tag[0] in ("root", "normed"))
        if name == "div" and ("root", "") in known[1]:
            return frozenset({("root", "")})
        return frozenset()

    def _met(
        self, eqn: Any, name: str, tag: str, path: str, other: int, known: dict[str, str]
    ) -> Tags:
        """Notes what one parameter, perhaps shifted, met; gives what is known of the result."""
        uses = self._uses[path]
        if name == "mul" and "root" in known:
            return self._normed(path)
        if name == "add" and tag == "param" and self._fits(path, known.get("normed")):
            uses.norms += 1
        elif name == "add" and tag == "param" and self._product(known):
            uses.biases.append(self._product(known))
        elif name in ("add", "sub") and isinstance(eqn.invars[other], Literal):
            uses.pending.append(self.where(eqn))
            return frozenset({("shifted", path)})
        elif name == "mul" and not known.keys() & {*_OWN}:
            if tag == "param":
                uses.pending.append(self.where(eqn))
            return frozenset({("scaled", path)})
        else:
            uses.others.append(self.where(eqn))
        return frozenset()

    def _product(self, known: dict[str, str]) -> str:
        """The kernel of a product to which a bias can be added, "" for none.

        Outputs of several axes must lie as the kernel has them.
        """
        turned = known.get("turned", "")
        several = turned and any(len(axes.outs) > 1 for axes in self._uses[turned].kernels)
        return known.get("product", "") or ("" if several else turned)

    def _normed(self, path: str) -> Tags:
        """Notes that a parameter scales what is normalised."""
        uses = self._uses[path]
        uses.norms += 1
        del uses.pending[:1]
        return frozenset({("normed", path)})

    def _fits(self, path: str, scale: str | None) -> bool:
        """Whether a parameter has the shape of the one that scales what is normalised."""
        return scale is not None and self._shapes[path] == self._shapes[scale]

    def _broadcast(self, eqn: Any, values: list[Any], context: Context) -> list[Any]:
        """Also repeats a parameter, which is then an array of which its path is known."""
        try:
            return moves.MOVES["broadcast_in_dim"](eqn, values, context)
        except UnroutableError:
            return run(eqn, [values[0].materialize(), *values[1:]])

    def _tags_of(self, variable: Any) -> Tags:
        return (
            frozenset() if isinstance(variable, Literal) else self._tags.get(variable, frozenset())
        )

    def _note(self, eqn: Any, at: int, view: View) -> None:
        """Notes a use that is neither elementwise nor a move."""
        uses, name = self._uses[view.path], eqn.primitive.name
        axes = None
        if name == "dot_general":
            pairs, batches = eqn.params["dimension_numbers"]
            axes = self._axes(view, pairs[at], batches[at])
            into = uses.kernels
        elif name == "ragged_dot_general" and at == 1:
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (_, contracted), _ = numbers.dot_dimension_numbers
            axes = self._axes(view, contracted, numbers.rhs_group_dimensions)
            into = uses.kernels
        elif name == "gather" and at == 0:
            axes = self._axes(view, eqn.params["dimension_numbers"].collapsed_slice_dims, ())
            into = uses.lookups
        elif name == "conv_general_dilated" and at == 1 and _is_whole(eqn):
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            axes = self._axes(view, [d for d in range(len(view.dims)) if d != out], ())
            into = uses.convolutions
        if axes is None or (into is uses.lookups and not axes.outs):
            uses.others.append(self.where(eqn))
        else:
            into.append(axes)

    def _axes(self, view: View, contracted: Sequence[int], batch: Sequence[int]) -> Axes | None:
        """The meaning of a parameter's axes in a product; None if one is contracted in part."""
        ins, stack = view.axes_of(contracted), view.axes_of(batch)
        if ins is None or stack is None:
            return None
        ins, stack = (tuple(view.origin[axis] for axis in axes) for axes in (ins, stack))
        sliced = set(range(len(self._shapes[view.path]))) - set(view.origin)
        outs = tuple(axis for axis in view.origin if axis not in (*ins, *stack))
        return Axes(ins, outs, tuple(sorted(sliced.union(stack))))
