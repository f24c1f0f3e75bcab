"""Command-line flags that override keys of a config: ``--a.b value`` and ``--a.b=value``."""

import re
from collections.abc import Sequence

from jaxpeft.core.errors import UserError


def split_flags(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of flag and value from ``--a.b value`` and ``--a.b=value``.

    Raises:
        UserError: A flag has no value, or a value has no flag.
    """
    pairs, rest = [], list(overrides)
    while rest:
        flag, value = take_flag(rest)
        if not re.fullmatch(r"--\w[\w.-]*", flag):
            raise UserError(f"{flag}: expected an override such as --optim.learning_rate 3e-4")
        pairs.append((flag, value))
    return pairs


def take_flag(arguments: list[str]) -> tuple[str, str]:
    """Takes a flag and its value, one argument or two, from the front of a list.

    Raises:
        UserError: The flag has no value.
    """
    flag, equals, value = arguments.pop(0).partition("=")
    if equals:
        return flag, value
    if not arguments or arguments[0].startswith("--"):
        raise UserError(f"{flag}: needs a value, as in {flag} VALUE")
    return flag, arguments.pop(0)
