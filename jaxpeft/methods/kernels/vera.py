"""VeRA: all layers share two frozen random matrices and train two vectors each.

A kernel ``W`` is used as ``W + (A * d) B * b``: ``A: (d_in, rank)`` and ``B: (rank, d_out)`` are
drawn once, frozen and cut to the size of each kernel; the vectors ``d: (rank,)`` and
``b: (d_out,)`` are trained. ``d`` starts at a constant and ``b`` at zero. Flax kernels are the
transpose of the paper's. Layers that are not adapted hold zeros in both vectors and have rank 0.
``A`` and ``B`` are stored once, in the adapter's buffers under ``shared``, and broadcast to layers.

Reference:
    Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2023,
    https://arxiv.org/abs/2310.11454, equation 2.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import keep_targets, require_count, require_dropout
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.lora.nodes import drop
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import (
    contiguous,
    modules_of,
    one_dropout,
    require_finite,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import PRODUCT, SHARED, OnBase, linear, materialize, shape_of

HIGHEST = jax.lax.Precision.HIGHEST

A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Which kernels to adapt, and how.

    Attributes:
        rank: Inner dimension of ``A B``; larger than in LoRA, as a rank costs one number a layer.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        dropout: Probability of dropping an input of the branch, in [0, 1).
        d_initial: Initial value of the vectors ``d``.
    """

    name: ClassVar[str] = "vera"

    rank: int = 256
    targets: paths.Targets = "all-linear"
    exclude: paths.Targets = ()
    dropout: float = 0.0
    d_initial: float = 0.1

    def __post_init__(self):
        require_count(self, "rank")
        require_dropout(self)
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise ValueError(f"VeRA.d_initial must be finite and not 0, got {self.d_initial!r}.")
        keep_targets(self)

    @property
    def drops(self) -> bool:
        """Whether training drops inputs of the branch."""
        return self.dropout > 0

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        A and B are uniform within ``sqrt(6 / inputs)``, which is PEFT's distribution, but the
        numbers differ from those of torch's generator. Saved adapters contain A and B.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.
            context: Not used.

        Returns:
            The adapter; ``jax.jit`` of this function works.

        Raises:
            UserError: If a pattern matches nothing.
        """
        del context
        sites = paths.match(self.targets, self.exclude, paths.module_names(params))
        vectors, buffers = {}, {}
        for path, chosen in selected_layers(params, sites).items():
            d_out = shape_of(paths.get(params, path))[-1]
            start = jnp.full((*chosen.shape, self.rank), self.d_initial, jnp.float32)
            vectors[path] = {
                "d": jnp.where(chosen[..., None] > 0, start, 0.0),
                "b": jnp.zeros((*chosen.shape, d_out)),
            }
            buffers[path] = {
                "rank": chosen * self.rank,
                "dropout": jnp.full(chosen.shape, self.dropout, jnp.float32),
            }
        key_a, key_b = jax.random.split(key)
        shape_a, shape_b = projection_shapes(params, vectors, self.rank)
        return make_adapter(vectors, buffers, kaiming(key_a, shape_a), kaiming(key_b, shape_b))


def kaiming(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform numbers within ``sqrt(6 / inputs)``."""
    bound = math.sqrt(6.0 / shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def projection_shapes(
    params: Mapping, places: Iterable[str], rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B, which fit the largest of the adapted kernels."""
    shapes = [shape_of(paths.get(params, path)) for path in places]
    return (max(s[-2] for s in shapes), rank), (rank, max(s[-1] for s in shapes))


def make_adapter(vectors: dict, buffers: dict, a: Any, b: Any, prng_key: int = 0) -> Adapter:
    """An adapter from its arrays by path, A and B, and the key that PEFT drew A and B from.

    The key is kept for saving, because PEFT requires all adapters of a model to have the same.
    """
    spec = Spec(kind=VeRA.name, paths=tuple(sorted(vectors)), rank=a.shape[-1])
    shared = {"a": a, "b": b, "prng_key": jnp.uint32(prng_key)}
    return Adapter(paths.unflatten(vectors), paths.unflatten(buffers) | {SHARED: shared}, spec)


@flax.struct.dataclass
class VeRAKernel(OnBase):
    """A frozen kernel with its two vectors and the matrices that all layers share.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        d: ``(rank,)``, float32.
        b: ``(d_out,)``, float32.
        dropout: Scalar probability; used only with a key.
        key: PRNG key of this step and kernel, or None to drop nothing.
        shared: ``a`` of at least ``(d_in, rank)`` and ``b`` of at least ``(rank, d_out)``, never
            stacked; None while `jaxpeft.ops.linear.take_shared` holds them.
    """

    base: Any
    d: Any
    b: Any
    dropout: Any = 0.0
    key: Any = None
    shared: Any = None

    def matrices(self) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
        """A and B, cut to the size of the kernel; no gradient reaches them."""
        d_in, d_out = self.shape[-2:]
        a, b = (jax.lax.stop_gradient(self.shared[name]) for name in ("a", "b"))
        return a[:d_in], b[:, :d_out]

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x (base + (A * d) B * b)``; the branch and the sum in float32, rounded once."""
        y = linear(x, self.base)
        a, b = self.matrices()
        h = x.astype(self.d.dtype)
        if self.key is not None:
            h = drop(h, self.dropout, self.key)
        low = checkpoint_name(h @ a, PRODUCT)
        change = checkpoint_name((low * self.d) @ b, PRODUCT) * self.b
        return (y.astype(change.dtype) + change).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``base + (A * d) B * b`` in float32, rounded to the base's dtype; also of a stack."""
        a, b = self.matrices()
        delta = jnp.matmul(a * self.d[..., None, :], b, precision=HIGHEST) * self.b[..., None, :]
        return (materialize(self.base).astype(jnp.float32) + delta).astype(self.dtype)

    def product(self) -> tuple[np.ndarray, np.ndarray] | None:
        """``A * d`` and ``B * b``, see `OnBase.product`."""
        a, b, d, out = (np.asarray(x, np.float64) for x in (*self.matrices(), self.d, self.b))
        return a * d[..., None, :], b * out[..., None, :]


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel adapted with VeRA."""
    d, b, dropout = leaf.params["d"], leaf.params["b"], leaf.buffers["dropout"]
    shared = {name: leaf.shared[name] for name in "ab"}
    return {leaf.path: VeRAKernel(leaf.base, d, b, dropout, leaf.keys(), shared)}


def check(params: dict, adapter: Adapter) -> None:
    """Checks that A, B and the vectors have the sizes that the base needs.

    Raises:
        UserError: An array is too small or too large.
    """
    a, b = (paths.get(adapter.buffers, f"{SHARED}/{name}").shape for name in ("a", "b"))
    for path in adapter.spec.paths:
        shape = shape_of(paths.get(params, path))
        theirs = tuple(paths.get(adapter.params, f"{path}/b").shape)
        if theirs != (*shape[:-2], shape[-1]) or a[-2] < shape[-2] or b[-1] < shape[-1]:
            raise UserError(
                f"{path}: the adapter has vectors of shape {theirs} and matrices for at most "
                f"{a[-2]} x {b[-1]}, this base has shape {shape}; it belongs to another model."
            )


def weigh(adapter: Adapter, weight: Any) -> Adapter:
    """The adapter with its change multiplied by `weight`, by way of its vectors ``b``."""
    scaled = {
        path: value * weight if path.endswith("/b") else value
        for path, value in paths.flatten(adapter.params).items()
    }
    return dataclasses.replace(adapter, params=paths.unflatten(scaled))


def config_of(adapter: Adapter) -> VeRA:
    """The config of an adapter, with targets as full names and the default `d_initial`.

    Raises:
        UserError: If dropout differs from layer to layer.
    """
    names = tuple(name for name, _, _ in modules_of(adapter))
    return VeRA(rank=adapter.spec.rank, targets=names, dropout=one_dropout(adapter))


def config_from_peft(values: Values) -> VeRA:
    """Reads PEFT's config; see `PeftFormat`."""
    values.only("init_weights", True)
    return VeRA(
        rank=values.count("r"),
        dropout=values.probability("vera_dropout"),
        d_initial=float(values.number("d_initial")),
        **values.selection().fields(values.file),
    )


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`.

    Raises:
        UserError: The folder lacks A and B, or its ``projection_prng_key`` is no key.
    """
    sites = paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    if not values.flag("save_projection"):
        raise UserError(
            f"{values.file}: save_projection: false leaves A and B to torch's random generator, "
            "which cannot be reproduced here; in PEFT, store the model's buffers as tensors "
            f"{A_KEY} and {B_KEY}, and set save_projection to true."
        )
    rank, dropout = values.count("r"), values.probability("vera_dropout")
    prng_key = values.get("projection_prng_key")
    if type(prng_key) is not int or not 0 <= prng_key < 2**32:
        raise values.wrong("projection_prng_key", "a whole number from 0 to 2**32 - 1")
    ranks = selected_layers(base.params, chosen)
    shape_a, shape_b = projection_shapes(base.params, ranks, rank)
    shapes = {A_KEY: shape_a[::-1], B_KEY: shape_b[::-1]}
    for name, site in chosen.items():
        shapes[_key(name, "d")] = (rank,)
        shapes[_key(name, "b")] = shape_of(paths.get(base.params, site.path))[-1:]
    tensors.require(shapes, base.name)
    modules = {n: {part: tensors.read(_key(n, part)) for part in "db"} for n in chosen}
    buffers = {
        path: {"rank": on * rank, "dropout": jnp.full(on.shape, dropout, jnp.float32)}
        for path, on in ranks.items()
    }
    a, b = (jnp.asarray(tensors.read(key).T) for key in (A_KEY, B_KEY))
    return make_adapter(stack(modules, sites, base.params), buffers, a, b, prng_key)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder, A and B among them; see `PeftFormat`.

    Raises:
        UserError: The adapter adapts no module.
    """
    tensors, names = {}, []
    for name, path, at in modules_of(adapter):
        for part in "db":
            vector = np.asarray(paths.get(adapter.params, f"{path}/{part}"))[at]
            require_finite(name, vector)
            tensors[_key(name, part)] = contiguous(vector)
        names.append(name)
    if not names:
        raise UserError("the adapter adapts no module: all its ranks are 0.")
    shared = adapter.buffers[SHARED]
    tensors[A_KEY], tensors[B_KEY] = (contiguous(np.asarray(shared[part]).T) for part in "ab")
    values = {
        "projection_prng_key": int(shared["prng_key"]),
        "r": adapter.spec.rank,
        "target_modules": targets_value(names, paths.module_names(base.params)),
        "vera_dropout": one_dropout(adapter),
    }
    return values, tensors


def _key(name: str, part: str) -> str:
    return f"{PREFIX}{name}.vera_lambda_{part}"


PEFT = PeftFormat(
    type="VERA",
    title="VeRA adapter",
    defaults={
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "projection_prng_key": 0,
        "r": 256,
        "save_projection": True,
        "target_modules": None,
        "vera_dropout": 0.0,
    },
    read_keys=(
        *("layers_pattern", "layers_to_transform", "projection_prng_key", "r", "save_projection"),
        *("target_modules", "vera_dropout"),
    ),
    harmless_keys=("d_initial", "init_weights"),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=VeRA,
    bind=bind,
    config_of=config_of,
    arrays={"b": ArrayRole(side="out", fast=True), "d": ArrayRole(rank_axis=-1, fast=True)},
    weigh=weigh,
    check=check,
    peft=PEFT,
)
