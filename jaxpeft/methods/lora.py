"""Low-rank adaptation (LoRA): the config and its initialisation.

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

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import paths
from jaxpeft.errors import UserError
from jaxpeft.linear import shape_of
from jaxpeft.methods import dora, lora_init, lora_peft, lora_places
from jaxpeft.methods.base import NO_CONTEXT, Adapter, Context, Kind, Method, Spec
from jaxpeft.methods.exchange import shortest_decimal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Which kernels to adapt, and how strongly.

    Attributes:
        rank: Inner dimension of ``A @ B``.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        dropout: Probability of dropping an input of the low-rank branch, in [0, 1).
        rslora: Divide alpha by the square root of the rank instead of the rank.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        dora: Train the length of every column too, see `jaxpeft.methods.dora`.
        init_weights: How the factors start: "default", or a name of `jaxpeft.methods.lora_init`.
        loftq_steps: For "loftq", how often it alternates.
    """

    name: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    exclude: str | tuple[str, ...] = ()
    dora: bool = False
    init_weights: str = "default"
    loftq_steps: int = 1

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
        lora_init.check(self)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        A is uniform in ``(-1/sqrt(d_in), 1/sqrt(d_in))`` (PEFT's Kaiming with ``a = sqrt(5)``),
        B is zero; both float32. Every kernel's numbers depend on the key and its own path only.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.
            context: Not used.

        Returns:
            The adapter; ``jax.jit`` of this function works and places it like the base.

        Raises:
            UserError: If a pattern matches nothing, the rank exceeds a kernel's sides, or values
                of the base are needed and there are only shapes.
        """
        del context
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
            kernel, ranks = paths.get(params, path), np.full(stack, self.rank)
            if stack:
                ranks[[layer not in layers[path] for layer in range(stack[0])]] = 0
            if self.init_weights != "default":
                start = lora_init.of_stack(
                    self.init_weights,
                    path_key,
                    kernel,
                    ranks,
                    np.full(stack, self.scale),
                    self.rank,
                    self.loftq_steps,
                )
                factors[path] = dict(zip("ab", start, strict=True))
            if self.init_weights in lora_init.SUBTRACTED:
                buffers[path] |= {"a0": factors[path]["a"], "b0": factors[path]["b"]}
            if self.dora:
                buffers[path]["norm"] = factors[path]["m"] = dora.start(kernel, ranks)
        options: dict[str, Any] = {"rslora": True} if self.rslora else {}
        options |= {"dora": True} if self.dora else {}
        if self.init_weights in lora_init.SUBTRACTED:
            options["init_weights"] = self.init_weights
        spec = Spec(
            kind=self.name,
            paths=tuple(sorted(layers)),
            rank=self.rank,
            options=tuple(sorted(options.items())),
        )
        return Adapter(paths.unflatten(factors), paths.unflatten(buffers), spec)


def config_of(adapter: Adapter) -> LoRA:
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
    options = dict(adapter.spec.options)
    rslora = options.get("rslora", False)
    return LoRA(
        rank=rank,
        alpha=shortest_decimal(scale, math.sqrt(rank) if rslora else rank),
        targets=tuple(names),
        dropout=shortest_decimal(dropout),
        **options,
    )


def weigh(adapter: Adapter, weight: Any) -> Adapter:
    """The adapter with all its scales multiplied by `weight`.

    Raises:
        UserError: If it is a DoRA adapter: its change is no sum.
    """
    if dict(adapter.spec.options).get("dora"):
        raise UserError(
            "weights: a DoRA adapter is no sum that could be weighted; leave weights out."
        )
    buffers = paths.flatten(adapter.buffers)
    scaled = {
        path: value * weight if path.endswith("/scale") else value
        for path, value in buffers.items()
    }
    return adapter.replace(buffers=paths.unflatten(scaled))  # pyright: ignore


KIND = Kind(
    config=LoRA,
    bind=lora_places.bind,
    leaf_shape=lora_places.leaf_shape,
    config_of=config_of,
    merge=lora_places.merge,
    weigh=weigh,
    peft=lora_peft.PEFT,
)
