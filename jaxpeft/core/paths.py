"""Names of modules and arrays: paths into trees, Hugging Face names, and PEFT's target rules.

A leaf of the base has one path (``layers/self_attn/q_proj/kernel``). Because layers are stacked,
the leaf holds one Hugging Face module per layer (``model.layers.0.self_attn.q_proj``, ...). Targets
are matched against those full names, by the rules of HF PEFT 0.21
(``tuners_utils.check_target_module_exists``).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from jaxpeft.core.errors import UserError, first_few, nearest

ALL_LINEAR = "all-linear"
LAYERS = "layers/"
HEAD = "lm_head/kernel"
EMBEDDING = "embed_tokens/embedding"


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
    """

    path: str
    layer: int | None


class NamedTree(dict):
    """Base parameters that know the names of their modules: those of a model that is not ours.

    Attributes:
        sites: By the last part of the paths of our own models ("kernel", "bias", "embedding"), the
            places of such leaves by the full names of their modules.
    """

    def __init__(self, tree: Mapping, sites: Mapping[str, Mapping[str, Site]]):
        super().__init__(tree)
        self.sites = sites


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` has an axis of layers in front."""
    return path.startswith(LAYERS)


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


def match(
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    names: Mapping[str, Site],
    *,
    what: str = "linear module",
) -> dict[str, Site]:
    """Selects the modules to adapt, by PEFT's rules but strictly.

    Args:
        targets: "all-linear" (every kernel but the head's, and no table), a regex matched in full
            against the full name, or a list of names or dotted suffixes.
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
        chosen = {name: s for name, s in names.items() if s.path not in (HEAD, EMBEDDING)}
    else:
        for item in [targets] if isinstance(targets, str) else targets:
            _require_match("targets", item, isinstance(targets, str), names, what)
        chosen = {name: site for name, site in names.items() if name_matches(targets, name)}
    for item in ([exclude] if isinstance(exclude, str) else exclude) if exclude else []:
        _require_match("exclude", item, isinstance(exclude, str), names, what)
    if exclude:
        chosen = {name: site for name, site in chosen.items() if not name_matches(exclude, name)}
    if not chosen:
        raise UserError(f"targets {targets!r} without exclude {exclude!r} leave no module.")
    return chosen


def _require_match(
    field: str, pattern: str, is_regex: bool, names: Mapping[str, Site], what: str
) -> None:
    try:
        found = any(name_matches(pattern if is_regex else [pattern], name) for name in names)
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
    raise UserError(
        f"{field} pattern {pattern!r} matches no {what} of this model; closest names: "
        f"{first_few(close, 8)}. {rule}{hint}"
    )
