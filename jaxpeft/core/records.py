"""The base class of configs: it explains wrong names as the YAML reader does."""

import dataclasses
import functools
import inspect
import typing
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core import float32, limits
from jaxpeft.core.errors import UserError, nearest
from jaxpeft.core.foreign_names import ELSEWHERE, FOREIGN


class Record:
    """Base of the frozen dataclasses that make a config.

    Attributes:
        in_float32: Whether the numbers of this class are used in float32.

    Raises:
        UserError: A keyword is no field, or a number exceeds `jaxpeft.core.limits`. For a wrong
            keyword the message names the field that is probably meant, also if it is a name of
            another library.
        ValueError: The class is `in_float32`, and float32 cannot hold a number.
    """

    in_float32: ClassVar[bool] = False

    if not TYPE_CHECKING:  # it would hide the dataclass's signature

        def __new__(cls, *args, **kwargs):
            """Makes an empty object for ``__init__`` to fill."""
            known = inspect.signature(cls.__init__).parameters
            catches_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
            wrong = [] if catches_all else [name for name in kwargs if name not in known]
            if wrong:
                raise UserError("; ".join(f"{cls.__name__}.{n}: {_explain(cls, n)}" for n in wrong))
            limits.require_fields(cls.__name__, kwargs)
            if cls.in_float32:
                hints = {field.name: hint for field, hint in fields_of(cls)}
                float32.require_fields(cls.__name__, kwargs, hints)
            return super().__new__(cls)


def fields_of(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of a config that may be set, each with its resolved type.

    A text with ``metadata={"choices": table}`` has the type of the names that are in the table now.
    """
    hints = _hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return [(field, _choices(field) or hints[field.name]) for field in fields]


def _choices(field: dataclasses.Field) -> Any:
    names = field.metadata.get("choices")
    return typing.Literal[tuple(names)] if names else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _explain(cls: type, name: str) -> str:
    """Why a config has no such field, and which field was probably meant."""
    fields = [field.name for field, _ in fields_of(cls)]
    foreign = FOREIGN.get(name) or ELSEWHERE.get(name)
    if foreign is None:
        close = nearest(name.replace("-", "_").lower(), fields, 1)
        guess = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(fields)}"
        return f"unknown key, {guess}"
    leaf = foreign.path.rpartition(".")[2]
    if not foreign.path:
        return f"unknown key: {foreign.remark}"
    if leaf == "name" and leaf not in fields:
        return f"unknown key, the class stands for {foreign.whose(name)}; drop it"
    if leaf in fields:
        return foreign.ours(name, leaf)
    return f"{foreign.ours(name, foreign.path)}; {cls.__name__} has {', '.join(fields)}"
