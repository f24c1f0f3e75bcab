"""Low-rank adaptation (LoRA): the config, its initialisation and its kernel node.

A kernel ``W`` of shape ``(d_in, d_out)`` is used as ``W + scale * A @ B`` with
``A: (d_in, rank)`` and ``B: (rank, d_out)``; ``scale`` is ``alpha / rank``, or
``alpha / sqrt(rank)`` with rank stabilisation. Stacked layers put one axis in front of all of
them. Flax kernels are the transpose of the paper's, so our ``A @ B`` is the paper's
``(B A)^T``. Layers of a stack that are not adapted hold zeros in both factors and have rank 0:
their gradients are zero, and so they stay.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685, section 4.1.
    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023,
    https://arxiv.org/abs/2312.03732.
"""

import dataclasses
import math
import zlib
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft import paths
from jaxpeft.errors import UserError
from jaxpeft.linear import Node, dtype_of, linear, materialise, shape_of
from jaxpeft.methods.base import Adapter, Spec

NEEDS_BASE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which kernels to adapt, and how strongly.

    Attributes:
        rank: Inner dimension of ``A @ B``.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        dropout: Probability of dropping an input of the low-rank branch, in [0, 1).
        rslora: Divide alpha by the square root of the rank instead of the rank.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
    """

    name: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    exclude: str | tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA.rank must be a whole number of at least 1, got {self.rank!r}.")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"LoRA.alpha must be finite and positive, got {self.alpha!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA.dropout must be in [0, 1), got {self.dropout!r}.")
        for field in ("targets", "exclude"):
            value = getattr(self, field)
            if not isinstance(value, str):
                object.__setattr__(self, field, tuple(value))
        if not self.targets:
            raise ValueError("LoRA.targets must name at least one module.")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, params: dict, key: jax.Array) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        A is uniform in ``(-1/sqrt(d_in), 1/sqrt(d_in))`` (PEFT's Kaiming with ``a = sqrt(5)``),
        B is zero; both float32. Every kernel's numbers depend on the key and its own path only.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.

        Returns:
            The adapter; ``jax.jit`` of this function works and places it like the base.

        Raises:
            UserError: If a pattern matches nothing or the rank exceeds a kernel's sides.
        """
        chosen = paths.match(self.targets, self.exclude, paths.module_names(params))
        layers: dict[str, list[int | None]] = {}
        for site in chosen.values():
            layers.setdefault(site.path, []).append(site.layer)
        factors, buffers = {}, {}
        for path in sorted(layers):
            shape = shape_of(paths.get(params, path))
            *stack, d_in, d_out = shape
            if self.rank > min(d_in, d_out):
                raise UserError(
                    f"LoRA.rank {self.rank} exceeds the smaller side of {path} "
                    f"({d_in} x {d_out}); choose at most {min(d_in, d_out)}."
                )
            adapted = jnp.ones(stack, bool)
            if stack:
                adapted = jnp.zeros(stack, bool).at[jnp.array(layers[path])].set(True)
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound = 1.0 / math.sqrt(d_in)
            a = jax.random.uniform(path_key, (*stack, d_in, self.rank), minval=-bound, maxval=bound)
            factors[path] = {
                "a": jnp.where(adapted[..., None, None], a, 0.0),
                "b": jnp.zeros((*stack, self.rank, d_out)),
            }
            buffers[path] = {
                "scale": jnp.where(adapted, jnp.float32(self.scale), 0.0),
                "rank": jnp.where(adapted, self.rank, 0).astype(jnp.int32),
                "dropout": jnp.full(stack, self.dropout, jnp.float32),
            }
        options = (("rslora", True),) if self.rslora else ()
        spec = Spec(kind=self.name, paths=tuple(sorted(layers)), rank=self.rank, options=options)
        return Adapter(paths.unflatten(factors), paths.unflatten(buffers), spec)


