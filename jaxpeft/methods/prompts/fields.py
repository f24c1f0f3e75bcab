"""Checks of the fields that configs of soft prompts have in common."""

import typing
from typing import Any


def require_count(method: Any, field: str) -> None:
    """Checks that a config's field is a whole number of at least 1.

    Raises:
        ValueError: The field has another value.
    """
    value = getattr(method, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{type(method).__name__}.{field} must be a whole number of at least 1, got {value!r}."
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
