"""Checks of the fields that the configs of several methods have in common."""

import math
import typing
from typing import Any

from jaxpeft.methods.peft.patterns import is_count, keep_names


def require_count(method: Any, field: str, least: int = 1) -> None:
    """Checks that a config's field is a whole number of at least `least`.

    Raises:
        ValueError: The field has another value.
    """
    value = getattr(method, field)
    if not is_count(value, least):
        raise ValueError(
            f"{type(method).__name__}.{field} must be a whole number of at least {least}, got "
            f"{value!r}."
        )


def require_choice(method: Any, field: str, choices: Any) -> None:
    """Checks that a config's field is one of the values of a Literal, `choices`.

    Raises:
        ValueError: The field has another value.
    """
    value, known = getattr(method, field), typing.get_args(choices)
    if value not in known:
        raise ValueError(
            f"{type(method).__name__}.{field} must be one of {', '.join(known)}, got {value!r}."
        )


def require_alpha(method: Any) -> None:
    """Checks that a config's `alpha` is finite and positive.

    Raises:
        ValueError: It is not.
    """
    if not is_alpha(method.alpha):
        raise ValueError(
            f"{type(method).__name__}.alpha must be finite and positive, got {method.alpha!r}."
        )


def is_alpha(value: Any) -> bool:
    """Whether a value can be an alpha: finite and positive."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def require_dropout(method: Any) -> None:
    """Checks that a config's `dropout` is a probability below 1.

    Raises:
        ValueError: It is not.
    """
    if not 0.0 <= method.dropout < 1.0:
        raise ValueError(
            f"{type(method).__name__}.dropout must be in [0, 1), got {method.dropout!r}."
        )


def keep_targets(method: Any, *others: str) -> None:
    """Checks `targets`, `exclude` and other fields that list modules; lists become tuples.

    Args:
        method: The config; its fields are replaced.
        others: Further fields that list names of modules, or are a regex.

    Raises:
        ValueError: A field is malformed, or there are no targets.
    """
    keep_names(method, "targets", "exclude", *others)
    if not method.targets:
        raise ValueError(f"{type(method).__name__}.targets must name at least one module.")