@flax.struct.dataclass
class LoRAKernel(Node):
    """A frozen kernel with its low-rank factors.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        a: ``(d_in, rank)``, float32.
        b: ``(rank, d_out)``, float32.
        scale: Scalar.
        dropout: Scalar probability; used only with a key.
        key: PRNG key of this step and kernel, or None to drop nothing.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    dropout: Any = 0.0
    key: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base kernel."""
        return shape_of(self.base)

    @property
    def dtype(self) -> Any:
        """The dtype of the base kernel."""
        return dtype_of(self.base)

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Computes ``x @ (base + scale * a @ b)`` without forming the sum.

        Args:
            x: Activations, in the compute dtype.

        Returns:
            Activations in the dtype of `x`. The branch and the sum are computed in the
            factors' dtype (float32) and rounded once, as PEFT does.

        Example:
            >>> kernel = LoRAKernel(base=jnp.eye(2), a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=2.0)
            >>> kernel.multiply(jnp.array([1.0, 0.0]))
            Array([3., 2.], dtype=float32)
        """  # noqa: E501
        y = linear(x, self.base)
        h = x.astype(self.a.dtype)
        if self.key is not None:
            h = drop(h, self.dropout, self.key)
        # Two dimensions: the factors' gradients then contract one dimension, a plain product.
        flat = h.reshape(-1, h.shape[-1])
        low = ((flat @ self.a) @ self.b) * self.scale
        return (y.astype(low.dtype) + low.reshape(y.shape)).astype(x.dtype)

    def materialise(self) -> Float[Array, "*stack d_in d_out"]:
        """``base + scale * a @ b`` in float32, rounded to the base's dtype; also of a stack."""
        scale = jnp.asarray(self.scale, jnp.float32)[..., None, None]
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        total = materialise(self.base).astype(jnp.float32) + scale * product
        return total.astype(self.dtype)


def drop(x: Float[Array, "..."], rate: Any, key: jax.Array) -> Float[Array, "..."]:
    """Inverted dropout: zeros with probability `rate`, the rest divided by ``1 - rate``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def bind_leaf(
    base: Any, params: dict, buffers: dict, key: jax.Array | None, options: dict
) -> LoRAKernel:
    """The node that stands for a kernel adapted with LoRA."""
    del options
    if key is not None and (stack := shape_of(params["a"])[:-2]):
        key = jax.random.split(key, stack)
    return LoRAKernel(
        base, params["a"], params["b"], buffers["scale"], dropout=buffers["dropout"], key=key
    )


def leaf_shape(params: dict) -> tuple[int, ...]:
    """The shape of the kernel that the factors of one leaf belong to, layer axis included."""
    return (*params["a"].shape[:-1], params["b"].shape[-1])


def from_adapter(adapter: Adapter) -> LoRA:
    """The config of an adapter, rebuilt from its spec and buffers.

    Targets come back as full module names; alpha and dropout as the shortest decimals that
    give the same float32 buffers.

    Raises:
        UserError: If ranks, scales or dropout differ from layer to layer.
    """
    names = []
    seen: dict[str, set[Any]] = {"rank": set(), "scale": set(), "dropout": set()}
    for path in adapter.spec.paths:
        leaf = {k: np.atleast_1d(v) for k, v in paths.get(adapter.buffers, path).items()}
        on = leaf["rank"] > 0
        stacked = paths.is_stacked(path)
        names += [paths.module_name(path, int(i) if stacked else None) for i in np.flatnonzero(on)]
        for field, values in seen.items():
            values.update(leaf[field][on])
    mixed = [field for field, values in seen.items() if len(values) > 1]
    if mixed:
        raise UserError(f"layers of this adapter differ in {', '.join(mixed)}.")
    rank, scale, dropout = int(seen["rank"].pop()), seen["scale"].pop(), seen["dropout"].pop()
    rslora = dict(adapter.spec.options).get("rslora", False)
    return LoRA(
        rank=rank,
        alpha=shortest_decimal(scale, math.sqrt(rank) if rslora else rank),
        targets=tuple(names),
        dropout=shortest_decimal(dropout),
        rslora=rslora,
    )


def shortest_decimal(value: Any, divisor: float = 1.0) -> float:
    """The shortest decimal that is `value` in float32 after division by `divisor`.

    It finds the number a user wrote behind a float32 buffer.

    Args:
        value: A float32 number.
        divisor: What the number was divided by: the rank, or its root, if it is an alpha.

    Example:
        >>> shortest_decimal(np.float32(0.1 / 3), 3)
        0.1
    """
    exact = float(value) * divisor
    candidates = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((c for c in candidates if np.float32(c / divisor) == value), exact)
