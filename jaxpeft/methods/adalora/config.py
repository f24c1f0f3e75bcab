"""AdaLoRA: adapters in the form of a singular value decomposition, whose ranks compete.

A kernel ``W`` is used as ``W + scale * A diag(e) B`` with ``scale = alpha / (rank + 1e-5)``, where
``rank`` is always the initial one, and 1e-5 is PEFT's. A penalty keeps ``A`` and ``B`` orthogonal::

    penalty = orthogonality * mean(|A^T A - I|_F, |B B^T - I|_F, over all kernels)

In training, entries of ``e`` with little importance are set to zero, until `AdaLoRA.rank` are left
per kernel on average; `jaxpeft.methods.adalora.schedule` does this as a part of the optimizer.

Reference:
    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023,
    https://arxiv.org/abs/2303.10512, equations 3 and 4.
"""

import dataclasses
import math
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.float32 import require
from jaxpeft.methods.adalora import peft
from jaxpeft.methods.adalora.schedule import Schedule, allocate_ranks, count_places
from jaxpeft.methods.adapter import Adapter, Spec, weigh_scales
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import keep_targets, require_alpha, require_count, require_dropout
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.lora.nodes import LoRAKernel
from jaxpeft.methods.lora.plain import FACTORS, factors_shape
from jaxpeft.methods.lora.targets import check_rank
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import modules_of, shortest_decimal
from jaxpeft.methods.peft.values import Values
from jaxpeft.ops.linear import shape_of

EPSILON = 1e-5
"""The number that PEFT adds to the rank by which alpha is divided."""

STD = 0.02
"""Initial standard deviation of the factors, as in PEFT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Which kernels to adapt, and how their ranks are chosen.

    Attributes:
        rank: Singular values per kernel that are left at the end, on average.
        initial_rank: Singular values of every kernel at the start; None for 1.5 times `rank`, as in
            the paper.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        dropout: Probability of dropping an input of the branch, in [0, 1).
        orthogonality: Weight of the penalty.
        initial_steps: Updates at the start in which all ranks are kept.
        final_steps: Updates at the end in which the chosen ranks are kept.
        every: Updates between two choices.
        beta1: Decay of the average of importance.
        beta2: Decay of the average of the uncertainty of importance.
    """

    name: ClassVar[str] = "adalora"

    rank: int = 8
    initial_rank: int | None = None
    alpha: float = 16.0
    targets: paths.Targets = "all-linear"
    exclude: paths.Targets = ()
    dropout: float = 0.0
    orthogonality: float = 0.5
    initial_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        least = dict(peft.LEAST)
        if self.initial_rank is not None:
            least["initial_rank"] = self.rank
        for field, bound in least.items():
            require_count(self, field, bound)
        require_alpha(self)
        require("AdaLoRA.alpha divided by the rank", self.alpha / (self.first_rank + EPSILON))
        require_dropout(self)
        if not 0.0 <= self.orthogonality < math.inf:
            raise ValueError(
                f"AdaLoRA.orthogonality must be finite and at least 0, got {self.orthogonality!r}."
            )
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            if not 0.0 < value < 1.0:
                raise ValueError(f"AdaLoRA.{field} must be in (0, 1), got {value!r}.")
        keep_targets(self)

    @property
    def drops(self) -> bool:
        """Whether training drops inputs of the branch."""
        return self.dropout > 0

    @property
    def first_rank(self) -> int:
        """Singular values of every kernel at the start."""
        return math.ceil(1.5 * self.rank) if self.initial_rank is None else self.initial_rank

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        Both factors are normal with a deviation of 0.02, the singular values are zero.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.
            context: Of a run the number of its updates, which PEFT writes down too.

        Returns:
            The adapter.

        Raises:
            UserError: If a pattern matches nothing, or a rank exceeds a kernel's sides.
        """
        sites = paths.match(self.targets, self.exclude, paths.module_names(params))
        trained, buffers, r = {}, {}, self.first_rank
        for path, adapted in selected_layers(params, sites).items():
            check_rank("AdaLoRA.rank", self.rank, path, params)
            check_rank("AdaLoRA.initial_rank", r, path, params)
            *stack, d_in, d_out = shape_of(paths.get(params, path))
            a, b = draw_factors(key, path, (*stack, d_in, r), (*stack, r, d_out))
            on = adapted[..., None, None] > 0
            trained[path] = {
                "a": jnp.where(on, a, 0.0),
                "b": jnp.where(on, b, 0.0),
                "e": jnp.zeros((*stack, r)),
            }
            scale = jnp.float32(self.alpha / (r + EPSILON))
            buffers[path] = {
                "dropout": jnp.full(stack, self.dropout, jnp.float32),
                "rank": r * adapted,
                "scale": jnp.where(adapted > 0, scale, 0.0),
            }
        shared = peft.settings(vars(self), context.steps)
        spec = Spec(kind=self.name, paths=tuple(sorted(trained)), rank=r)
        return Adapter(paths.unflatten(trained), paths.unflatten(buffers) | shared, spec)

    def go_on(self, saved: Adapter, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """The saved adapter with this schedule, and new factors for triplets that were removed.

        All arrays of a removed triplet are zero, so all its gradients would be zero too. Its
        factors are drawn as in `init`. Its singular value stays zero, so the model's function is
        unchanged.
        """
        drawn = {}
        for path in saved.spec.paths:
            place, rank = paths.get(saved.params, path), paths.get(saved.buffers, path)["rank"]
            a, b = draw_factors(key, path, place["a"].shape, place["b"].shape)
            held = (place["a"] != 0).any(-2) | (place["b"] != 0).any(-1) | (place["e"] != 0)
            gone = (rank[..., None] > 0) & ~held
            drawn[f"{path}/a"] = jnp.where(gone[..., None, :], a, place["a"])
            drawn[f"{path}/b"] = jnp.where(gone[..., None], b, place["b"])
        buffers = saved.buffers | peft.settings(vars(self), context.steps)
        return dataclasses.replace(saved, params=paths.put(saved.params, drawn), buffers=buffers)

    def penalty(self, adapter: Adapter) -> Any:
        """The distance of the factors from orthogonal ones; the module has the equation."""
        if not self.orthogonality:
            return None
        total, count = jnp.zeros(()), jnp.zeros(())
        for path in adapter.spec.paths:
            place, rank = paths.get(adapter.params, path), paths.get(adapter.buffers, path)["rank"]
            for factor in (jnp.swapaxes(place["a"], -1, -2), place["b"]):
                total += jnp.sum(jnp.where(rank > 0, distance_from_orthogonal(factor), 0.0))
                count += jnp.sum(rank > 0)
        return self.orthogonality * total / jnp.maximum(count, 1.0)

    def wrap_optimizer(self, tx: Any, steps: int) -> Any:
        """The update rule, followed by the choice of ranks; see `jaxpeft.methods.adalora.schedule`.

        Raises:
            UserError: The run has no updates between its initial and its final ones.
        """
        schedule = Schedule(
            steps=steps,
            rank=self.rank,
            initial_steps=self.initial_steps,
            final_steps=self.final_steps,
            every=self.every,
            beta1=self.beta1,
            beta2=self.beta2,
        )
        return allocate_ranks(tx, schedule, lambda t: count_places(t, self.targets, self.exclude))


def draw_factors(
    key: jax.Array, path: str, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """New factors of a place with these shapes; they depend on the key and the path only."""
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())))
    return STD * jax.random.normal(keys[0], a), STD * jax.random.normal(keys[1], b)


def distance_from_orthogonal(rows: jax.Array) -> jax.Array:
    """``|M M^T - I|_F`` of matrices ``(*stack, rank, d)``; rows of zeros are ignored.

    A row is zero if the rank of a layer is smaller than the padded rank.
    """
    gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision=jax.lax.Precision.HIGHEST)
    live = (rows != 0).any(-1)
    square = jnp.square(gram - jnp.eye(gram.shape[-1]) * live[..., None]).sum((-1, -2))
    away = square > 0  # the root has no derivative at zero
    return jnp.where(away, jnp.sqrt(jnp.where(away, square, 1.0)), 0.0)


def bind(leaf: Leaf) -> dict[str, Any]:
    """LoRA's node, with the singular values multiplied into the first factor."""
    node = LoRAKernel(
        leaf.base,
        leaf.params["a"] * leaf.params["e"][..., None, :],
        leaf.params["b"],
        leaf.buffers["scale"],
        dropout=leaf.buffers["dropout"],
        key=leaf.keys(),
    )
    return {leaf.path: node}


