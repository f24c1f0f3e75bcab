"""Biases and whole modules that a LoRA trains beside its factors.

Both are trained copies of base leaves (`jaxpeft.methods.leaves.replace`). In a model whose head is
its embedding table, saving one of these modules makes two weights of one, as in HF PEFT:

* ``lm_head`` becomes a separate head, which starts as the transposed table; the table stays;
* ``embed_tokens`` becomes a table for look-ups only (`LookupTable`); the head still reads the
  base's table.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.struct
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few, nearest
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Leaf, require_values
from jaxpeft.methods.leaves.replace import bind_selected, selected_replacement
from jaxpeft.methods.peft.modules import modules_of
from jaxpeft.ops.linear import OnBase, Transposed, attend, embed, materialize

BIASES = ("none", "all", "lora_only")
WEIGHTS = ("kernel", "scale", "embedding")
"""Leaves that count as modules, by the last part of their path; a bias belongs to its kernel."""


@flax.struct.dataclass
class LookupTable(OnBase):
    """A trained embedding table of a model whose head still reads the base's table.

    Attributes:
        base: ``(vocab, d_model)``, an array or a node.
        value: The trained table, float32.
    """

    base: Any
    value: Any

    attends_base: ClassVar[bool] = True

    def lookup(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """Rows of the trained table."""
        return embed(ids, self.value)

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """``x`` times the base's transposed table."""
        return attend(x, self.base)

    def materialize(self) -> Float[Array, "vocab d_model"]:
        """The trained table."""
        return self.value


def bind(leaf: Leaf) -> dict[str, Any]:
    """The trained copy, in the layers in which it is trained."""
    nodes = bind_selected(leaf)
    if leaf.own and leaf.is_table and paths.get(leaf.bound, paths.HEAD) is None:
        return {leaf.path: LookupTable(leaf.base, nodes[leaf.path])}
    return nodes


def check(config: Any) -> None:
    """Checks the fields of a `jaxpeft.LoRA` about biases and modules that are saved whole.

    Raises:
        ValueError: A field is wrong, or two fields do not go together.
    """
    if config.bias not in BIASES:
        known = ", ".join(map(repr, BIASES))
        raise ValueError(f"LoRA.bias must be one of {known}, got {config.bias!r}.")
    modules = config.save_modules
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    if not all(modules):
        raise ValueError(f"LoRA.save_modules must be names of modules, got {modules!r}.")
    object.__setattr__(config, "save_modules", modules)
    if config.lora_bias and config.dora:
        raise ValueError("LoRA.lora_bias must be false with dora.")
    if config.lora_bias and config.init_weights != "default":
        raise ValueError(f"LoRA.lora_bias must be false with init_weights {config.init_weights!r}.")


def sites_of(params: Mapping, leaf: str) -> dict[str, paths.Site]:
    """All modules that own a `leaf`, by full name, including a head that is the embedding table."""
    sites = paths.module_names(params, leaf)
    own = not isinstance(params, paths.NamedTree)
    if leaf == "kernel" and own and paths.get(params, paths.HEAD) is None:
        sites["lm_head"] = paths.Site(paths.HEAD, None)
    return sites


def saved_modules(names: Iterable[str], params: Mapping) -> tuple[str, ...]:
    """Full names of the modules that `LoRA.save_modules` selects.

    A name selects all modules that have it as a dotted part of theirs: ``norm`` is only the last
    norm, ``mlp`` is everything inside an MLP.

    Raises:
        UserError: A name selects no module.
    """
    known = list(dict.fromkeys(name for leaf in WEIGHTS for name in sites_of(params, leaf)))
    chosen = []
    for item in names:
        pattern = re.compile(rf"(^|.*\.){re.escape(item)}($|\..*)")
        found = [name for name in known if pattern.fullmatch(name)]
        if not found:
            suffixes = sorted({name.rpartition(".")[2] for name in known})
            close = nearest(item.rpartition(".")[2], suffixes) or suffixes
            raise UserError(
                f"LoRA.save_modules: {item!r} is no module of this model; closest names: "
                f"{first_few(close, 8)}."
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def start(
    params: dict, saved: Iterable[str], bias: str, adapted: Iterable[str]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Trained copies of whole modules and of biases, equal to the base's at first.

    Args:
        params: Base parameters.
        saved: Full names of modules.
        bias: A choice of `BIASES`.
        adapted: Full names of the modules with factors.

    Returns:
        Trained and frozen arrays by path.

    Raises:
        UserError: There are no biases to train, or only shapes.
    """
    saved, biased = set(saved), paths.module_names(params, "bias")
    trained = set(biased) if bias == "all" else set(biased) & set(adapted)
    if bias != "none" and not trained:
        none = "this model has no biases" if bias == "all" else "no adapted module has a bias"
        raise UserError(f"LoRA.bias {bias!r}: {none}; set it to 'none'.")
    groups = [
        {name: site for name, site in sites_of(params, leaf).items() if name in saved}
        for leaf in WEIGHTS
    ]
    chosen = saved if bias == "none" else saved | trained
    groups.append({name: site for name, site in biased.items() if name in chosen})
    values, buffers = {}, {}
    for sites in filter(None, groups):
        made = selected_replacement("lora", _with_leaves(params, sites), sites)
        for path in made.spec.paths:
            values[path] = paths.get(made.params, path)
            buffers[path] = paths.get(made.buffers, path)
    return values, buffers


def require_apart(factors: Iterable[str], copies: Iterable[str]) -> None:
    """Checks that no kernel is adapted in some layers and saved whole in others.

    Args:
        factors: Paths of kernels that are adapted.
        copies: Paths of kernels that are saved whole.

    Raises:
        UserError: A path is in both.
    """
    if both := sorted(set(factors) & set(copies)):
        raise UserError(
            f"{both[0]}: some of its layers are saved whole and others adapted, which one adapter "
            "cannot hold; save the module in all layers, or leave it out of the targets."
        )


def fields(adapter: Adapter) -> dict[str, Any]:
    """The config's field that trained copies determine: the saved modules, by full names."""
    names = [name for name, path, _ in modules_of(adapter) if not path.endswith("/bias")]
    return {"save_modules": tuple(names)}


def _with_leaves(params: dict, sites: Mapping[str, paths.Site]) -> dict:
    """The parameters with a tied head as a leaf of its own; shapes without values are an error."""
    for site in sites.values():
        leaf = paths.get(params, site.path)
        leaf = paths.get(params, paths.EMBEDDING) if leaf is None else leaf
        require_values(leaf, "LoRA.bias and LoRA.save_modules start from the base's values")
    tied = paths.get(params, paths.HEAD) is None
    if tied and any(site.path == paths.HEAD for site in sites.values()):
        table = paths.get(params, paths.EMBEDDING)
        return paths.put(params, {paths.HEAD: materialize(Transposed(table))})
    return params
