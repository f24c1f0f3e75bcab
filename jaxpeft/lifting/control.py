"""Rules of the interpreter for control flow that views enter: it is rebuilt by public functions.

The arrays of a node become operands, and the views are made again inside. A view that comes out of
a body as it went in is handed on; any other view that comes out is refused.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpeft.lifting import dialect, views
from jaxpeft.lifting.interpreter import Context, Rule, interpret
from jaxpeft.lifting.views import UnroutableError, View


def _inline(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    closed = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return _within(eqn, closed, values, context)


def _within(eqn: Any, closed: Any, values: Sequence[Any], context: Context) -> list[Any]:
    """Interprets the jaxpr of an equation, closed or open."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
    context.enter(eqn, jaxpr)
    try:
        return interpret(jaxpr, consts, values, context)
    finally:
        context.leave(eqn, jaxpr)


def _checkpoint(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    _require_known(eqn)
    box = _Box(values)

    def body(*arrays: Any) -> list[Any]:
        return box.keep(_within(eqn, eqn.params["jaxpr"], box.unpacked(arrays), context))

    policy, prevent = eqn.params["policy"], eqn.params["prevent_cse"]
    call = jax.checkpoint(body, policy=policy, prevent_cse=prevent)  # pyright: ignore
    return box.results(call(*box.arrays))


def _scan(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    _require_known(eqn)
    num_consts, num_carry = dialect.scan_counts(eqn.params)
    consts, begin = values[:num_consts], values[num_consts : num_consts + num_carry]
    rows = values[num_consts + num_carry :]
    carried = _Carried(begin)
    scanned: list[Any] = []
    makers: list[Callable[[Sequence[Any]], View] | None] = []
    for row in rows:
        arrays, make = views.lead_of(row, 0) if isinstance(row, View) else (row, None)
        scanned.append(arrays)
        makers.append(make)
    handed: dict[int, Any] = {}

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        inside = [
            value if make is None else make(value)
            for value, make in zip(slices, makers, strict=True)
        ]
        results = _within(
            eqn, eqn.params["jaxpr"], [*consts, *carried.all(carry), *inside], context
        )
        kept = []
        for at, y in enumerate(results[num_carry:]):
            if not isinstance(y, View):
                kept.append(y)
                continue
            same = [row for row, given in zip(rows, inside, strict=True) if given is y]
            if not same:
                raise UnroutableError("a loop hands a changed form of it back")
            handed[at] = same[0]
        return carried.arrays(results[:num_carry]), kept

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    after, kept = jax.lax.scan(body, carried.arrays(begin), scanned, **options)
    stacked, ys = iter(kept), range(len(eqn.outvars) - num_carry)
    return [
        *carried.all(after),
        *(handed[at] if at in handed else next(stacked) for at in ys),
    ]


def _while(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    _require_known(eqn)
    params = eqn.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    tests, consts = values[:of_cond], values[of_cond : of_cond + of_body]
    begin = values[of_cond + of_body :]
    carried = _Carried(begin)

    def test(carry: list[Any]) -> Any:
        return _within(eqn, params["cond_jaxpr"], [*tests, *carried.all(carry)], context)[0]

    def body(carry: list[Any]) -> list[Any]:
        inside = [*consts, *carried.all(carry)]
        return carried.arrays(_within(eqn, params["body_jaxpr"], inside, context))

    return carried.all(jax.lax.while_loop(test, body, carried.arrays(begin)))


def _cond(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    _require_known(eqn)
    index, *operands = values
    if isinstance(index, View):
        raise UnroutableError("it decides which branch is taken")
    boxes = [_Box(operands) for _ in eqn.params["branches"]]
    traced: list[_Box] = []

    def branch(box: "_Box", closed: Any, arrays: Sequence[Any]) -> list[Any]:
        kept = box.keep(_within(eqn, closed, box.unpacked(arrays), context))
        traced.append(box)
        if box.handed != traced[0].handed:
            raise UnroutableError("only some branches hand it back")
        return kept

    branches = [
        functools.partial(branch, box, closed)
        for box, closed in zip(boxes, eqn.params["branches"], strict=True)
    ]
    results = jax.lax.switch(index, branches, boxes[0].arrays)
    return traced[0].results(results)


def _refuse_rule(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    raise UnroutableError("a function with a derivative rule of its own takes it")


def _refuse_shard_map(eqn: Any, values: list[Any], context: Context) -> list[Any]:
    raise UnroutableError("it crosses the boundary of a shard_map; call lift inside of it")


class _Carried:
    """Values that a loop carries; the views among them must come out as they went in."""

    def __init__(self, begin: Sequence[Any]):
        self._begin = list(begin)

    def arrays(self, values: Sequence[Any]) -> list[Any]:
        """The values that are really carried.

        Raises:
            UnroutableError: A view has changed.
        """
        for before, now in zip(self._begin, values, strict=True):
            if isinstance(before, View) and now is not before:
                raise UnroutableError("a loop carries it and changes it")
        pairs = zip(self._begin, values, strict=True)
        return [now for before, now in pairs if not isinstance(before, View)]

    def all(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays that are carried, with the views in their places."""
        todo = iter(arrays)
        return [value if isinstance(value, View) else next(todo) for value in self._begin]


class _Box:
    """Values whose views are unpacked into arrays for a call, and made again inside."""

    def __init__(self, values: Sequence[Any]):
        self._values = list(values)
        self._inside: list[Any] = []
        self.arrays: list[Any] = []
        self._trees: list[Any] = []
        self.handed: dict[int, int] = {}
        """By position of a result that is an input view, the position of that input."""
        for value in values:
            leaves, tree = (
                jax.tree.flatten(value.node) if isinstance(value, View) else ([value], None)
            )
            self._trees.append(tree)
            self.arrays.append(leaves)

    def unpacked(self, arrays: Sequence[Sequence[Any]]) -> list[Any]:
        """The values with the arrays of the inside."""
        self._inside = [
            leaves[0]
            if tree is None
            else dataclasses.replace(value, node=jax.tree.unflatten(tree, leaves))
            for value, tree, leaves in zip(self._values, self._trees, arrays, strict=True)
        ]
        return self._inside

    def keep(self, results: Sequence[Any]) -> list[Any]:
        """The results that are arrays; the views among them are noted."""
        kept = []
        for at, result in enumerate(results):
            if not isinstance(result, View):
                kept.append(result)
                continue
            same = [i for i, value in enumerate(self._inside) if value is result]
            if not same:
                raise UnroutableError("a changed form of it is handed back")
            self.handed[at] = same[0]
        self._inside = []  # else values of the trace would outlive it
        return kept

    def results(self, kept: Sequence[Any]) -> list[Any]:
        """All results, views included."""
        todo = iter(kept)
        return [
            self._values[self.handed[at]] if at in self.handed else next(todo)
            for at in range(len(kept) + len(self.handed))
        ]


def _require_known(eqn: Any) -> None:
    """Checks that the equation has the parameters of a version of JAX that is known.

    Raises:
        UnroutableError: It has others.
    """
    if not dialect.is_known(eqn):
        raise UnroutableError(f"this version of JAX has a {eqn.primitive.name} of another form")


RULES: dict[str, Rule] = {
    **dict.fromkeys(dialect.INLINED, _inline),
    dialect.CHECKPOINT: _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _refuse_rule,
    "custom_vjp_call": _refuse_rule,
    "custom_vjp_call_jaxpr": _refuse_rule,
    "shard_map": _refuse_shard_map,
}
"""By name of the primitive."""
