"""Initialisations of LoRA's factors: functions of one kernel, as defined in HF PEFT 0.21.

Each takes a key, the kernel ``W: (d_in, d_out)`` in float32, the rank ``r`` and the scale ``s``,
and returns ``A: (d_in, r)`` and ``B: (r, d_out)``. If ``A @ B`` is not zero at first
(`SUBTRACTED`), PEFT subtracts it from the kernel, ``W - s A B``. Here the base stays frozen, and
the adapter keeps the first factors and subtracts their product.

=============  ======================  ======================  =================================
name           A                       B                       source
=============  ======================  ======================  =================================
"gaussian"     N(0, 1/r^2)             0                       PEFT
"orthogonal"   N(0, 1) Q_odd / 10      Q_even^T N(0, 1) / 10   Dattatreya, 2024 (a blog post)
"pissa"        U_r sqrt(S_r / s)       sqrt(S_r / s) V_r       Meng et al., 2024, equations 2, 3
"olora"        R_r^T of ``W^T = Q R``  Q_r^T                   Büyükakyüz, 2024, algorithm 1
"loftq"        U_r sqrt(S_r)           sqrt(S_r) V_r           Li et al., 2023, algorithm 1
=============  ======================  ======================  =================================

References:
    PiSSA: https://arxiv.org/abs/2404.02948. OLoRA: https://arxiv.org/abs/2406.01775.
    LoftQ: https://arxiv.org/abs/2310.08659.
    Orthogonal: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core.errors import UserError
from jaxpeft.methods.family import Leaf, require_values
from jaxpeft.methods.lora.nodes import LoRAKernel
from jaxpeft.methods.peft.patterns import is_count
from jaxpeft.ops.linear import materialize, shape_of
from jaxpeft.ops.quant import is_coded, nf4_round_trip

SUBTRACTED = ("pissa", "olora")
"""Initialisations whose first product must be subtracted from the kernel."""

NEEDS_WEIGHTS = ("pissa", "olora", "loftq")
"""Initialisations that read the base's values, not only its shapes."""

Factors = tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]


def gaussian(key: jax.Array, kernel: Any, rank: int, scale: Any) -> Factors:
    """A with the standard deviation ``1 / rank``, B zero."""
    del scale
    d_in, d_out = kernel.shape
    return jax.random.normal(key, (d_in, rank)) / rank, jnp.zeros((rank, d_out))


