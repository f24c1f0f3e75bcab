"""Names of modules and arrays: paths into trees, Hugging Face names, and PEFT's target rules.

A leaf of the base has one path (``layers/self_attn/q_proj/kernel``). Because layers are stacked,
the leaf holds one Hugging Face module per layer (``model.layers.0.self_attn.q_proj``, ...). Targets
are matched against those full names, by the rules of HF PEFT 0.21
(``tuners_utils.check_target_module_exists``).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from jaxpeft.core.errors import UserError, first_few, nearest

ALL_LINEAR = "all-linear"
LAYERS = "layers/"
HEAD = "lm_head/kernel"
EMBEDDING = "embed_tokens/embedding"
_OWN = re.compile(
    f"{EMBEDDING}|{HEAD}|norm/scale|layers/(self_attn|mlp)/[a-z]+_proj/(kernel|bias)|"
    "layers/(self_attn/[a-z]_norm|[a-z_]+_layernorm)/scale"
)
"""The paths of the leaves of our own models."""

Targets = str | tuple[str, ...] | Callable[[Any], bool]
"""What a method adapts, see `match`: texts, or in Python a predicate over a parameter's row."""


def flatten(tree: Mapping) -> dict[str, Any]:
    """The leaves of nested dicts, by path with "/" between the keys; empty dicts vanish."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """Nested dicts made of leaves by path; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def require_tree(params: Any) -> None:
    """Checks that base parameters are a nested dict.

    Raises:
        UserError: The argument is something else, such as a whole model.
    """
    if not isinstance(params, Mapping):
        raise UserError(
            f"params: expected a nested dict of arrays, got {type(params).__name__}; of a "
            "jaxpeft.Model pass base.params."
        )


def get(tree: Mapping, path: str, default: Any = None) -> Any:
    """The subtree or leaf at `path`, or `default`."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def put(tree: Mapping, values: Mapping[str, Any]) -> dict:
    """A copy of `tree` with `values` set at their paths; untouched parts are shared."""
    result = dict(tree)
    for path, value in values.items():
        first, _, rest = path.partition("/")
        result[first] = put(result.get(first, {}), {rest: value}) if rest else value
    return result


def without(tree: Mapping, paths: Iterable[str]) -> dict:
    """A copy of `tree` that lacks the leaves at `paths`."""
    gone = set(paths)
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path not in gone})


def ends_in(path: str, ends: Sequence[str]) -> bool:
    """Whether a path is one of `ends`, or ends in "/" and one of them."""
    return any(path == end or path.endswith("/" + end) for end in ends)


@dataclasses.dataclass(frozen=True)
class Site:
    """The place of a module's weight.

    Attributes:
        path: Path of the leaf in the base parameters.
        layer: Index on the leaf's first axis, or None for a leaf that is not stacked.
        row: For a model that is not ours, the leaf's row of `jaxpeft.describe`.
    """

    path: str
    layer: int | None
    row: Any = None


class NamedTree(dict):
    """Base parameters that know the names of their modules: those of a model that is not ours.

    Attributes:
        sites: By the last part of the paths of our own models ("kernel", "bias", "scale",
            "embedding"), the places of such leaves by the full names of their modules.
        table: The path of the embedding table whose rows stand for tokens; "" if there is none, or
            if it is not known which one.
        biases: By the path of a kernel, that of the bias that is added to its products.
    """

    def __init__(
        self,
        tree: Mapping,
        sites: Mapping[str, Mapping[str, Site]],
        table: str = "",
        biases: Mapping[str, str] | None = None,
    ):
        super().__init__(tree)
        self.sites, self.table, self.biases = sites, table, dict(biases or {})


def table_of(params: Mapping) -> str:
    """The path of the embedding table whose rows stand for tokens.

    Raises:
        UserError: There is none, or it is not known which one.
    """
    if not isinstance(params, NamedTree):
        return EMBEDDING
    if params.table:
        return params.table
    known = sorted(site.path for site in params.sites["embedding"].values())
    raise UserError(
        f"embedding: this model has several tables, {first_few(known)}; pass the one whose rows "
        f"stand for tokens, as in init_adapter(..., embedding={known[0]!r})."
        if known
        else "this model looks up no rows of a table, so it has no tokens; see print(roles)."
    )


def is_table(params: Mapping, path: str) -> bool:
    """Whether the leaf at a path is an embedding table."""
    if isinstance(params, NamedTree):
        return any(site.path == path for site in params.sites["embedding"].values())
    return path == EMBEDDING


def is_own(params: Any) -> bool:
    """Whether parameters are nested dicts with the paths and the ranks of our own models."""

    def fits(path: str, leaf: Any) -> bool:
        rank = is_stacked(path) + (2 if path.endswith(("/kernel", "/embedding")) else 1)
        return bool(_OWN.fullmatch(path)) and len(leaf.shape) == rank

    return isinstance(params, Mapping) and all(fits(*item) for item in flatten(params).items())


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` of a model of this package has an axis of layers in front.

    Of another model's leaf this is known from its roles alone (`jaxpeft.methods.adapter.Spec`). A
    number behind ``layers`` tells that the layers are apart.
    """
    return re.match(rf"{LAYERS}(?!\d+(/|$))", path) is not None


