"""The keys of a config, read from its dataclasses, and the errors for all other keys.

A config is a frozen dataclass whose fields are values or *sections* (dataclasses again). A field
with ``metadata={"variants": registry}`` holds one of several dataclasses, chosen by the key
``name``; every variant class has that name as a class variable.
"""

import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpeft.core.errors import nearest
from jaxpeft.core.foreign_names import Foreign
from jaxpeft.core.records import fields_of


@dataclasses.dataclass(frozen=True)
class Key:
    """One key that holds a value.

    Attributes:
        path: Dotted, e.g. "optim.learning_rate".
        hint: Its type.
        default: The default, or ``dataclasses.MISSING`` if the key is required.
        variant: The variant of the section that has the key, "" if all have it.
        doc: The first sentence about the key in the docstring of its class.
    """

    path: str
    hint: Any
    default: Any
    variant: str = ""
    doc: str = ""


@dataclasses.dataclass(frozen=True)
class Schema:
    """A config's root class, and other libraries' names for its keys.

    Attributes:
        root: A frozen dataclass.
        foreign: Names of keys in other libraries.
        values: By path, values in other libraries and the values to write instead.
    """

    root: type
    foreign: Mapping[str, Foreign] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[Key]:
        """All keys in the order of the classes."""
        return list(_walk(self.root, "", ""))

    def sections(self) -> list[str]:
        """Names of the root's sections."""
        return [field.name for field, hint in fields_of(self.root) if is_section(field, hint)]

    def find(self, path: str) -> list[Key]:
        """The keys at a dotted path: none, one, or one per variant."""
        return [key for key in self.keys if key.path == path]

    def advice(self, path: str, value: str) -> str:
        """A hint "; write ..." for a value that another library uses for this key; else ""."""
        known = self.values.get(path, {}).get(value.strip().lower().replace("_", "-"))
        return f"; {known}" if known else ""

    def explain(self, section: str, name: str, allowed: Sequence[str], variant: str = "") -> str:
        """A clause about the unknown key `name` in `section`.

        Args:
            section: Dotted path of the section, "" at the top level.
            name: The key as written.
            allowed: The keys that this section has.
            variant: The section's variant, if it has variants.

        Returns:
            Why the key is wrong, and which key was probably meant.
        """
        if section and name in self.sections():
            return f'unknown key here, "{name}" is a section at the top level'
        same = _unique(key for key in self.keys if key.path.rpartition(".")[2] == name)
        here = [key for key in same if key.path == _join(section, name)]
        if here:
            owners = " or ".join(_unique(key.variant for key in self.find(here[0].path)))
            return f'unknown key for name "{variant}", it belongs to {owners}'
        if name in self.foreign and all(key.variant for key in same):
            return self._explain_foreign(section, name, allowed)
        if same:
            places = " or ".join(f'"{k.path.rpartition(".")[0] or "the top level"}"' for k in same)
            paths = " or ".join(key.path for key in same)
            return f"unknown key here, it belongs under {places}: {paths}"
        close = nearest(_normal(name), list(allowed), 1)
        if close:
            return f'unknown key, did you mean "{close[0]}"?'
        leaves = {key.path.rpartition(".")[2]: key.path for key in reversed(self.keys)}
        close = nearest(_normal(name), list(leaves), 1)
        guess = f"did you mean {leaves[close[0]]}? " if close else ""
        return f"unknown key, {guess}known here: {', '.join(allowed) or 'none'}"

    def _explain_foreign(self, section: str, name: str, allowed: Sequence[str]) -> str:
        foreign = self.foreign[name]
        parent, _, leaf = foreign.path.rpartition(".")
        if not foreign.path:
            return f"unknown key: {foreign.remark}"
        if section and parent == section and leaf not in allowed:
            owners = " or ".join(_unique(key.variant for key in self.find(foreign.path)))
            remark = f" ({foreign.remark})" if foreign.remark else ""
            return f'unknown key, {foreign.whose(name)} is "{leaf}" with name: {owners}{remark}'
        return foreign.ours(name, leaf if parent == section else foreign.path)


def variants_of(field: dataclasses.Field) -> Mapping[str, type] | None:
    """The registry of a field that holds one of several classes, else None."""
    return field.metadata.get("variants")


def is_section(field: dataclasses.Field, hint: Any) -> bool:
    """Whether the field holds keys of its own."""
    return variants_of(field) is not None or dataclasses.is_dataclass(hint)


def is_mapping(hint: Any) -> bool:
    """Whether values of this type are mappings, such as ``Mapping[str, int]``."""
    return typing.get_origin(hint) is Mapping


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values; variants have their ``name`` first."""
    plain: dict[str, Any] = {}
    for field, hint in fields_of(type(config)):
        value = getattr(config, field.name)
        if is_section(field, hint):
            head = {"name": type(value).name} if variants_of(field) is not None else {}
            value = head | to_plain(value)
        plain[field.name] = as_plain(value)
    return plain


def dotted_values(config: Any) -> dict[str, Any]:
    """A config as ``{"optim.learning_rate": 2e-4, ...}``; a mapping stays one value."""
    return dict(_dotted_values(config, ""))


def describe(schema: Schema) -> str:
    """All keys, one per line, with defaults and their documentation; for ``--help``."""
    lines = []
    for key in schema.keys:
        default = "required" if key.default is dataclasses.MISSING else _show(key.default)
        only = f" [{key.variant}]" if key.variant else ""
        text = f"--{key.path}{only} ({default})  {key.doc}".rstrip()
        lines += textwrap.wrap(
            text, 98, initial_indent="  ", subsequent_indent=" " * 8, break_on_hyphens=False
        )
    return "\n".join(lines)


def _walk(cls: type, path: str, variant: str):
    docs = _attribute_docs(cls)
    for field, hint in fields_of(cls):
        inner = _join(path, field.name)
        variants = variants_of(field)
        if variants is not None:
            names = ", ".join(variants)
            yield Key(_join(inner, "name"), str, dataclasses.MISSING, "", f"One of {names}.")
            for name, choice in variants.items():
                yield from _walk(choice, inner, name)
        elif dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), inner, variant)
        else:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            doc = docs.get(field.name, "")
            if names := field.metadata.get("choices"):
                doc = f"One of {', '.join(names)}. {doc}"
            yield Key(inner, hint, default, variant, doc)


@functools.cache
def _attribute_docs(cls: type) -> dict[str, str]:
    """First sentences of the ``Attributes:`` of a Google style docstring, bases first."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        body = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
        for match in re.finditer(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", body, re.MULTILINE):
            text = " ".join(match[2].split())
            docs[match[1]] = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    return docs


def _dotted_values(config: Any, path: str):
    for field, hint in fields_of(type(config)):
        value, inner = getattr(config, field.name), _join(path, field.name)
        if is_section(field, hint):
            if variants_of(field) is not None:
                yield _join(inner, "name"), type(value).name
            yield from _dotted_values(value, inner)
        else:
            yield inner, as_plain(value)


def as_plain(value: Any) -> Any:
    """A value in the types of YAML and JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _normal(name: str) -> str:
    return name.replace("-", "_").lower()


def _unique(items: Iterable) -> list:
    """Drops repetitions; keys of several variants with the same path count as one."""
    return list({getattr(item, "path", item): item for item in items}.values())


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {item}' for name, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
