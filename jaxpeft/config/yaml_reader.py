"""Strict YAML into frozen dataclasses: every problem with its line, all of them at once.

The file is read as a graph of nodes, so that every key keeps its line and a key given twice is
seen. Scalars are resolved by the type of the field they are for, from their text and by YAML
1.2's core schema: ``1e-4`` is a number, only ``true`` and ``false`` are booleans, ``no`` and
``010`` stay text in a text field. Tags and merge keys are refused. Command line overrides are
put into the same graph, and named by their flag in an error.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from jaxpeft.config.schema import Schema, is_mapping, is_section, to_plain, variants_of
from jaxpeft.config.yaml_nodes import (
    Place,
    compose,
    empty_section,
    flag_node,
    is_null,
    is_quoted,
    place_of,
    put,
    read_text,
    show,
    split_flags,
)
from jaxpeft.core.errors import UserError, nearest
from jaxpeft.core.records import fields_of

_MAX_PROBLEMS = 20
_INT = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_RANGE = re.compile(r"([0-9]{1,6})\s*(?:-|:|\.\.\.?|to)\s*([0-9]{1,6})")
_LONGEST_RANGE = 16
_BAD = object()


def load(schema: Schema, path: str, overrides: Sequence[str] = (), example: str = "") -> Any:
    """Reads a config file.

    Args:
        schema: The classes to fill.
        path: A YAML file.
        overrides: Flags as on a command line: ``["--optim.learning_rate", "3e-4"]`` or
            ``["--optim.learning_rate=3e-4"]``; lists as ``[a, b]`` or ``a,b``, names with values
            as ``{a: 1}``; the last one wins.
        example: A command that works, for the error about a missing file.

    Returns:
        An instance of ``schema.root``.

    Raises:
        UserError: With one line for each of the first 20 problems.
    """
    return loads(schema, read_text(path, example), path, overrides)


def loads(schema: Schema, text: str, file: str, overrides: Sequence[str] = ()) -> Any:
    """Like `load`, for text; `file` stands for it in errors."""
    root, reader = compose(text, file), _Reader(schema, file)
    for index, (flag, value) in enumerate(split_flags(overrides)):
        kinds = {kind for key in schema.find(flag[2:]) for kind in _kinds(key.hint)}
        node = flag_node(
            flag,
            index,
            value,
            text=str in kinds,
            lists=any(typing.get_origin(kind) is tuple for kind in kinds),
            keys=not kinds or any(map(is_mapping, kinds)),
        )
        try:
            root = put(root, flag, node)
        except KeyError as error:
            reader.problem(reader.place(node), "", f"{error.args[0]} is a value and has no keys")
    config = reader.section(schema.root, root, "", "")
    if reader.problems:
        lines = [text for _, text in sorted(reader.problems)]
        if len(lines) > _MAX_PROBLEMS:
            lines[_MAX_PROBLEMS:] = [f"{file}: {len(lines) - _MAX_PROBLEMS} more problems"]
        raise UserError("\n".join(lines))
    return config


def dumps(config: Any) -> str:
    """A config as YAML with every default written out; `loads` gives it back.

    Lists of numbers, which may be long, stand on one line each.
    """
    return yaml.dump(
        to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )


class _Reader:
    """Turns nodes into dataclasses, noting every problem and where each key was written."""

    def __init__(self, schema: Schema, file: str):
        self.schema, self.file = schema, file
        self.problems: list[tuple[Place, str]] = []
        self.places: dict[str, Place] = {}

    def place(self, node: yaml.Node | None) -> Place:
        return place_of(node, self.file)

    def problem(self, place: Place, path: str, text: str) -> Any:
        subject = "" if not path or place.text == f"--{path}" else f"{path}: "
        self.problems.append((place, f"{place.text}: {subject}{text}"))
        return _BAD

    def section(self, cls: type, node: yaml.Node, path: str, variant: str) -> Any:
        """An instance of `cls`, or `_BAD` after noting why not."""
        given = self.pairs(node, path)
        if variant:
            given.pop("name", None)
        fields = fields_of(cls)
        allowed = [field.name for field, _ in fields] + (["name"] if variant else [])
        for index, name in enumerate(name for name in given if name not in allowed):
            text = "unknown key"
            if index < _MAX_PROBLEMS:  # to look for near names takes time
                text = self.schema.explain(path, name, allowed, variant)
            self.problem(self.place(given[name][0]), _join(path, name), text)
        values = {}
        for field, hint in fields:
            inner = _join(path, field.name)
            key, child = given.get(field.name, (None, None))
            variants = variants_of(field)
            if is_section(field, hint):
                child = empty_section() if child is None else child
                if variants is not None:
                    values[field.name] = self.choose(variants, child, inner)
                else:
                    values[field.name] = self.section(hint, child, inner, "")
            elif child is not None:
                values[field.name] = self.value(hint, child, inner, self.place(key))
            elif _is_required(field):
                where = self.place(node)
                self.problem(where, inner, f"missing, expected {_expected(hint)}")
                values[field.name] = _BAD
        if any(value is _BAD for value in values.values()):
            return _BAD
        try:
            return cls(**values)
        except ValueError as error:
            for line in str(error).split("\n"):
                self.rejected(cls, path, line)
            return _BAD

    def choose(self, variants: Mapping[str, type], node: yaml.Node, path: str) -> Any:
        """A section whose class is chosen by its key ``name``."""
        names = ", ".join(variants)
        before = len(self.problems)
        key, child = self.pairs(node, path).get("name", (None, None))
        if len(self.problems) > before and key is None:
            return _BAD
        del self.problems[before:]  # `section` finds them again
        if child is None:
            return self.problem(self.place(node), f"{path}.name", f"missing, one of: {names}")
        name = child.value if isinstance(child, yaml.ScalarNode) else ""
        if name not in variants:
            close = nearest(name, list(variants), 1)
            guess = f', did you mean "{close[0]}"?' if close else ""
            text = f"expected one of {names}, got {show(child)}{guess}"
            return self.problem(self.place(key), f"{path}.name", text)
        return self.section(variants[name], node, path, name)

    def pairs(self, node: yaml.Node, path: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The keys of a mapping node, each once."""
        self.places.setdefault(path, self.place(node if path else None))
        if is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            text = f"expected keys and values (key: value), got {show(node)}"
            self.problem(self.place(node), path, text)
            return {}
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            place = self.place(key)
            if not isinstance(key, yaml.ScalarNode):
                self.problem(place, path, "a key must be a word")
            elif key.value == "<<":
                self.problem(place, path, "merge keys (<<) are not allowed; write the keys out")
            elif key.value in pairs:
                first = self.place(pairs[key.value][0]).order[1]
                text = f"given twice, also on line {first}; keep one of the two"
                self.problem(place, _join(path, key.value), text)
            else:
                pairs[key.value] = (key, value)
                self.places[_join(path, key.value)] = place
        return pairs

    def value(self, hint: Any, node: yaml.Node, path: str, place: Place) -> Any:
        """The value of a field, or `_BAD` after noting why not."""
        mapping = next(filter(is_mapping, _kinds(hint)), None)
        if mapping is not None and isinstance(node, yaml.MappingNode):
            item = typing.get_args(mapping)[1]
            values = {
                name: self.value(item, child, _join(path, name), self.place(key))
                for name, (key, child) in self.pairs(node, path).items()
            }
            return _BAD if any(value is _BAD for value in values.values()) else values
        try:
            return _resolve(hint, node)
        except _Mismatch as error:
            why = f"; {error}" if str(error) else ""
            advice = self.schema.advice(path, node.value) if _is_scalar(node) else ""
            text = (
                f"expected {_expected(hint)}, got {show(node)}{advice or _advice(hint, node)}{why}"
            )
            return self.problem(place, path, text)

    def rejected(self, cls: type, path: str, line: str) -> None:
        """Notes what a class said about its values, at the line of the field it names."""
        names = {field.name for field, _ in fields_of(cls)}
        for prefix in (f"{cls.__name__}.", f"{path}." if path else ""):
            line = line.replace(prefix, "") if prefix else line
        line = line.strip().removesuffix(".")
        paths = [
            full
            for word in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", line)
            for full in [_join(path, word)]
            if word.split(".")[0] in names
        ]
        subject = paths[0] if paths and _join(path, line).startswith(paths[0]) else path
        if subject != path:
            line = _join(path, line)[len(subject) :].lstrip(": ")
        written = [self.places[p] for p in paths if p in self.places]
        flags = [place for place in written if place.order[0]]
        place = (flags + written + [self.places.get(path, self.place(None))])[0]
        self.problem(place, subject, line)


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


