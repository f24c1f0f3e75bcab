"""Bounds on the results of the filters, tests and functions that a chat template uses.

As in `jaxpeft.data.templates.bounds`, everything is measured before it runs.
"""

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Environment
from jinja2.filters import make_attrgetter
from jinja2.tests import TESTS

from jaxpeft.data.templates.bounds import Names, Values, count_parts, percent, replacing, whole
from jaxpeft.data.templates.limits import MAX_CHARS, Budget


def tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON like the filter of transformers, which does not escape HTML characters."""
    weight = budget.weigh(value)
    budget.expect(weight)
    options: dict[str, Any] = {
        "ensure_ascii": ensure_ascii,
        "indent": indent,
        "separators": separators,
        "sort_keys": sort_keys,
    }
    width = indent if isinstance(indent, int) else 0
    for text in (indent, *(separators or ())):
        width = max(width, len(text) if isinstance(text, str) else 0)
    budget.expect(width)
    # Each item weighs at least 4, each level of nesting 6, and each item is indented.
    if weight * weight * width // 24 <= MAX_CHARS:
        return json.dumps(value, **options)
    pieces, total = [], 0
    for piece in json.JSONEncoder(**options).iterencode(value):
        budget.tick()
        total += len(piece)
        if total > MAX_CHARS:
            budget.expect(total)
        pieces.append(piece)
    return "".join(pieces)


def lorem_ipsum(budget: Budget, args: Values, kwargs: Names) -> None:
    """Bounds the function ``lipsum``."""
    paragraphs = whole(args, kwargs, 0, "n", 5)
    words = whole(args, kwargs, 3, "max", 100)
    budget.expect(200 * max(1, paragraphs) * max(1, words))


# Bounds of filters take the value and the arguments, and return the value to filter.


def _join(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    separator = args[0] if args else kwargs.get("d", "")
    items = budget.items(value)
    budget.tick(len(items))
    size = budget.weigh(separator) if separator != "" else 0
    budget.expect(sum(map(budget.weigh, items)) + size * len(items))
    return items


def _replace(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    text = budget.text(value)
    old = args[0] if args else kwargs.get("old")
    new = args[1] if len(args) > 1 else kwargs.get("new")
    count = whole(args, kwargs, 2, "count", -1)
    replacing(budget, text, budget.text(old), budget.text(new), count)
    return value


def _center(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    budget.expect(max(budget.weigh(value), whole(args, kwargs, 0, "width", 80)))
    return value


def _indent(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    width = args[0] if args else kwargs.get("width", 4)
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    text = budget.text(value)
    budget.expect(len(text) + (2 + count_parts(text, "splitlines", (), {})) * max(0, size))
    return value


def _wordwrap(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    text = budget.text(value)
    width = max(1, whole(args, kwargs, 0, "width", 79))
    end = args[2] if len(args) > 2 else kwargs.get("wrapstring")
    lines = 1 + text.count("\n") + min(len(text), 2 * len(text) // width)
    budget.spend(20 * len(text) + sum(len(word) ** 2 for word in text.split()) // width)
    budget.expect(len(text) + lines * (len(end) if isinstance(end, str) else 1))
    return value


def _batch(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    if len(args) > 1 or kwargs.get("fill_with") is not None:
        budget.expect_items(whole(args, kwargs, 0, "linecount", 0))
    return value


def _slice(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    budget.expect_items(whole(args, kwargs, 0, "slices", 0))
    return budget.items(value)


def _round(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    if isinstance(value, (str, bytes, list, tuple)):
        raise TypeError(f"round takes a number, not {type(value).__name__}")
    budget.expect_bits(4 * abs(whole(args, kwargs, 0, "precision", 0)))
    return value


def _format(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    percent(budget, budget.text(value), dict(kwargs) or args)
    return value


def _striptags(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    text = budget.text(value)
    budget.spend(10 * len(text) * (1 + text.count("<!--") + text.count("<")))
    return value


def _urlize(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
    text = budget.text(value)
    budget.spend(sum(10 + len(word) ** 2 for word in text.split()))
    return value


def _times(factor: int) -> Callable[[Budget, Any, Values, Names], Any]:
    """The bound of a filter that takes `factor` times as long as copying its text."""

    def bound(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
        budget.expect(budget.weigh(value))
        budget.spend((factor - 1) * budget.weigh(value))
        return value

    return bound


def _listed(factor: int) -> Callable[[Budget, Any, Values, Names], Any]:
    """The bound of a filter that makes a list of its input and compares the items."""

    def bound(budget: Budget, value: Any, args: Values, kwargs: Names) -> Any:
        if isinstance(value, Mapping) or not isinstance(value, Iterable):
            budget.spend(factor * budget.weigh(value))
            return value
        items = budget.items(value)
        budget.tick(factor * len(items) // 2)
        budget.spend(factor * budget.weigh(items))
        return items

    return bound


BOUNDS: dict[str, Callable[[Budget, Any, Values, Names], Any]] = {
    "batch": _batch,
    "center": _center,
    "dictsort": _listed(20),
    "e": _times(2),
    "escape": _times(2),
    "forceescape": _times(2),
    "format": _format,
    "groupby": _listed(20),
    "indent": _indent,
    "join": _join,
    "list": _listed(1),
    "max": _listed(2),
    "min": _listed(2),
    "pprint": _times(200),
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sort": _listed(20),
    "string": _times(1),
    "striptags": _striptags,
    "title": _times(10),
    "truncate": _times(1),
    "urlencode": _times(20),
    "urlize": _urlize,
    "wordcount": _times(10),
    "wordwrap": _wordwrap,
    "xmlattr": _times(20),
}
"""Bounds of the filters whose results can be larger than their input, or that take long."""


CHEAP_FILTERS = frozenset({"abs", "attr", "count", "d", "default", "first", "length", "random"})
"""Filters that look at a single item only and need no bound."""


def summed(
    budget: Budget, environment: Environment, values: Any, attribute: Any = None, start: Any = 0
) -> Any:
    """The filter ``sum``; adding lists copies everything that was added before."""
    items = budget.items(values)
    budget.tick(len(items))
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    total = 0
    for item in (start, *items):
        if isinstance(item, (list, tuple)):
            total += len(item)
            budget.expect_items(total)
    return budget.made(sum(items, start))


def _compare(budget: Budget, left: Any, right: Any = None) -> None:
    budget.read(left)
    budget.read(right)


def _remainder(budget: Budget, value: Any, by: Any = 2) -> None:
    if isinstance(value, (str, bytes)):
        percent(budget, value, by)


def _case(budget: Budget, value: Any) -> None:
    budget.text(value)


_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)

TEST_BOUNDS: dict[str, Callable[..., None]] = {
    name: _compare for name, test in TESTS.items() if test in _COMPARISONS
} | {
    "in": _compare,
    "odd": _remainder,
    "even": _remainder,
    "divisibleby": _remainder,
    "lower": _case,
    "upper": _case,
}
"""Bounds of the tests that read whole values."""
