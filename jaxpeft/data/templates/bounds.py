"""Bounds on the results of the operators and methods that a chat template uses.

Each function charges the budget for what will be read and made, and raises `LimitPassed` if that is
too much, before anything is computed. Calls that it does not know are left to the operation itself,
which raises its own errors for wrong arguments.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxpeft.data.templates.limits import MAX_CHARS, Budget

_Text = str | bytes
Values = tuple[Any, ...]
Names = Mapping[str, Any]
_SHORT = 32  # longest text that is searched for as fast as reading
_SLOW_CODECS = ("idna", "punycode")  # their time grows with the square of the length


def add(budget: Budget, left: Any, right: Any) -> Any:
    """Computes ``left + right``."""
    if isinstance(left, str) and isinstance(right, str):
        budget.expect(len(left) + len(right))
        return left + right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.expect_items(len(left) + len(right))
    return budget.made(operator.add(left, right))  # type: ignore[reportArgumentType]


def subtract(budget: Budget, left: Any, right: Any) -> Any:
    """Computes ``left - right``, of numbers or of the keys of two mappings."""
    if type(left) not in (int, float):
        budget.read(left)
        budget.read(right)
    return budget.made(left - right)


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    """Computes ``left * right``, which repeats texts and lists."""
    for one, other in ((left, right), (right, left)):
        if isinstance(other, int) and isinstance(one, (str, bytes, list, tuple)):
            count = len(one) * max(0, other)
            (budget.expect if isinstance(one, (str, bytes)) else budget.expect_items)(count)
            return left * right
    if isinstance(left, int) and isinstance(right, int):
        budget.expect_bits(left.bit_length() + right.bit_length())
    return left * right


def power(budget: Budget, left: Any, right: Any) -> Any:
    """Computes ``left ** right``."""
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
        budget.expect_bits(left.bit_length() * max(0, right))
    return left**right


def percent(budget: Budget, left: Any, right: Any) -> Any:
    """Computes ``left % right``, of numbers or with a text's ``%`` directives."""
    if not isinstance(left, (str, bytes)):
        return left % right
    form = left if isinstance(left, str) else left.decode("latin-1")
    values = right if isinstance(right, tuple) else (right,)
    expected = len(form) + sum(_number(digits) for digits in re.findall(r"\d+", form))
    if "*" in form:
        expected += sum(abs(value) for value in values if isinstance(value, int))
    if isinstance(right, dict):
        for key in re.findall(r"%\((.*?)\)", form, re.S):
            expected += budget.weigh(right.get(key))
            budget.tick()
        if re.search(r"%[^(%]", form):
            expected += form.count("%") * budget.weigh(right)
    else:
        expected += sum(budget.weigh(value) for value in values)
    budget.expect(expected)
    return left % right


OPERATORS: dict[str, Callable[[Budget, Any, Any], Any]] = {
    "+": add,
    "-": subtract,
    "*": multiply,
    "**": power,
    "%": percent,
}


def format_field(budget: Budget, value: Any, spec: str) -> None:
    """Bounds one replacement field of ``str.format``."""
    budget.tick()
    widths = sum(_number(digits) for digits in re.findall(r"\d+", spec))
    budget.expect(budget.weigh(value) + widths + len(spec))


def method(budget: Budget, owner: Any, name: str, args: Values, kwargs: Names) -> Values:
    """Bounds a method of a text, number or container.

    Args:
        budget: The budget of the rendering.
        owner: The object that the method belongs to.
        name: Its name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The arguments to call it with.
    """
    if isinstance(owner, (str, bytes)):
        return text_method(budget, owner, name, args, kwargs)
    for value in (*args, *kwargs.values()):
        budget.read(value)
    if isinstance(owner, (list, tuple, range)) and name in ("index", "count"):
        budget.spend(8 * len(owner))
        if args and type(args[0]) is not str:
            budget.read(owner)
    elif name == "to_bytes":
        budget.expect(whole(args, kwargs, 0, "length", 1))
    elif name == "isdisjoint":
        budget.read(owner)
    elif hasattr(owner, "__len__"):
        budget.tick()
    return args


def text_method(budget: Budget, text: _Text, name: str, args: Values, kwargs: Names) -> Values:
    """Bounds a method of a text or of bytes, like `method`."""
    size = len(text)
    budget.spend(1 + (size >> 3))
    if name == "join" and args:
        args = (budget.items(args[0]), *args[1:])
        items = args[0]
        lengths = sum(len(item) for item in items if isinstance(item, (str, bytes)))
        budget.expect(lengths + size * max(0, len(items) - 1))
        return args
    for value in (*args, *kwargs.values()):
        budget.read(value)
    first = args[0] if args else None
    if name in ("ljust", "rjust", "center", "zfill"):
        budget.expect(max(size, whole(args, kwargs, 0, "width", 0)))
    elif name == "expandtabs":
        tabs = text.count(_like(text, "\t"))
        budget.expect(size + tabs * max(0, whole(args, kwargs, 0, "tabsize", 8)))
    elif name == "replace" and len(args) > 1:
        replacing(budget, text, first, args[1], whole(args, kwargs, 2, "count", -1))
    elif name in ("split", "rsplit", "splitlines"):
        budget.expect_items(count_parts(text, name, args, kwargs))
        budget.spend(size)
    elif name == "translate" and isinstance(first, dict):
        longest = max((len(v) for v in first.values() if isinstance(v, str)), default=1)
        budget.expect(size * max(1, longest))
    elif name == "maketrans":
        budget.spend(60 * sum(len(value) for value in args if hasattr(value, "__len__")))
    elif name in ("encode", "decode"):
        codec = first if first is not None else kwargs.get("encoding", "utf-8")
        if str(codec).lower().strip() in _SLOW_CODECS:
            budget.spend(size * size)
        budget.expect(4 * size)
    if isinstance(first, (str, bytes)) and len(first) > _SHORT:
        budget.spend(size * len(first) // _SHORT)
    return args


def replacing(budget: Budget, text: Any, old: Any, new: Any, count: int) -> None:
    """Bounds ``text.replace(old, new, count)``."""
    kind: Any = str if isinstance(text, str) else bytes
    if isinstance(old, kind) and isinstance(new, kind):
        found: int = text.count(old)
        found = found if count < 0 else min(found, count)
        budget.expect(len(text) + found * max(0, len(new) - len(old)))


def count_parts(text: Any, name: str, args: Values, kwargs: Names) -> int:
    """An upper bound on the number of parts that a text is split into."""
    size = len(text)
    if name == "splitlines":
        if isinstance(text, str) and not text.isascii():
            return size
        return 1 + sum(text.count(_like(text, end)) for end in "\n\r\v\f\x1c\x1d\x1e")
    separator: Any = args[0] if args else kwargs.get("sep")
    most = whole(args, kwargs, 1, "maxsplit", -1)
    if separator and type(separator) is type(text):
        found = 1 + text.count(separator)
    elif text.isascii():
        blanks = sum(text.count(_like(text, blank)) for blank in " \n\t\r\f\v\x1c\x1d\x1e\x1f")
        found = 1 + min(blanks, size // 2)
    else:
        found = 1 + size // 2
    return found if most < 0 else min(found, most + 1)


def _like(text: _Text, character: str) -> Any:
    return character if isinstance(text, str) else character.encode()


def whole(args: Values, kwargs: Names, place: int, name: str, default: int) -> int:
    """A whole number among the arguments of a call; `default` if it is missing."""
    value = args[place] if len(args) > place else kwargs.get(name, default)
    return int(value) if isinstance(value, int) else default


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 18 else MAX_CHARS + 1
