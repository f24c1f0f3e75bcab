"""What configs have in common: a wrong name is answered as in YAML, with the right one."""

import inspect
from typing import TYPE_CHECKING, ClassVar

from jaxpeft.core import float32, limits
from jaxpeft.core.errors import UserError


class Record:
    """Base of the frozen dataclasses that make a config.

    Attributes:
        in_float32: Whether the numbers of this class are computed with in float32.

    Raises:
        UserError: For a keyword that is no field; it says which one is meant, also where the name
            is another library's; or a number beyond `jaxpeft.core.limits`.
        ValueError: For a number that float32 does not hold, where the class is `in_float32`.
    """

    in_float32: ClassVar[bool] = False

    if not TYPE_CHECKING:  # whose signature is the dataclass's own

        def __new__(cls, *args, **kwargs):
            """A new object for ``__init__`` to fill."""
            known = inspect.signature(cls.__init__).parameters
            catches_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
            wrong = [] if catches_all else [name for name in kwargs if name not in known]
            if wrong:
                from jaxpeft.config.run_config import SCHEMA

                texts = (f"{cls.__name__}.{n}: {SCHEMA.explain_field(cls, n)}" for n in wrong)
                raise UserError("; ".join(texts))
            limits.require_fields(cls.__name__, kwargs)
            if cls.in_float32:
                from jaxpeft.config.schema import fields_of

                hints = {field.name: hint for field, hint in fields_of(cls)}
                float32.require_fields(cls.__name__, kwargs, hints)
            return super().__new__(cls)
