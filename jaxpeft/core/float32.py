"""Which numbers of a config survive in float32, in which everything is trained.

A number above the largest one becomes infinite, one below the smallest normal one becomes 0
(devices round subnormal numbers to 0), and a share just below 1 becomes 1: one minus it is 0.
"""

import typing
from collections.abc import Mapping
from typing import Any

from jaxpeft.core import limits

LARGEST = float.fromhex("0x1.fffffep+127")
SMALLEST = float.fromhex("0x1p-126")
"""The smallest normal number."""
ONE = 1.0 - 2.0**-25
"""The least number that is rounded to 1."""

_SHARES = frozenset({"dropout", "b1", "b2", "beta1", "beta2"})
"""Fields of configs that lie below 1."""


def misfit(value: Any) -> str:
    """Why float32 does not hold a number, "" where it does; infinities and NaN are others' to tell.

    Example:
        >>> misfit(1e-46)
        'must be at least 1.2e-38 in size, or float32 makes it 0, got 1e-46'
    """
    size = abs(value)
    if LARGEST < size < float("inf"):
        shown = limits.number(value) if isinstance(value, int) else repr(value)
        return f"must be at most 3.4e+38 in size, or float32 makes it infinite, got {shown}"
    if 0 < size < SMALLEST:
        return f"must be at least 1.2e-38 in size, or float32 makes it 0, got {value!r:.30}"
    return ""


def require(where: str, value: Any) -> None:
    """Checks that float32 holds a number.

    Raises:
        ValueError: It does not; the message begins with `where`.
    """
    if text := misfit(value):
        raise ValueError(f"{where} {text}.")


def require_fields(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Checks that float32 holds the numbers of a config.

    Args:
        owner: What to call the config.
        values: Its fields. The config itself checks those that are not numbers.
        hints: Their types; a field whose type contains no float is skipped.

    Raises:
        ValueError: It does not hold one of them.
    """
    for name, value in values.items():
        if not _has_float(hints.get(name)):
            continue
        numbers = value.values() if isinstance(value, Mapping) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            require(f"{owner}.{name}", number)
            if name in _SHARES and ONE <= number < 1:
                raise ValueError(
                    f"{owner}.{name} must be below 1 in float32, which makes it 1, got {number!r}."
                )


def _has_float(hint: Any) -> bool:
    return hint is float or any(_has_float(part) for part in typing.get_args(hint))
