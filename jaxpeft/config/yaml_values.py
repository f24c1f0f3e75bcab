"""Converts a YAML node to the type of a config's field, strictly, by the rules of YAML 1.2."""

import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import yaml

from jaxpeft.config.schema import is_mapping
from jaxpeft.config.yaml_nodes import (
    is_null,
    is_quoted,
)
from jaxpeft.core.errors import nearest

_INT = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_RANGE = re.compile(r"([0-9]{1,6})\s*(?:-|:|\.\.\.?|to)\s*([0-9]{1,6})")
_LONGEST_RANGE = 16


def is_scalar(node: yaml.Node) -> bool:
    """Whether a node is a single value, not a list or a mapping."""
    return isinstance(node, yaml.ScalarNode)


class Mismatch(Exception):
    """The node does not fit the type; the text may give a reason."""


def resolve(hint: Any, node: yaml.Node) -> Any:
    """The value of a node as a type.

    Raises:
        Mismatch: The node holds no value of that type.
    """
    for kind in kinds_of(hint):
        if isinstance(node, yaml.SequenceNode):
            if typing.get_origin(kind) is tuple:
                return tuple(resolve(typing.get_args(kind)[0], item) for item in node.value)
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
                raise Mismatch("it is too large")
            return number
        if kind is str and not is_null(node):
            return text
    raise Mismatch


def kinds_of(hint: Any) -> list[Any]:
    """The members of a union, with text last, because every value is also text.

    Functions are left out: they can be given in Python alone.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if union else [hint]
    members = [kind for kind in members if typing.get_origin(kind) is not Callable]
    return sorted(members, key=lambda kind: kind is str)


def expected(hint: Any) -> str:
    """The name of a type in an error, such as "a whole number or null"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts, nullable = [], False
    for kind in kinds_of(hint):
        if kind is types.NoneType:
            nullable = True
        elif typing.get_origin(kind) is Literal:
            parts.append("one of " + ", ".join(typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            parts.append(f"a list of {expected(typing.get_args(kind)[0])}")
        elif is_mapping(kind):
            parts.append(f"names, each with {expected(typing.get_args(kind)[1])}")
        else:
            parts.append(names[kind])
    return " or ".join(parts + ["null"] * nullable)


def advice_on(hint: Any, node: yaml.Node) -> str:
    """How to write the value that was probably meant; "" if that is not clear."""
    if not isinstance(node, yaml.ScalarNode):
        return ""
    kinds = kinds_of(hint)
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
    """Whether a plain word in the file is a value of this type."""
    try:
        resolve(hint, yaml.ScalarNode("", text))
    except Mismatch:
        return False
    return True
