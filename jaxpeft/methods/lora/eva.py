"""EVA: LoRA's first factor from the inputs of its kernels, and ranks by their variance.

The columns of ``A`` are the first principal components of a kernel's inputs over some batches, and
``B`` is zero. The components are updated batch by batch (`jaxpeft.methods.lora.principal`), until
the ones that are kept no longer change: the cosine between batches is at least ``tau``.

Every component explains a share of the variance of its kernel's inputs. The components with the
largest shares over all kernels are kept, as many as the ranks add up to, but per kernel at most
``rho`` times its rank. Scales do not change: alpha is multiplied by new over old rank.

The inputs are those of learned tokens, which PEFT calls the label mask.

Reference:
    Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
    Adaptation", 2024, https://arxiv.org/abs/2410.07170, section 3 and algorithm 1.
"""

import collections
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh.processes import to_host
from jaxpeft.methods.family import weight_at
from jaxpeft.methods.lora.principal import Components, update
from jaxpeft.methods.method import Context
from jaxpeft.ops.linear import CAPTURE, shape_of

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules of a layer in the order of Hugging Face's models."""

SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Modules that have the same inputs as an earlier one."""

NAME = 'LoRA.init_weights "eva"'
FIELDS = ("tokens", "segment_ids", "positions", "weights")


def start(
    config: Any,
    params: dict,
    places: Mapping[str, tuple[np.ndarray, np.ndarray]],
    key: jax.Array,
    context: Context,
) -> tuple[dict[str, Float[Array, "..."]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """First factors, ranks and scales of all kernels.

    Args:
        config: A `jaxpeft.LoRA`, for its ``eva_rho``, ``eva_tau`` and ``rslora``.
        params: Base parameters.
        places: By path, the rank and scale that each layer has without EVA, 0 if it is not adapted.
        key: Typed PRNG key for the first guesses of the decompositions.
        context: Its module and batches are used. Batches are read until all components are settled,
            at most once. With ``shapes_only``, nothing is read.

    Returns:
        By path ``A`` of shape ``(*stack, d_in, width)``, zero beyond each rank, where the width is
        the largest rank a kernel may get; and new `places`.

    Raises:
        UserError: If there are no kernels, no batches, no module, or no learned tokens.
    """
    if not places:
        raise UserError(f"{NAME} reads the inputs of linear modules: LoRA.targets names none.")
    ranks = {path: rank for path, (rank, _) in places.items()}
    sizes = {path: shape_of(weight_at(params, path)) for path in ranks}
    most = _most(ranks, sizes, config.eva_rho)
    width = max(int(count.max()) for count in most.values())
    if context.shapes_only:
        return {path: jnp.zeros((*sizes[path][:-1], width)) for path in places}, dict(places)
    _require(context, params)
    wanted: dict[str, int] = collections.defaultdict(int)
    for path, count in most.items():
        wanted[inputs_path(path)] = max(wanted[inputs_path(path)], int(count.max()))
    chosen, parts = _principal(params, dict(wanted), most, ranks, key, config.eva_tau, context)
    factors, changed = {}, {}
    for path, (old, scales) in places.items():
        v, new = np.asarray(parts[inputs_path(path)].v), np.zeros(old.shape, np.int32)
        a = np.zeros((*sizes[path][:-1], width), np.float32)
        for at in np.ndindex(new.shape):
            new[at] = chosen.get((path, at), 0)
            a[at][:, : new[at]] = v[at or 0][: new[at]].T
        ratio = new / np.maximum(old, 1)  # scales alpha with the rank
        scales = np.asarray(scales * (np.sqrt(ratio) if config.rslora else ratio > 0), np.float32)
        factors[path], changed[path] = jnp.asarray(a), (new, scales)
    return factors, changed


def inputs_path(path: str) -> str:
    """The first of the kernels that read the same inputs as this one.

    Example:
        >>> inputs_path("layers/self_attn/v_proj/kernel")
        'layers/self_attn/q_proj/kernel'
    """
    *above, module, leaf = path.split("/")
    return "/".join((*above, SAME_INPUTS.get(module, module), leaf))


KernelId = tuple[str, tuple[int, ...]]
"""A kernel: its path, and ``(layer,)`` or ``()``."""


def allocate(
    shares: Mapping[KernelId, np.ndarray], leaders: Mapping[KernelId, KernelId], budget: int
) -> dict[KernelId, int]:
    """The number of components that every kernel keeps, by PEFT's rule.

    Args:
        shares: By kernel, in the model's order, the shares of its components, largest first.
        leaders: By kernel, the first kernel with the same inputs.
        budget: Components in total.

    Returns:
        Ranks. Among equal shares the first kernel wins, but leaders win over all others; no kernel
        has more than its leader.
    """
    places = sorted(shares, key=lambda place: leaders[place] != place)
    owners = [i for i, place in enumerate(places) for _ in shares[place]]
    order = np.argsort(-np.concatenate([shares[place] for place in places]), kind="stable")
    counts = collections.Counter(owners[i] for i in order[:budget])
    ranks = {place: counts[i] for i, place in enumerate(places)}
    for place in places:
        leader = leaders[place]
        if ranks[place] > ranks[leader]:
            ranks[leader], ranks[place] = ranks[place], ranks[leader]
    return ranks


def _principal(
    params: dict,
    wanted: dict[str, int],
    most: Mapping[str, np.ndarray],
    ranks: Mapping[str, np.ndarray],
    key: jax.Array,
    tau: float,
    context: Context,
) -> tuple[dict[KernelId, int], dict[str, Components]]:
    """Reads batches until the components of all kernels are settled; gives ranks and components."""
    module, parts = context.module, {}
    for path, k in wanted.items():
        *stack, d_in, _ = shape_of(weight_at(params, path))
        parts[path] = Components.none(math.prod(stack), k, d_in)

    @jax.jit
    def step(params: dict, batch: dict, parts: dict, active: dict) -> dict:
        seen, learned = captured(module, params, batch, wanted)
        with jax.default_matmul_precision("highest"):
            return {
                path: update(part, seen[path], learned, active[path], _fold(key, path), tau)
                for path, part in parts.items()
            }

    places = sorted(
        ((path, at) for path, rank in ranks.items() for at in np.ndindex(rank.shape) if rank[at]),
        key=_position,
    )
    first: dict[KernelId, KernelId] = {}
    leaders = {p: first.setdefault((inputs_path(p[0]), p[1]), p) for p in places}
    budget = sum(int(rank.sum()) for rank in ranks.values())
    chosen = {(path, at): int(most[path][at]) for path, at in places}
    for batch in context.batches or ():
        active = {path: np.zeros(part.count.shape, bool) for path, part in parts.items()}
        for path, at in first.values():
            inputs, layer = inputs_path(path), at or 0
            settled = np.asarray(parts[inputs].settled)[layer, : chosen[path, at]]
            active[inputs][layer] = not settled.all()
        if not any(on.any() for on in active.values()):
            break
        if not isinstance(batch, Mapping) or any(name not in batch for name in FIELDS):
            raise UserError(f"batches: expected dicts with {', '.join(FIELDS)}, as of a Plan.")
        fields = {name: batch[name] for name in FIELDS}
        parts = step(params, fields, parts, active)
        if jax.process_count() > 1:  # each holds a part, but all must decide alike
            parts = jax.tree.map(to_host, parts)
        shares = {path: part.shares() for path, part in parts.items()}
        chosen = allocate(
            {(p, at): shares[inputs_path(p)][at or 0][: most[p][at]] for p, at in places},
            leaders,
            budget,
        )
    if not all(np.asarray(part.count).any() for part in parts.values()):
        raise UserError("batches: none of their tokens is learned, so no kernel has any inputs.")
    return chosen, parts


def captured(
    module: Any, params: dict, batch: Mapping[str, Any], wanted: Any
) -> tuple[dict[str, Float[Array, "layers tokens d_in"]], Bool[Array, "tokens"]]:
    """The inputs of kernels in the base model, and which tokens are learned.

    Args:
        module: The Linen module.
        params: Base parameters.
        batch: A batch for the training step.
        wanted: Paths of kernels.
    """
    hidden, state = module.apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        in_order=True,
        return_hidden=True,
        mutable=[CAPTURE],
    )
    seen = {}
    for path in wanted:
        x = hidden
        if path != paths.HEAD:
            (x,) = paths.get(state[CAPTURE], f"{path.rpartition('/')[0]}/inputs")
        layers = x.shape[0] if paths.is_stacked(path) else 1
        seen[path] = x.reshape(layers, -1, x.shape[-1])
    # The weights of the next tokens: inputs count if they predict a learned token.
    before = jnp.pad(batch["weights"], ((0, 0), (1, 0)))[:, :-1]
    return seen, (before > 0).reshape(-1)


def check(config: Any) -> None:
    """Checks the EVA fields of a `jaxpeft.LoRA` with ``init_weights="eva"``.

    Raises:
        ValueError: A field is out of its range.
    """
    if not 1.0 <= config.eva_rho < math.inf:
        raise ValueError(f"LoRA.eva_rho must be finite and at least 1, got {config.eva_rho!r}.")
    if not 0.0 <= config.eva_tau <= 1.0:
        raise ValueError(f"LoRA.eva_tau must be in [0, 1], got {config.eva_tau!r}.")


def _most(
    ranks: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, ...]], rho: float
) -> dict[str, np.ndarray]:
    """The largest rank of every kernel; kernels with the same inputs share the largest."""
    shared: dict[str, Any] = {}
    for path, rank in ranks.items():
        count = np.minimum(np.round(np.asarray(rank) * rho).astype(int), sizes[path][-2])
        shared[inputs_path(path)] = np.maximum(shared.get(inputs_path(path), 0), count)
    return {path: np.asarray(shared[inputs_path(path)]) for path in ranks}


def _require(context: Context, params: dict) -> None:
    """Checks that everything EVA needs is given.

    Raises:
        UserError: Something is missing.
    """
    if context.batches is None:
        raise UserError(
            f"{NAME} reads the inputs of the kernels: pass batches, as in init_adapter(method, "
            "model, key, batches=[plan.batch(i) for i in range(8)])."
        )
    if context.module is None:
        raise UserError(f"{NAME} runs the model: pass the model itself, not its parameters.")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise UserError(f"{NAME} looks at numbers: initialise outside of jax.jit.")


def _position(place: KernelId) -> tuple[float, int]:
    """The position of a kernel in the model, for sorting."""
    path, at = place
    module = path.split("/")[-2]
    return at[0] if at else math.inf, ORDER.index(module) if module in ORDER else len(ORDER)


def _fold(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
