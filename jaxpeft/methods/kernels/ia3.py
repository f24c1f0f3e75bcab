"""IA3: activations are scaled, element by element, by trained vectors.

Keys and values are scaled after their kernel and bias, ``y = l * (x W + b)``; a feed-forward module
is scaled before its kernel, ``y = (l * x) W + b``. All vectors start at one. Layers of a stack that
are not adapted hold zeros and have rank 0.

Reference:
    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", 2022, https://arxiv.org/abs/2205.05638, section 3.3.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import keep_targets
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import (
    contiguous,
    modules_of,
    require_finite,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import OnBase, Operation, linear, materialize, shape_of, through

FEEDFORWARD = ("down_proj",)
"""Modules that PEFT scales before the kernel if no feed-forward modules are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Which modules are scaled, and on which side.

    Attributes:
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        feedforward: Targets that are scaled before the kernel: a regex or names.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
    """

    name: ClassVar[str] = "ia3"

    targets: paths.Targets = ("k_proj", "v_proj", "down_proj")
    feedforward: str | tuple[str, ...] = FEEDFORWARD
    exclude: paths.Targets = ()

    def __post_init__(self):
        keep_targets(self, "feedforward")

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter whose vectors are all one.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key; not used.
            context: Not used.

        Returns:
            The adapter.

        Raises:
            UserError: If a pattern matches nothing, a feed-forward pattern none of the targets, or
                it matches a module in some layers only.
        """
        del key, context
        sites = paths.match(self.targets, self.exclude, paths.module_names(params))
        patterns = self.feedforward
        one = isinstance(patterns, str) or callable(patterns)
        for form in [patterns] if one else [(item,) for item in patterns]:
            if form and not any(paths.selects(form, name, site) for name, site in sites.items()):
                raise UserError(
                    f"IA3.feedforward: {form!r} matches none of the targets; name it in "
                    "IA3.targets too, or leave it out of IA3.feedforward."
                )
        names = {n for n, site in sites.items() if paths.selects(self.feedforward, n, site)}
        feedforward = feedforward_paths(sites, names, "IA3.feedforward")
        vectors, buffers = {}, {}
        for path, rank in selected_layers(params, sites).items():
            *_, d_in, d_out = shape_of(paths.get(params, path))
            ones = jnp.ones((*rank.shape, d_in if path in feedforward else d_out))
            vectors[path] = {"l": jnp.where(rank[..., None] > 0, ones, 0.0)}
            buffers[path] = {"rank": rank}
        return make_adapter(vectors, buffers, feedforward)


def make_adapter(vectors: dict, buffers: dict, feedforward: tuple[str, ...]) -> Adapter:
    """An adapter from its arrays by path."""
    options = (("feedforward", feedforward),)
    spec = Spec(kind=IA3.name, paths=tuple(sorted(vectors)), options=options)
    return Adapter(paths.unflatten(vectors), paths.unflatten(buffers), spec)


def feedforward_paths(
    sites: Mapping[str, paths.Site], names: Iterable[str], where: str
) -> tuple[str, ...]:
    """The paths of feed-forward modules.

    Args:
        sites: All adapted modules.
        names: The modules that are scaled before the kernel.
        where: The field that errors are about.

    Raises:
        UserError: Adapted layers of one path are on different sides.
    """
    chosen = {sites[name].path for name in names}
    mixed = [name for name, site in sites.items() if site.path in chosen and name not in names]
    if mixed:
        raise UserError(
            f"{where}: names a module in some of its adapted layers, but not in {len(mixed)} "
            f"others: {first_few(sorted(mixed), 3)}; all layers of a module are scaled on the same "
            "side."
        )
    return tuple(sorted(chosen))


@flax.struct.dataclass
class IA3Kernel(OnBase):
    """A frozen kernel with its inputs or outputs scaled.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        l: ``(d_in,)`` if `feedforward`, else ``(d_out,)``, float32.
        rank: Scalar; 0 for a layer that is left alone.
        feedforward: Whether the inputs are scaled.
    """

    base: Any
    l: Any  # noqa: E741 (the paper's name)
    rank: Any
    feedforward: bool = flax.struct.field(pytree_node=False, default=False)

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``(l * x) W`` or ``l * (x W)``; the scaling in float32, rounded to the dtype of `x`."""
        scale = scale_of(self.l, self.rank)
        if self.feedforward:
            return linear((x.astype(scale.dtype) * scale).astype(x.dtype), self.base)
        return (linear(x, self.base).astype(scale.dtype) * scale).astype(x.dtype)

    def through(self, x: Any, operation: Operation) -> Any:
        """Scales the result of another operation; scaled inputs need the scaled kernel."""
        if self.feedforward:
            return operation(x, self.materialize())
        scale = scale_of(self.l, self.rank)
        return (through(x, self.base, operation).astype(scale.dtype) * scale).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """The scaled kernel in float32, rounded to the base's dtype; also of a stack."""
        scale = scale_of(self.l, self.rank)
        scale = scale[..., :, None] if self.feedforward else scale[..., None, :]
        return (materialize(self.base).astype(jnp.float32) * scale).astype(self.dtype)


