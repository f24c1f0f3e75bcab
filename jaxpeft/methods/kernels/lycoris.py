"""Common parts of LoHa and LoKr: rank and alpha of modules, initialisation, PEFT settings.

Reference:
    Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
    Evaluation", 2023, https://arxiv.org/abs/2309.14859.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.core.float32 import require
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.fields import keep_targets, require_alpha, require_count
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.peft.modules import (
    default_and_exceptions,
    modules_of,
    shortest_decimal,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.patterns import first_match
from jaxpeft.methods.peft.values import Values

DEFAULTS: dict[str, Any] = {
    "alpha": 8,
    "alpha_pattern": {},
    "exclude_modules": None,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "module_dropout": 0.0,
    "modules_to_save": None,
    "r": 8,
    "rank_dropout": 0.0,
    "rank_pattern": {},
    "target_modules": None,
    "use_effective_conv2d": False,
}
"""Keys that PEFT writes for both methods, with the values that change nothing."""

READ_KEYS = (
    *("alpha", "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "r"),
    *("rank_pattern", "target_modules"),
)
HARMLESS_KEYS = (
    *("init_weights", "module_dropout", "rank_dropout"),
    "use_effective_conv2d",  # there are no convolutions
)


def check_fields(method: Any) -> None:
    """Checks rank, alpha and targets of a `jaxpeft.LoHa` or `jaxpeft.LoKr`.

    Raises:
        ValueError: A field has a value that makes no sense.
    """
    require_count(method, "rank")
    require_alpha(method)
    require(f"{type(method).__name__}.alpha divided by the rank", method.alpha / method.rank)
    keep_targets(method)


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """PEFT's Kaiming initialisation with ``a = sqrt(5)``: uniform within ``1 / sqrt(fan_in)``."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def new_adapter(
    method: Any,
    params: dict,
    key: jax.Array,
    draw: Callable[[str, jax.Array], dict[str, jax.Array]],
    options: tuple = (),
) -> Adapter:
    """An adapter with drawn factors, which are zero in layers that are not chosen.

    Args:
        method: A config with rank, alpha, targets and exclude.
        params: Base parameters; shapes are enough.
        key: Typed PRNG key; the numbers of every path depend only on it and the path.
        draw: ``draw(path, key)`` returns the factors of one path, for all its layers.
        options: The spec's options.
    """
    sites = paths.match(method.targets, method.exclude, paths.module_names(params))
    factors, buffers = {}, {}
    for path, chosen in selected_layers(params, sites).items():
        drawn = draw(path, jax.random.fold_in(key, zlib.crc32(path.encode())))
        on = (chosen > 0)[..., None, None]
        factors[path] = {name: jnp.where(on, value, 0.0) for name, value in drawn.items()}
        scale = jnp.float32(method.alpha / method.rank)
        buffers[path] = {"rank": chosen * method.rank, "scale": jnp.where(chosen > 0, scale, 0.0)}
    return make_adapter(method.name, factors, buffers, method.rank, options)


def make_adapter(
    kind: str, factors: dict, buffers: dict, rank: int, options: tuple = ()
) -> Adapter:
    """An adapter from its arrays by path."""
    spec = Spec(kind=kind, paths=tuple(sorted(factors)), rank=rank, options=options)
    return Adapter(paths.unflatten(factors), paths.unflatten(buffers), spec)


def rank_and_alpha(adapter: Adapter) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha and full names of an adapter's modules.

    Raises:
        UserError: If ranks or scales differ from layer to layer.
    """
    ranks, alphas = ranks_and_alphas(adapter)
    mixed = [n for n, v in (("rank", ranks), ("alpha", alphas)) if len(set(v.values())) > 1]
    if mixed:
        raise UserError(f"layers of this adapter differ in {', '.join(mixed)}.")
    return next(iter(ranks.values())), float(next(iter(alphas.values()))), tuple(ranks)


def ranks_and_alphas(adapter: Adapter) -> tuple[dict[str, int], dict[str, int | float]]:
    """Rank and alpha by full module name; whole alphas are ints, as in PEFT's files.

    Raises:
        UserError: No module is adapted.
    """
    ranks, alphas = {}, {}
    for name, path, at in modules_of(adapter):
        rank, scale = (
            np.asarray(paths.get(adapter.buffers, f"{path}/{key}"))[at] for key in ("rank", "scale")
        )
        ranks[name] = int(rank)
        alpha = shortest_decimal(scale, int(rank))
        alphas[name] = int(alpha) if alpha.is_integer() else alpha
    if not ranks:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    return ranks, alphas


def fields_from_peft(values: Values) -> dict[str, Any]:
    """The fields that both configs have, from PEFT's config; see `PeftFormat`."""
    for key in ("rank_pattern", "alpha_pattern"):
        values.only(key, {})
    for key in ("module_dropout", "rank_dropout"):
        values.only(key, 0)
    values.only("init_weights", True)
    fields = values.selection().fields(values.file)
    return {"rank": values.count("r"), "alpha": float(values.number("alpha")), **fields}


def read_ranks(values: Values, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Rank and scale by full module name, from PEFT's config with its patterns."""
    rank, alpha = values.count("r"), values.number("alpha")
    ranks = values.pattern("rank_pattern", whole=True)
    alphas = values.pattern("alpha_pattern", whole=False)
    result = {}
    for name in names:
        r = first_match(ranks, name, rank)
        result[name] = r, first_match(alphas, name, alpha) / r
    return result


def ranks_values(adapter: Adapter, base: Any) -> dict[str, Any]:
    """PEFT's config values for targets, ranks and alphas."""
    ranks, alphas = ranks_and_alphas(adapter)
    rank, rank_pattern = default_and_exceptions(ranks)
    alpha, alpha_pattern = default_and_exceptions(alphas)
    return {
        "alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets_value(ranks, paths.module_names(base.params)),
    }


def stacked_adapter(
    kind: str,
    modules: Mapping[str, Mapping[str, Any]],
    ranks: Mapping[str, tuple[int, float]],
    base: Any,
    options: tuple = (),
) -> Adapter:
    """An adapter from the factors of single modules, padded to one rank."""
    sites = paths.module_names(base.params)
    numbers = {
        name: {"rank": np.int32(ranks[name][0]), "scale": np.float32(ranks[name][1])}
        for name in modules
    }
    width = max(ranks[name][0] for name in modules)
    factors, buffers = (stack(by_name, sites, base.params) for by_name in (modules, numbers))
    return make_adapter(kind, factors, buffers, width, options)
