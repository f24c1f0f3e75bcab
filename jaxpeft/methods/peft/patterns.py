"""Selects modules by the rules of HF PEFT 0.21, for a config or an ``adapter_config.json``.

The rules are those of ``tuners_utils.check_target_module_exists`` and ``utils/other.py``.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError


def keep_names(config: Any, *fields: str) -> None:
    """Makes tuples of a config's fields that list names of modules; regexes stay text.

    Raises:
        ValueError: A field is neither, nor a predicate, or its regex is malformed.
    """
    for field in fields:
        value, where = getattr(config, field), f"{type(config).__name__}.{field}"
        if callable(value):
            continue
        if isinstance(value, str):
            if "/" not in value:  # else it is the pattern of a path
                check_regex(where, value)
        elif isinstance(value, Iterable) and all(isinstance(name, str) for name in value):
            object.__setattr__(config, field, tuple(value))
        else:
            raise ValueError(f"{where} must be a text or a list of names, got {value!r:.60}.")


def check_regex(where: str, pattern: str) -> None:
    """Checks that `pattern` is a regex.

    Raises:
        ValueError: The pattern is malformed; the message begins with `where`.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r} is not a valid regex: {error}.") from None


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The modules that an ``adapter_config.json`` adapts.

    Attributes:
        targets: "all-linear", a regex, or names and suffixes.
        exclude: A regex, or names and suffixes; empty for nothing.
        layers: Layer indices to adapt, or None for all.
        layers_pattern: Names of the list of layers, or empty for any.
    """

    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def fields(self, where: Any) -> dict[str, Any]:
        """`targets` and `exclude` of a `Method` that selects the same modules.

        If layers are chosen, names become a regex that contains the layers.

        Raises:
            UserError: There is a regex beside layers, which PEFT does not accept either, or the
                names of the layers are not those of our models.
        """
        if self.layers is None:
            return {"targets": self.targets, "exclude": self.exclude}
        if isinstance(self.targets, str):
            raise UserError(
                f"{where}: layers_to_transform: goes with a list of target_modules, not with the "
                f"regex {self.targets!r:.60}; write the layers into the regex."
            )
        probe = dataclasses.replace(self, targets=("up_proj",), exclude=(), layers=(7,))
        if not probe.selects("model.layers.7.mlp.up_proj"):
            raise UserError(
                f"{where}: layers_pattern: {list(self.layers_pattern)!r:.60} is not the list "
                "of layers of these models: 'layers'."
            )
        layers = "|".join(map(str, self.layers))
        names = "|".join(map(re.escape, self.targets))
        inside = rf"(?=model\.layers\.(?:{layers})\.)(?:.*\.)?(?:{names})"
        return {"targets": f"{inside}|{names}", "exclude": self.exclude}

    def selects(self, name: str) -> bool:
        """Whether PEFT would adapt the module with this full name."""
        if self.exclude and paths.name_matches(self.exclude, name):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == paths.ALL_LINEAR:
                return name.rpartition(".")[2] not in ("lm_head", "embed_tokens")
            return paths.name_matches(self.targets, name)
        if name in self.targets:
            return True  # PEFT ignores layers for a module named in full
        if not paths.name_matches(self.targets, name):
            return False
        return self.layers is None or layer_of(name, self.layers_pattern) in self.layers

    def select(self, sites: Mapping[str, paths.Site], where: Any) -> dict[str, paths.Site]:
        """The selected part of `sites`.

        Raises:
            UserError: Nothing is selected; the message begins with `where`.
        """
        chosen = {name: site for name, site in sites.items() if self.selects(name)}
        if not chosen:
            raise UserError(
                f"{where}: target_modules {self.targets!r:.80} selects no module of this base; "
                "the adapter was made for another model."
            )
        return chosen


def layer_of(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The layer of a module, found in its name by PEFT's rule, or None.

    Args:
        name: Full name of the module.
        patterns: Names of the list of layers, or empty for any.
    """
    prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in patterns]
    for prefix in prefixes or [r".*?\.[^.]*"]:
        if found := re.match(rf"{prefix}\.(\d+)\.", name):
            return int(found.group(1))
    return None


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name` by PEFT's rule, or `default`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