def orthogonal(key: jax.Array, kernel: Any, rank: int, scale: Any) -> Factors:
    """Random factors from orthogonal rows, so that ``A @ B`` is zero; the rank must be even."""
    del scale
    d_in, d_out = kernel.shape
    of_q, of_a, of_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))
    with jax.default_matmul_precision("highest"):
        a = jax.random.normal(of_a, (d_in, rank // 2)) @ q[0::2] / 10
        b = q[1::2].T @ jax.random.normal(of_b, (rank // 2, d_out)) / 10
    return a, b


def pissa(key: jax.Array, kernel: Any, rank: int, scale: Any) -> Factors:
    """The principal part of the kernel: ``scale * A @ B`` is its best approximation of a rank."""
    del key
    a, b = _halves(kernel, rank)
    return a / jnp.sqrt(scale), b / jnp.sqrt(scale)


def olora(key: jax.Array, kernel: Any, rank: int, scale: Any) -> Factors:
    """The first rows and columns of the QR decomposition of the transposed kernel."""
    del key, scale
    q, r = jnp.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T


def loftq(key: jax.Array, kernel: Any, rank: int, scale: Any, *, steps: int = 1) -> Factors:
    """The quantisation error of a kernel: the best approximation of ``W - Q(W)`` of this rank.

    Q is NF4 with blocks of 64 along d_in. The adapter is meant for the quantised base; on the full
    base it adds the error. PEFT does not divide the product by the scale, which is correct only if
    the scale is 1.

    Args:
        key: Not used.
        kernel: ``(d_in, d_out)``, float32.
        rank: Inner dimension.
        scale: The factor by which the product will be multiplied.
        steps: How often to alternate between quantisation and approximation.
    """
    del key
    rest = kernel
    a, b = jnp.zeros((kernel.shape[0], rank)), jnp.zeros((rank, kernel.shape[1]))
    for _ in range(steps):
        a, b = _halves(kernel - nf4_round_trip(rest), rank)
        rest = kernel - jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return a / jnp.sqrt(scale), b / jnp.sqrt(scale)


BY_NAME: dict[str, Callable[..., Factors]] = {
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
}
"""The functions by the name that ``LoRA.init_weights`` uses; "default" is `jaxpeft.LoRA`'s own."""


def of_stack(
    name: str, key: jax.Array, kernel: Any, ranks: np.ndarray, scales: Any, width: int, steps: int
) -> tuple[Float[Array, "*stack d_in width"], Float[Array, "*stack width d_out"]]:
    """Factors of all layers of a stack, padded with zeros; layers of rank 0 get zeros.

    Args:
        name: A key of `BY_NAME`.
        key: Typed PRNG key of the place.
        kernel: ``(*stack, d_in, d_out)``: an array, a node, or shapes if values are not read.
        ranks: Whole numbers of shape ``stack``.
        scales: Numbers of shape ``stack``; not used where the rank is 0.
        width: At least the largest rank.
        steps: For "loftq".

    Raises:
        UserError: Values are needed, and there are only shapes.
    """
    *stack, d_in, d_out = shape_of(kernel)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        if name in NEEDS_WEIGHTS:
            require_values(kernel, f"LoRA.init_weights {name!r} decomposes the base's kernels")
        kernel = jnp.zeros((*stack, d_in, d_out))
    if name == "loftq" and is_coded(kernel):
        raise UserError(
            "LoRA.init_weights 'loftq' starts from what quantisation lost, and this base is "
            "quantised already; initialise on the weights it was made from, then quantise them."
        )
    wide = materialize(kernel).astype(jnp.float32).reshape(-1, d_in, d_out)
    ranks = np.asarray(ranks).reshape(-1)
    scales = jnp.asarray(scales, jnp.float32).reshape(-1)
    keys = jax.random.split(key, len(ranks))
    a, b = jnp.zeros((len(ranks), d_in, width)), jnp.zeros((len(ranks), width, d_out))
    start = functools.partial(loftq, steps=steps) if name == "loftq" else BY_NAME[name]
    for rank in sorted({int(rank) for rank in ranks if rank > 0}):
        at = np.flatnonzero(ranks == rank)

        def one(args: Any, rank: int = rank) -> Factors:
            return start(args[0], args[1], rank, args[2])

        some_a, some_b = jax.lax.map(one, (keys[at], wide[at], scales[at]))
        a, b = a.at[at, :, :rank].set(some_a), b.at[at, :rank].set(some_b)
    return a.reshape(*stack, d_in, width), b.reshape(*stack, width, d_out)


def check(config: Any) -> None:
    """Checks the fields of a `jaxpeft.LoRA` about its initialisation.

    Raises:
        ValueError: A field is wrong, or two fields do not go together.
    """
    name = config.init_weights
    if name not in ("default", "eva", *BY_NAME):
        known = ", ".join(map(repr, ("default", "eva", *BY_NAME)))
        raise ValueError(f"LoRA.init_weights must be one of {known}, got {name!r}.")
    for rank in (config.rank, *config.rank_pattern.values()):
        if name == "orthogonal" and rank % 2:
            raise ValueError(f"LoRA.rank must be even for init_weights 'orthogonal', got {rank}.")
    if config.dora and name in (*SUBTRACTED, "loftq"):
        raise ValueError(
            f"LoRA.dora must be false with init_weights {name!r}: its B starts at zero."
        )
    if not is_count(config.loftq_steps):
        raise ValueError(f"LoRA.loftq_steps must be at least 1, got {config.loftq_steps!r}.")


def check_quantization(config: Any, quantization: str | None, double: bool) -> None:
    """Checks that LoftQ has something to start from; see `Method.check_quantization`.

    Args:
        config: A `jaxpeft.LoRA`.
        quantization: How the base is going to be quantised, None for not at all.
        double: Whether the scales of its blocks are quantised, too.

    Raises:
        UserError: The base is not quantised as LoftQ's start assumes.
    """
    if config.init_weights != "loftq":
        return
    if (quantization, double) != ("nf4", False):
        raise UserError(
            "method.init_weights: 'loftq' makes up for what NF4 loses of the base; set "
            "model.quantization to nf4 and leave double_quantization out, or choose another start."
        )
    if config.loftq_steps != 1:
        raise UserError(
            "method.loftq_steps: more than 1 step assumes another rounding of the base than "
            "model.quantization uses; set it to 1."
        )


def without_start(leaf: Leaf) -> tuple[Any, Any, Any]:
    """Base and factors of a place, minus the initial product of the factors.

    Without dropout, the initial product is folded into the factors: one product, exact when merged.
    With dropout, the low-rank branch sees dropped inputs, so the initial product is subtracted from
    the base instead, as in PEFT.
    """
    a, b = leaf.params["a"], leaf.params["b"]
    if "a0" not in leaf.buffers:
        return leaf.base, a, b
    a0, b0 = leaf.buffers["a0"], leaf.buffers["b0"]
    if leaf.key is not None:
        scale = leaf.buffers["scale"]
        return LoRAKernel(leaf.base, a0, b0, -scale, dropout=jnp.zeros_like(scale)), a, b
    return leaf.base, jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=-2)


def _halves(matrix: Any, rank: int) -> Factors:
    """The best approximation of this rank as two factors that share the singular values evenly."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]
