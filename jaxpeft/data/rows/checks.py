"""Checks of values in rows: types, empty texts, and unpaired surrogates."""

from collections.abc import Mapping
from typing import Any

from jaxpeft.core.limits import ROW_DEPTH


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def check_text(field: str, value: Any, *, may_be_empty: bool = False) -> list[str]:
    """The problem with a text as "field: why"; empty if there is none."""
    if not isinstance(value, str):
        return [f"{field}: expected text, got {type_name(value)}"]
    if not value.strip() and not may_be_empty:
        return [f"{field}: empty"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [f"{field}: half of a surrogate pair at character {error.start}"]
    return []


def check_shape(value: Any) -> list[str]:
    """The problem that makes a value unusable: deep nesting, or unpaired surrogates."""
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if depth > ROW_DEPTH.most:
            return [f"objects and lists are nested more than {ROW_DEPTH.most} deep"]
        if isinstance(one, dict):
            todo += [(inner, depth + 1) for inner in one.values()]
            keys = [key for key in one if check_text("key", key, may_be_empty=True)]
            if keys:
                return [f"the key {keys[0]!a} has half of a surrogate pair"]
        elif isinstance(one, list):
            todo += [(inner, depth + 1) for inner in one]
    return []


def check_strings(field: str, value: Any) -> list[str]:
    """The problem with the texts inside a JSON value, at any depth."""
    if isinstance(value, str):
        return check_text(field, value, may_be_empty=True)
    if isinstance(value, dict):
        texts = [check_strings(f"{field}.{key}", one) for key, one in value.items()]
        keys = [check_text(field, key, may_be_empty=True) for key in value]
        return [problem for found in (*texts, *keys) for problem in found]
    if isinstance(value, list):
        return [problem for one in value for problem in check_strings(field, one)]
    return []


TAKEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that arguments may not set."""


def check_arguments(field: str, arguments: Mapping[str, Any]) -> list[str]:
    """The problem with arguments of a chat template, as "field: why"."""
    taken = [name for name in arguments if name in TAKEN]
    problems = [f"{field}: {name} is set by the row itself; remove it" for name in taken]
    return problems + check_strings(field, dict(arguments))
