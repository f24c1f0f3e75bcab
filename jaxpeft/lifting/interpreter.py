"""Runs a jaxpr in which some values are views of nodes instead of arrays.

An equation that no view enters runs as it is, as a jaxpr of its own, so custom derivative rules,
effects and source lines survive. For the others there is a rule for each primitive: moves of axes
rewrite the view, products and look-ups are answered by the node, and control flow is rebuilt with
the node's arrays as operands. A primitive without a rule is never passed through.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.core import eval_jaxpr
from jax.extend import source_info_util
from jax.extend.core import DebugInfo, Jaxpr, Literal

from jaxpeft.lifting.views import UnroutableError, View

_ALONE = DebugInfo("lift", "one equation", None, None)


class Context(abc.ABC):
    """What a run of the interpreter does with views that meet an operation.

    Attributes:
        rules: By name of the primitive, what moves a view or rebuilds control flow around it.
    """

    rules: Mapping[str, "Rule"]

    def __init__(self):
        self._calls: list[Any] = []

    def where(self, eqn: Any) -> str:
        """The primitive of an equation, and the line of the model that it comes from."""
        lines = (source_info_util.summarize(one.source_info) for one in (eqn, *self._calls[::-1]))
        line = next((line for line in lines if line.strip(": ")), "a line that is not known")
        return f"{eqn.primitive.name} at {line}"

    @abc.abstractmethod
    def use(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The results of an equation that is no move of axes and no control flow.

        Where a node cannot answer for it, this raises an `UnroutableError`, and the equation gets
        arrays from `force`.
        """

    @abc.abstractmethod
    def force(self, view: View, eqn: Any, why: str) -> Any:
        """The array of a view that no node can answer for.

        Args:
            view: The view.
            eqn: The equation that it enters.
            why: The reason, as a clause.
        """

    def enter(self, eqn: Any, inner: Any) -> None:
        """Called before the jaxpr `inner` of an equation is interpreted."""
        self._calls.append(eqn)

    def leave(self, eqn: Any, inner: Any) -> None:
        """Called after it."""
        self._calls.pop()

    def passed(self, eqn: Any, values: list[Any]) -> None:
        """Called after every equation, with its inputs."""
        del eqn, values


Rule = Callable[[Any, list[Any], Context], list[Any]]
"""The results of an equation for its inputs; it raises an `UnroutableError` if it has none."""


def interpret(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], context: Context
) -> list:
    """The results of a jaxpr for arrays and views.

    Args:
        jaxpr: An open jaxpr.
        consts: Values of its constants.
        arguments: Values of its inputs.
        context: What views do where they meet an operation.

    Returns:
        Arrays, and views for inputs that are handed back.
    """
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
        if any(isinstance(value, View) for value in values):
            stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
                try:
                    rule = context.rules.get(eqn.primitive.name)
                    results = rule(eqn, values, context) if rule else context.use(eqn, values)
                except UnroutableError as why:
                    results = run(eqn, forced(eqn, values, context, str(why)))
        else:
            results = run(eqn, values)
        context.passed(eqn, values)
        known.update(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


def forced(eqn: Any, values: Sequence[Any], context: Context, why: str) -> list[Any]:
    """The values with an array in the place of every view."""
    return [context.force(v, eqn, why) if isinstance(v, View) else v for v in values]


def run(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of one equation for arrays."""
    given = {}
    for variable, value in zip(eqn.invars, values, strict=True):
        if not isinstance(variable, Literal):
            given[variable] = value
    wanted = [v for v in eqn.outvars if not _is_dropped(v)]
    alone = Jaxpr((), list(given), wanted, [eqn], eqn.effects, debug_info=_ALONE)
    found = iter(eval_jaxpr(alone, (), *given.values()))
    return [None if _is_dropped(v) else next(found) for v in eqn.outvars]


def _is_dropped(variable: Any) -> bool:
    return type(variable).__name__ == "DropVar"
