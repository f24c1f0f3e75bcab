"""Checks that numbers of a config keep their meaning in float32, the dtype of training.

A number above the largest float32 becomes infinite. One below the smallest normal float32 becomes
0, because devices round subnormal numbers to 0. A share just below 1 becomes 1, so one minus that
share becomes 0.
"""

import typing
from collections.abc import Mapping
from typing import Any

from jaxpeft.core import limits

LARGEST = float.fromhex("0x1.fffffep+127")
SMALLEST = float.fromhex("0x1p-126")
"""The smallest normal number."""
ONE = 1.0 - 2.0**-25
"""The smallest number that float32 rounds to 1."""

_SHARES = frozenset({"dropout", "b1", "b2", "beta1", "beta2"})
"""Fields of configs whose values must be below 1."""


def misfit(value: Any) -> str:
    """Why float32 cannot hold a number, as a clause; "" if it can.

    Infinities and NaN are not reported here: the configs themselves refuse them.

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
    """Checks that float32 can hold a number.

    Raises:
        ValueError: Float32 cannot hold it. The message begins with `where`.
    """
    if text := misfit(value):
        raise ValueError(f"{where} {text}.")


def require_fields(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Checks that float32 can hold the numbers of a config.

    Args:
        owner: The name of the config, for messages.
        values: Its fields. The config itself checks those that are not numbers.
        hints: Their types; a field whose type contains no float is skipped.

    Raises:
        ValueError: Float32 cannot hold one of them.
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
