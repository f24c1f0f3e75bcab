"""A config file and command-line flags as one graph of YAML nodes that know their place."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError, nearest
from jaxpeft.files import storage

_MAX_DEPTH = 50
_NULL = ("", "~", "null", "Null", "NULL")


class Location(NamedTuple):
    """The place where something was written; sorts by line, then by the order of flags.

    Attributes:
        order: (0, line) in the file, (1, index) for a flag.
        text: The place in words, for errors.
    """

    order: tuple[int, int]
    text: str


class _FlagMark(NamedTuple):
    """Replaces PyYAML's marks in nodes that come from a flag."""

    flag: str
    index: int


def location_of(node: yaml.Node | None, file: str) -> Location:
    """The place where a node was written; the whole file for None."""
    mark: Any = None if node is None else node.start_mark
    if isinstance(mark, _FlagMark):
        return Location((1, mark.index), mark.flag)
    if mark is None:
        return Location((0, 0), file)
    return Location((0, mark.line + 1), f"{file}:{mark.line + 1}")


def is_null(node: yaml.Node | None) -> bool:
    """Whether the node is a plain null or empty."""
    return isinstance(node, yaml.ScalarNode) and not is_quoted(node) and node.value in _NULL


def is_quoted(node: yaml.Node) -> bool:
    """Whether a scalar is quoted, and so is text."""
    return getattr(node, "style", None) is not None


def show(node: yaml.Node) -> str:
    """The text of a node as it was written, for an error."""
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if is_null(node):
        return "null"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return f'the text "{text}"' if is_quoted(node) else text


def empty_section() -> yaml.MappingNode:
    """The node of a section that is missing in the file."""
    return yaml.MappingNode("", [])


def read_text(path: str, example: str = "", limit: limits.Limit | None = None) -> str:
    """Reads a config file as text.

    Args:
        path: The file.
        example: A command that works, which ends the error about a missing file.
        limit: The largest size; None for `limits.CONFIG_BYTES`.

    Returns:
        The text, which is not empty.

    Raises:
        UserError: The file is missing, a folder, empty, not UTF-8, or far too large.
    """
    file, limit = Path(storage.require_path(path)), limit or limits.CONFIG_BYTES
    hint = f"; for example: {example}" if example else ""
    try:
        if file.is_dir():
            inside = sorted(p.name for p in file.iterdir() if p.suffix in (".yaml", ".yml"))
            holds = f" (it holds {', '.join(inside[:5])})" if inside else ""
            raise UserError(f"{path}: a folder, not a config file{holds}{hint}")
        with file.open("rb") as stream:
            data = stream.read(limit.most + 1)  # a device has no size
        limits.require_bytes(path, max(len(data), file.stat().st_size), limit)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        known = {str(p) for p in (*file.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml"))}
        close = nearest(path, sorted(known))
        guess = f", did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{path}: no such config file in {Path.cwd()}{guess}{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{hint}") from None
    if not text.strip():
        raise UserError(f"{path}: the config file is empty{hint}")
    return text


def compose(text: str, file: str) -> yaml.MappingNode:
    """The graph of a config's text.

    Raises:
        UserError: The text is not YAML, has tags, or is no mapping.
    """
    try:
        _check_events(text, lambda line: f"{file}:{line}")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        what = ", ".join(filter(None, (error.context, error.problem)))
        tab = "; indent with spaces, YAML forbids tabs" if "'\\t'" in what else ""
        raise UserError(f"{where}: not valid YAML: {what}{tab}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        shown = f"U+{ord(text[error.position]):04X}"
        raise UserError(f"{file}:{line}: character {shown} is not allowed in YAML") from None
    if root is None:
        raise UserError(f"{file}: the config file holds only comments")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}:1: expected keys and values (key: value), got {show(root)}")
    return root


def _check_events(text: str, where: Callable[[int], str]) -> None:
    """Refuses tags, and nesting so deep that recursion would fail.

    Args:
        text: YAML.
        where: A function from a line, counted from 1, to its name in errors.

    Raises:
        UserError: The text has a tag or is nested too deeply.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        location = where(event.start_mark.line + 1)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UserError(f"{location}: nested too deeply for a config")
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{location}: tags are not allowed, got {event.tag!r}; drop it")


def flag_node(flag: str, index: int, value: str, *, text: bool, lists: bool, keys: bool) -> Any:
    """The node for a flag's value: its text, a list, or a mapping.

    Args:
        flag: The flag, which becomes the node's place.
        index: Its position among the flags.
        value: The text after the flag.
        text: Whether the flag's field may hold text. Then only plain words with commas are read as
            a list, because a regex may hold commas too.
        lists: Whether the field may hold a list.
        keys: Whether the flag names a section, or a field that holds a mapping.

    Raises:
        UserError: The value is nested too deeply or holds a YAML tag.
    """
    mark: Any = _FlagMark(flag, index)
    if (lists and value.startswith("[")) or (keys and value.startswith("{")):
        try:
            _check_events(value, lambda line: flag)
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            node = None
        if node is not None:
            _set_marks(node, mark)
            return node
    if lists and (not text or re.fullmatch(r"[\w./-]+(\s*,\s*[\w./-]+)+", value)):
        items = [yaml.ScalarNode("", item.strip(), mark) for item in value.split(",")]
        return yaml.SequenceNode("", items, mark)
    return yaml.ScalarNode("", value, mark)


def put(root: yaml.MappingNode, flag: str, new: yaml.Node) -> yaml.MappingNode:
    """A copy of the graph with the node `new` at the path of `flag`.

    Raises:
        KeyError: A part of the path is a value and cannot have keys; the exception has its path.
    """
    mark, names = new.start_mark, flag[2:].split(".")
    root = node = yaml.MappingNode("", list(root.value), root.start_mark)
    for depth, name in enumerate(names):
        at = next((i for i, (key, _) in enumerate(node.value) if key.value == name), None)
        key, old = (yaml.ScalarNode("", name, mark), None) if at is None else node.value[at]
        if depth == len(names) - 1:
            key, child = yaml.ScalarNode("", name, mark), new
        elif old is None or is_null(old):
            child = yaml.MappingNode("", [], mark)
        elif isinstance(old, yaml.MappingNode):
            child = yaml.MappingNode("", list(old.value), old.start_mark)
        else:
            raise KeyError(".".join(names[: depth + 1]))
        at = len(node.value) if at is None else at
        node.value[at : at + 1] = [(key, child)]
        node = child
    return root


def _set_marks(node: Any, mark: Any) -> None:
    node.start_mark = mark
    if isinstance(node, yaml.ScalarNode):
        return
    for item in node.value:
        for part in item if isinstance(item, tuple) else (item,):
            _set_marks(part, mark)