def module_name(path: str, layer: int | None = None) -> str:
    """The Hugging Face name of the module that owns the leaf at `path`.

    Example:
        >>> module_name("layers/self_attn/q_proj/kernel", 3)
        'model.layers.3.self_attn.q_proj'
    """
    module = path.rpartition("/")[0]
    if path == HEAD:
        return "lm_head"
    if layer is None:
        return "model." + module.replace("/", ".")
    return f"model.layers.{layer}." + module.removeprefix(LAYERS).replace("/", ".")


def module_names(params: Mapping, leaf: str = "kernel") -> dict[str, Site]:
    """The Hugging Face names of all modules that own a `leaf`, in the order of the layers.

    Args:
        params: Base parameters: arrays, nodes or shapes.
        leaf: Last part of the path: "kernel" for linear modules.

    Returns:
        A dict from full module names to the places of their weights.
    """
    if isinstance(params, NamedTree):
        return dict(params.sites.get(leaf, {}))
    sites: dict[str, Site] = {}
    for path, value in sorted(flatten(params).items()):
        if path.rpartition("/")[2] != leaf:
            continue
        layers = range(value.shape[0]) if is_stacked(path) else [None]
        for layer in layers:
            sites[module_name(path, layer)] = Site(path, layer)
    return sites


def name_matches(pattern: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: a string is a regex matched in full; a list holds names or dotted suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == item or name.endswith("." + item) for item in pattern)


def selects(pattern: Any, name: str, site: Site) -> bool:
    """Whether targets select a module: by its name, its path, or its row.

    Args:
        pattern: Targets, see `match`.
        name: The module's full name.
        site: The place of its weight.
    """
    if callable(pattern):
        return bool(pattern(site.row))
    for item in [pattern] if isinstance(pattern, str) else pattern:
        rule = item if isinstance(pattern, str) else [item]
        if path_matches(item, site.path) if "/" in item else _fits(rule, name, site):
            return True
    return False


def _fits(rule: str | Sequence[str], name: str, site: Site) -> bool:
    return any(name_matches(rule, one) for one in _names(name, site))


def _names(name: str, site: Site) -> list[str]:
    """The names of a module; in a model that is not ours also those of its leaf and its owner."""
    if site.row is None:
        return [name]
    return [name, site.path.replace("/", "."), site.path.rpartition("/")[0].replace("/", ".")]


def path_matches(pattern: str, path: str) -> bool:
    """Whether a path fits a pattern: "*" is a part of a name, "**" any number of names.

    Example:
        >>> [path_matches("**/mlp/*", path) for path in ("mlp/kernel", "a/b/mlp/bias", "mlp/a/b")]
        [True, True, False]
    """
    return captures(pattern, path) is not None


def captures(pattern: str, path: str) -> tuple[str, ...] | None:
    """What the stars of a pattern match, see `path_matches`; None if the path does not fit."""
    text = re.escape(pattern).replace(r"\*\*/", "((?:.*/)?)").replace(r"\*\*", "(.!)")
    text = text.replace(r"\*", "([^/]*)").replace("(.!)", "(.*)")
    found = re.fullmatch(text, path)
    return found and found.groups()


