"""The table of methods; code that depends on the kind of an adapter looks here."""

from jaxpeft.core.errors import UserError
from jaxpeft.methods.family import Kind
from jaxpeft.methods.method import Method
from jaxpeft.methods.peft.values import FORMATS

KINDS: dict[str, Kind] = {}
"""Families by ``Spec.kind``."""

METHODS: dict[str, type[Method]] = {}
"""Config classes by the name in YAML's ``method.name``."""


def register_method(kind: Kind) -> None:
    """Adds a family of adapters, so that configs, folders and every operation know it.

    Args:
        kind: The family; its config class has the name.

    Raises:
        UserError: If another family has that name, or that ``peft_type``.

    Example:
        A family outside of this package registers itself where it is defined:

        >>> jp.register_method(KIND)  # doctest: +SKIP
    """
    name = kind.name
    if name in KINDS and KINDS[name] is not kind:
        raise UserError(f"register_method: there is a method called {name!r} already.")
    if kind.peft is not None and FORMATS.get(kind.peft.type, kind.peft) is not kind.peft:
        raise UserError(f"register_method: another method has the peft_type {kind.peft.type!r}.")
    KINDS[name], METHODS[name] = kind, kind.config
    if kind.peft is not None:
        FORMATS[kind.peft.type] = kind.peft