class _Mismatch(Exception):
    """The node does not fit the type; the text may say more."""


def _resolve(hint: Any, node: yaml.Node) -> Any:
    for kind in _kinds(hint):
        if isinstance(node, yaml.SequenceNode):
            if typing.get_origin(kind) is tuple:
                return tuple(_resolve(typing.get_args(kind)[0], item) for item in node.value)
            continue
        if not isinstance(node, yaml.ScalarNode):
            continue
        text, plain = node.value, not is_quoted(node)
        if kind is types.NoneType and is_null(node):
            return None
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        if kind is bool and plain and text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if kind is int and plain and _INT.fullmatch(text):
            return int(text)
        if kind is float and plain and _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                raise _Mismatch("it is too large")
            return number
        if kind is str and not is_null(node):
            return text
    raise _Mismatch


def _kinds(hint: Any) -> list[Any]:
    """Members of a union, text last: everything else is also text."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if union else [hint]
    return sorted(members, key=lambda kind: kind is str)


def _expected(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts, nullable = [], False
    for kind in _kinds(hint):
        if kind is types.NoneType:
            nullable = True
        elif typing.get_origin(kind) is Literal:
            parts.append("one of " + ", ".join(typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            parts.append(f"a list of {_expected(typing.get_args(kind)[0])}")
        elif is_mapping(kind):
            parts.append(f"names, each with {_expected(typing.get_args(kind)[1])}")
        else:
            parts.append(names[kind])
    return " or ".join(parts + ["null"] * nullable)


def _advice(hint: Any, node: yaml.Node) -> str:
    """How to write what was probably meant, "" where that is not clear."""
    if not isinstance(node, yaml.ScalarNode):
        return ""
    kinds = _kinds(hint)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            close = nearest(node.value, list(typing.get_args(kind)), 1)
            return f', did you mean "{close[0]}"?' if close else ""
        if typing.get_origin(kind) is tuple and str not in kinds and not is_null(node):
            return _list_advice(typing.get_args(kind)[0], node.value)
    if is_quoted(node) and _fits(hint, node.value):
        return "; drop the quotes"
    if bool in kinds and node.value.lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if node.value.lower() in ('yes', 'on') else 'false'}"
    return ""


def _list_advice(item: Any, text: str) -> str:
    """How to write a list that was written as one text: a range, commas, or one item."""
    span = _RANGE.fullmatch(text.strip())
    if item is int and span and int(span[1]) < int(span[2]):
        first, last = int(span[1]), int(span[2])
        if last - first < _LONGEST_RANGE:
            return f"; write [{', '.join(map(str, range(first, last + 1)))}]"
        return f"; write every number: [{first}, {first + 1}, ..., {last}]"
    items = [part for part in re.split(r"[\s,;]+", text.strip(" []()")) if part]
    if items and all(_fits(item, part) for part in items):
        return f"; write [{', '.join(items)}]"
    return ""


def _fits(hint: Any, text: str) -> bool:
    """Whether a plain word in the file would be a value of this type."""
    try:
        _resolve(hint, yaml.ScalarNode("", text))
    except _Mismatch:
        return False
    return True


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not plain printable ASCII."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.fullmatch(r"[ -~]+", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    numbers = all(type(item) in (int, float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