def match(
    targets: Any,
    exclude: Any,
    names: Mapping[str, Site],
    *,
    what: str = "linear module",
) -> dict[str, Site]:
    """Selects the modules to adapt, by PEFT's rules but strictly.

    Args:
        targets: "all-linear" (every kernel but the head's, and no table), a regex matched in full
            against the full name, or a list of names or dotted suffixes. A text with "/" is a
            pattern of a path, see `path_matches`. For a model that is not ours, "all-linear" is
            every kernel that is no convolution, and a predicate over rows of `jaxpeft.describe`
            may be given.
        exclude: Modules to leave out, in the same forms; empty for none. It wins over `targets`.
        names: All candidates, from `module_names`.
        what: What a candidate is, for errors.

    Returns:
        The selected part of `names`.

    Raises:
        UserError: A pattern matches nothing (PEFT says nothing as long as another one matches), or
            a regex is malformed.
    """
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = {name: site for name, site in names.items() if _is_linear(site)}
        if not chosen:
            raise UserError(f"targets {targets!r}: this model has no {what}.")
    elif not names:
        raise UserError(f"targets {targets!r}: this model has no {what}.")
    else:
        for item in _items(targets):
            _require_match("targets", item, isinstance(targets, str), names, what)
        chosen = {name: site for name, site in names.items() if selects(targets, name, site)}
    for item in _items(exclude) if exclude else ():
        _require_match("exclude", item, isinstance(exclude, str), names, what)
    if exclude:
        chosen = {n: site for n, site in chosen.items() if not selects(exclude, n, site)}
    if not chosen:
        raise UserError(f"targets {targets!r} without exclude {exclude!r} leave no module.")
    return chosen


def _is_linear(site: Site) -> bool:
    """Whether "all-linear" adapts a module."""
    return site.path not in (HEAD, EMBEDDING) if site.row is None else site.row.is_linear


def _items(targets: Any) -> Iterable[Any]:
    return [targets] if isinstance(targets, str) or callable(targets) else targets


def _require_match(
    field: str, pattern: Any, is_regex: bool, names: Mapping[str, Site], what: str
) -> None:
    if callable(pattern):
        if any(site.row is None for site in names.values()):
            raise UserError(
                f"{field}: a predicate takes rows of jaxpeft.describe, and this is a model of "
                "jaxpeft, which has none; write names or a regex."
            )
        if not any(selects(pattern, name, site) for name, site in names.items()):
            raise UserError(f"{field}: the predicate holds for no {what} of this model.")
        return
    try:
        items = pattern if is_regex else [pattern]
        found = any(selects(items, name, site) for name, site in names.items())
    except re.error as error:
        raise UserError(f"{field} pattern {pattern!r} is not a valid regex: {error}.") from None
    if found:
        return
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    close = nearest(pattern.rpartition(".")[2], suffixes) or suffixes
    hint = " A tied head shares the embedding and has no kernel." if pattern == "lm_head" else ""
    listed = [part for part in re.split(r"[\s,;|]+", pattern.strip("[]() ")) if part]
    if is_regex and listed and all(any(name_matches([p], n) for n in names) for p in listed):
        rule = f"A single string is a regex for the full name; write [{', '.join(listed)}]."
    elif is_regex and pattern.lower().replace("_", "-").replace(" ", "-") == ALL_LINEAR:
        rule = f"Write {ALL_LINEAR}."
    else:
        rule = (
            "As in PEFT, a list holds names or suffixes, and a single string is "
            f"{ALL_LINEAR!r} or a regex matched against the full name, such as "
            f"{next(iter(names))!r}."
        )
        if any(site.row is not None for site in names.values()):
            rule += " Patterns of paths have a '/'; print(roles) lists all paths."
    raise UserError(
        f"{field} pattern {pattern!r} matches no {what} of this model; closest names: "
        f"{first_few(close, 8)}. {rule}{hint}"
    )
