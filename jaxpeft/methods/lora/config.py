"""Low-rank adaptation (LoRA): the config and its initialisation.

A kernel ``W`` of shape ``(d_in, d_out)`` is used as ``W + scale * A @ B`` with
``A: (d_in, rank)`` and ``B: (rank, d_out)``; ``scale`` is ``alpha / rank``, or
``alpha / sqrt(rank)`` with rank stabilisation. Stacked layers put one axis in front of all of
them. Flax kernels are the transpose of the paper's, so our ``A @ B`` is the paper's
``(B A)^T``. Layers of a stack that are not adapted hold zeros in both factors and have rank 0;
their gradients are zero, so they never change. The buffer ``rslora`` says which scales are rank
stabilised; it is used only to compute alpha when an adapter is saved or described.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685, section 4.1.
    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023,
    https://arxiv.org/abs/2312.03732.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.methods.adapter import Adapter, Spec, weigh_scales
from jaxpeft.methods.family import Kind, weight_at
from jaxpeft.methods.fields import require_alpha, require_count, require_dropout
from jaxpeft.methods.leaves import token_rows
from jaxpeft.methods.lora import dora, eva, exchange, plain, starts, tokens
from jaxpeft.methods.lora import places as lora_places
from jaxpeft.methods.lora import saved as lora_saved
from jaxpeft.methods.lora import table as lora_table
from jaxpeft.methods.lora import targets as lora_select
from jaxpeft.methods.lora.peft import config
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.values import Values
from jaxpeft.ops.linear import shape_of
from jaxpeft.ops.quant import is_coded

_ONLY_OURS = {
    "layers": "name layers in targets, by paths or a predicate over rows",
    "layers_pattern": "name layers in targets, by paths or a predicate over rows",
    "head_token_ids": "train columns of a head with TrainableTokens, whose targets name it",
}
"""Fields of `LoRA` that have no meaning for other models, and what to do there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Which kernels to adapt, and how strongly.

    Attributes:
        rank: Inner dimension of ``A @ B``.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT. The embedding
            table is ``embed_tokens``, see `jaxpeft.methods.lora.table`.
        dropout: Probability of dropping an input of the low-rank branch, in [0, 1).
        rslora: Divide alpha by the square root of the rank instead of the rank.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        layers: Layers to adapt, counted from 0; empty for all. Modules that `targets` names in full
            are adapted in any case.
        layers_pattern: Name of the list of layers, needed if a model has several.
        rank_pattern: Ranks of some modules, by a name or regex for the end of their names; the
            first that matches counts.
        alpha_pattern: Alphas of some modules, in the same way.
        dora: Train the length of every column too, see `jaxpeft.methods.lora.dora`.
        init_weights: How the factors start: "default", a name in `jaxpeft.methods.lora.starts`, or
            "eva" from the inputs of the kernels, see `jaxpeft.methods.lora.eva`.
        loftq_steps: For "loftq", the number of alternations.
        eva_rho: For "eva", the largest rank of a kernel as a multiple of `rank`.
        eva_tau: For "eva", the cosine between a component and itself one batch before from which
            the component counts as settled.
        bias: Which biases of the base are trained: "none", "all", or "lora_only" for those of
            adapted modules.
        lora_bias: Train a bias on ``B``, too.
        save_modules: Modules that are trained and saved whole, and not adapted: names or dotted
            parts of names, see `jaxpeft.methods.lora.saved`.
        token_ids: Tokens whose rows of the embedding table are trained, see
            `jaxpeft.methods.lora.tokens`; a tied head uses these rows too.
        head_token_ids: Tokens whose columns of the head are trained.
    """

    name: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    targets: paths.Targets = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    exclude: paths.Targets = ()
    layers: int | tuple[int, ...] = ()
    layers_pattern: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = FrozenMap()
    alpha_pattern: Mapping[str, float] = FrozenMap()
    dora: bool = False
    init_weights: str = "default"
    loftq_steps: int = 1
    eva_rho: float = 2.0
    eva_tau: float = 0.99
    bias: str = "none"
    lora_bias: bool = False
    save_modules: str | tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    head_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        require_count(self, "rank")
        require_alpha(self)
        require_dropout(self)
        lora_select.check(self)
        starts.check(self)
        lora_saved.check(self)
        tokens.check(self)
        if self.needs_batches:
            eva.check(self)

    @property
    def needs_batches(self) -> bool:
        """Whether `init` reads batches; it then runs outside of ``jax.jit``."""
        return self.init_weights == "eva"

    @property
    def drops(self) -> bool:
        """Whether training drops inputs of the branch."""
        return self.dropout > 0

    @property
    def starts_dense(self) -> bool:
        """Whether `init` reads the weights as they are before the base is quantised."""
        return self.init_weights == "loftq"

    def check_quantization(self, quantization: str | None, double: bool) -> None:
        """Checks that LoftQ rounds the base as the run does.

        Raises:
            UserError: It does not.
        """
        starts.check_quantization(self, quantization, double)

    def check_any_model(self) -> None:
        """Checks that no field needs what only models of this package have.

        Raises:
            UserError: One does.
        """
        for field, way in _ONLY_OURS.items():
            if getattr(self, field):
                raise UserError(f"LoRA.{field}: is for models of jaxpeft; {way}.")
        if self.needs_batches:
            raise UserError(
                "LoRA.init_weights 'eva': is for models of jaxpeft, whose modules show the inputs "
                "of their kernels; choose another start, such as 'pissa'."
            )

    @property
    def scale(self) -> float:
        """The factor of the product of A and B, unless a pattern sets another."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged (LoftQ: on a quantised base).

        A is uniform in ``(-1/sqrt(d_in), 1/sqrt(d_in))`` (PEFT's Kaiming with ``a = sqrt(5)``),
        B is zero; both are float32. The numbers of a kernel depend on the key and its path only.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.
            context: For "eva", its module and batches are used.

        Returns:
            The adapter. ``jax.jit`` of this function works and places it like the base, except
            for "eva".

        Raises:
            UserError: If a pattern matches nothing, a layer does not exist, a rank exceeds a
                kernel's sides, or values of the base or batches are needed and missing.
        """
        saved = lora_saved.saved_modules(self.save_modules, params)
        modules = lora_select.select(self, params, leave=saved)
        places = lora_select.by_path(modules.values(), params)
        width = max(int(ranks.max()) for ranks, _ in places.values())
        factors, buffers, first = {}, {}, {}
        is_table = functools.partial(paths.is_table, params)
        if self.init_weights == "eva":  # the table has no inputs
            kernels = {path: place for path, place in places.items() if not is_table(path)}
            first, changed = eva.start(self, params, kernels, key, context)
            places |= changed
            width = max(width, *(a.shape[-1] for a in first.values()))
        for path, (ranks, scales) in places.items():
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            kernel = weight_at(params, path)
            if context.shapes_only and is_coded(kernel):
                kernel = jnp.zeros(shape_of(kernel))  # LoftQ cannot use codes
            if path in first:
                a, b = first[path], jnp.zeros((*ranks.shape, width, shape_of(kernel)[-1]))
            else:
                start = self._start_table if is_table(path) else self._start
                a, b = start(path_key, kernel, ranks, scales, width)
            factors[path] = {"a": a, "b": b}
            buffers[path] = {
                "scale": jnp.asarray(scales),
                "rank": jnp.asarray(ranks),
                "dropout": jnp.full(ranks.shape, self.dropout, jnp.float32),
                "rslora": jnp.asarray((ranks > 0) & self.rslora),
            }
            if self.init_weights in starts.SUBTRACTED:
                buffers[path] |= {"a0": a, "b0": b}
            if self.dora:
                buffers[path]["norm"] = factors[path]["m"] = dora.start(kernel, ranks)
            if self.lora_bias:
                factors[path]["bias"] = jnp.zeros((*ranks.shape, shape_of(kernel)[-1]))
        trained, kept = lora_saved.start(params, saved, self.bias, modules)
        lora_saved.require_apart(factors, trained)
        factors, buffers = factors | trained, buffers | kept
        trained, kept = tokens.start(self, params, factors)
        factors, buffers = factors | trained, buffers | kept
        options: dict[str, Any] = {"dora": self.dora, "lora_bias": self.lora_bias}
        options["bias"] = self.bias != "none" and self.bias
        if self.init_weights in starts.SUBTRACTED:
            options["init_weights"] = self.init_weights
        spec = Spec(
            kind=self.name,
            paths=tuple(sorted(factors)),
            rank=width,
            options=tuple(sorted(item for item in options.items() if item[1])),
        )
        return Adapter(paths.unflatten(factors), paths.unflatten(buffers), spec)

    def _start(
        self, key: jax.Array, kernel: Any, ranks: np.ndarray, scales: np.ndarray, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """Both factors of all layers of a place, zero beyond the rank of each."""
        if self.init_weights != "default":
            return starts.of_stack(
                self.init_weights, key, kernel, ranks, scales, width, self.loftq_steps
            )
        *stack, d_in, d_out = shape_of(kernel)
        bound = 1.0 / math.sqrt(d_in)
        a = jax.random.uniform(key, (*stack, d_in, width), minval=-bound, maxval=bound)
        on = np.arange(width) < ranks[..., None]
        return jnp.where(on[..., None, :], a, 0.0), jnp.zeros((*stack, width, d_out))

    def _start_table(
        self, key: jax.Array, table: Any, ranks: np.ndarray, scales: np.ndarray, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """Both factors of the embedding table, see `jaxpeft.methods.lora.table`."""
        del scales
        if self.lora_bias or self.init_weights in (*starts.SUBTRACTED, "loftq"):
            odd = "lora_bias" if self.lora_bias else f"init_weights {self.init_weights!r}"
            raise UserError(
                f"LoRA.{odd} is for linear modules alone; take embed_tokens out of targets, or "
                "leave it out."
            )
        return lora_table.start(key, shape_of(table), int(ranks), width)


def config_of(adapter: Adapter) -> LoRA:
    """The config of an adapter, rebuilt from its spec and buffers.

    Targets are given as full module names, and differing ranks and alphas as patterns for such
    names. Alphas and dropout are the shortest decimals that give the same float32 buffers.

    Raises:
        UserError: If dropout differs from layer to layer.
    """
    fields = dict(adapter.spec.options)
    for sort, places in lora_places.by_sort(adapter):
        fields |= sort.fields(places)
    return LoRA(**fields)


def config_from_peft(values: Values) -> LoRA:
    """Reads PEFT's config; see `PeftFormat`."""
    return LoRA(**config.fields(values), **tokens.peft_fields(values))


def weigh(adapter: Adapter, weight: Any) -> Adapter:
    """The adapter with all its scales multiplied by `weight`.

    Raises:
        UserError: The adapter has DoRA's magnitudes, trained biases or tokens, or saved modules, so
            its change is no multiple of the scales.
    """
    whole = any(sort is not lora_places.FACTORS for sort, _ in lora_places.by_sort(adapter))
    if whole or dict(adapter.spec.options).get("dora"):
        what = (
            "a LoRA with trained biases or tokens, or saved modules" if whole else "a DoRA adapter"
        )
        raise UserError(f"weights: {what} has no factor that could be weighted; leave weights out.")
    return weigh_scales(adapter, weight)


KIND = Kind(
    config=LoRA,
    bind=lora_places.bind,
    leaf_shape=lora_places.leaf_shape,
    config_of=config_of,
    arrays={name: role for sort in lora_places.SORTS for name, role in sort.arrays.items()},
    merge=lora_places.merge,
    weigh=weigh,
    products=plain.products,
    pads_rank=True,
    lora_fa=("a", "b"),
    compared=("rslora", *token_rows.COMPARED),
    check=token_rows.check,
    peft=dataclasses.replace(exchange.PEFT, config=config_from_peft),
)