def config_of(adapter: Adapter) -> AdaLoRA:
    """The config of an adapter; targets come back as full names."""
    names, scale, dropout = [], 1.0, 0.0
    for name, path, at in modules_of(adapter):
        place = paths.get(adapter.buffers, path)
        names, scale, dropout = [*names, name], place["scale"][at], place["dropout"][at]
    r, values = adapter.spec.rank, peft.saved_settings(adapter)
    return AdaLoRA(
        **values | {"rank": min(values["rank"], r)},
        initial_rank=r,
        alpha=shortest_decimal(scale, r + EPSILON),
        targets=tuple(names),
        dropout=shortest_decimal(dropout),
    )


def config_from_peft(values: Values) -> AdaLoRA:
    """Reads PEFT's config, except for the length of the run; see `PeftFormat`."""
    values.only("init_lora_weights", True)
    own, r = peft.read_settings(values), values.count("init_r")
    alpha = values.number("lora_alpha")
    return AdaLoRA(
        **own | {"rank": min(own["rank"], r)},
        initial_rank=r,
        alpha=float(alpha if alpha > 0 else r),
        dropout=values.probability("lora_dropout"),
        **values.selection().fields(values.file),
    )


# The singular values are a matrix of one column in PEFT, and matrices are not fast in LoRA+.
KIND = Kind(
    config=AdaLoRA,
    bind=bind,
    leaf_shape=factors_shape,
    config_of=config_of,
    arrays={**FACTORS, "e": ArrayRole(rank_axis=-1, fast=False)},
    weigh=weigh_scales,
    peft=dataclasses.replace(peft.PEFT, config=config_from_peft),
)