def scale_of(vector: Float[Array, "*stack d"], rank: Any) -> Float[Array, "*stack d"]:
    """The vector, or ones without a gradient where the rank is 0."""
    return jnp.where(jnp.asarray(rank)[..., None] > 0, vector, 1.0)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel and, if its outputs are scaled, its scaled bias."""
    vector, rank = leaf.params["l"], leaf.buffers["rank"]
    feedforward = leaf.path in leaf.options["feedforward"]
    bound = {leaf.path: IA3Kernel(leaf.base, vector, rank, feedforward=feedforward)}
    bias = paths.get(leaf.bound, leaf.bias)
    if bias is not None and not feedforward:
        scale = scale_of(vector, rank).reshape(bias.shape)
        bound[leaf.bias] = bias.astype(jnp.float32) * scale
    return bound


def check(params: dict, adapter: Adapter) -> None:
    """Checks that vectors are as long as the base's inputs or outputs.

    Raises:
        UserError: A vector has another length.
    """
    feedforward = dict(adapter.spec.options)["feedforward"]
    for path in adapter.spec.paths:
        *stacked, d_in, d_out = shape_of(paths.get(params, path))
        ours = (*stacked, d_in if path in feedforward else d_out)
        theirs = tuple(paths.get(adapter.params, f"{path}/l").shape)
        if theirs != ours:
            raise UserError(
                f"{path}: the adapter has vectors of shape {theirs}, this base needs {ours}; it "
                "belongs to another model."
            )


def config_of(adapter: Adapter) -> IA3:
    """The config of an adapter; targets come back as full names."""
    names, feedforward = _names(adapter)
    return IA3(targets=tuple(names), feedforward=tuple(feedforward))


def config_from_peft(values: Values) -> IA3:
    """Reads PEFT's config; see `PeftFormat`.

    Raises:
        UserError: The config names no modules.
    """
    values.only("init_ia3_weights", True)
    if values.get("target_modules") is None:
        raise values.wrong(
            "target_modules", "names or a regex, as PEFT's choice depends on the base"
        )
    fields = values.selection(()).fields(values.file)
    inner, targets = values.names("feedforward_modules", FEEDFORWARD), fields["targets"]
    if values.get("feedforward_modules") is None and not isinstance(targets, str):
        inner = tuple(n for n in inner if any(paths.name_matches((n,), t) for t in targets))
    return IA3(feedforward=inner, **fields)


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`."""
    sites = paths.module_names(base.params)
    attention = "q_proj" if base.config.model_type.startswith("qwen") else "k_proj"
    default = (attention, "v_proj", *FEEDFORWARD)
    chosen = values.selection(default).select(sites, values.file)
    pattern = values.names("feedforward_modules", FEEDFORWARD)
    names = {name for name in chosen if _is_feedforward(pattern, name)}
    where = f"{values.file}: feedforward_modules"
    feedforward = feedforward_paths(chosen, names, where)
    shapes = {}
    for name, site in chosen.items():
        *_, d_in, d_out = shape_of(paths.get(base.params, site.path))
        shapes[_key(name)] = (1, d_in) if name in names else (d_out, 1)
    tensors.require(shapes, base.name)
    modules = {name: {"l": tensors.read(_key(name)).reshape(-1)} for name in chosen}
    vectors = stack(modules, sites, base.params)
    buffers = {path: {"rank": rank} for path, rank in selected_layers(base.params, chosen).items()}
    return make_adapter(vectors, buffers, feedforward)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    names, feedforward = _names(adapter)
    tensors = {}
    for name, path, at in modules_of(adapter):
        vector = np.asarray(paths.get(adapter.params, f"{path}/l"))[at]
        require_finite(name, vector)
        tensors[_key(name)] = contiguous(
            vector.reshape((1, -1) if name in feedforward else (-1, 1))
        )
    targets = targets_value(names, paths.module_names(base.params))
    # PEFT requires the feed-forward modules to be in the list of targets, letter by letter.
    inner = [t for t in targets if any(paths.name_matches((t,), name) for name in feedforward)]
    return {"feedforward_modules": inner, "target_modules": targets}, tensors


def _names(adapter: Adapter) -> tuple[list[str], set[str]]:
    """Full names of all adapted modules, and of those scaled before the kernel."""
    sites = {name: path for name, path, _ in modules_of(adapter)}
    feedforward = dict(adapter.spec.options)["feedforward"]
    return list(sites), {name for name, path in sites.items() if path in feedforward}


def _is_feedforward(pattern: str | tuple[str, ...], name: str) -> bool:
    """PEFT's rule, which ignores dots in names."""
    if isinstance(pattern, str):
        return paths.name_matches(pattern, name)
    return name.endswith(tuple(pattern))


def _key(name: str) -> str:
    return f"{PREFIX}{name}.ia3_l"


PEFT = PeftFormat(
    type="IA3",
    title="IA3 adapter",
    defaults={
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "target_modules": None,
    },
    read_keys=("exclude_modules", "feedforward_modules", "target_modules"),
    harmless_keys=("init_ia3_weights",),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=IA3,
    bind=bind,
    leaf_shape=lambda params: None,
    config_of=config_of,
    check=check,
    peft=PEFT,
)
