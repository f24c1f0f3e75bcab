"""LoRA+ and LoRA-FA as optax transformations: learning rates and gradients of the factors.

**LoRA+**: ``B`` learns at `ratio` times the rate of ``A``. The groups are those of PEFT's
``create_loraplus_optimizer``: "a" (factors A, AdaLoRA's singular values and whole matrices, at the
usual rate), "b" (factors B and vectors, at the rate times the ratio), "b_no_decay" (biases, at the
same rate without weight decay) and "embedding" (factors of the embedding table, at a rate of their
own).

**LoRA-FA**: ``A`` keeps its initial values, and the gradient of ``B`` becomes

    g_B <- (1 / scale^2) (A^T A + 1e-8 I)^-1 g_B

which makes the change of ``A B`` the nearest one to that of full fine-tuning. Factors of the
embedding table, whose A starts at zero, are trained as usual.

References:
    Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024,
    https://arxiv.org/abs/2402.12354, section 4.
    Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning", 2023, https://arxiv.org/abs/2308.03303, equation 3.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError

EMBEDDING_RATE = 1e-6
"""Peak learning rate of the embedding table's factors in LoRA+, which is PEFT's default."""

DAMPING = 1e-8
"""The number that LoRA-FA adds to the diagonal of ``A^T A``."""


def lora_plus(
    make_rule: Callable[[float, bool], optax.GradientTransformation], ratio: float
) -> optax.GradientTransformationExtraArgs:
    """The update rules of LoRA+, by group of leaves.

    Args:
        make_rule: ``make_rule(factor, decay)`` makes a rule. Its peak learning rate is `factor`
            times the usual one, or `EMBEDDING_RATE` for a factor of 0; `decay` says whether it
            decays weights.
        ratio: Learning rate of B over that of A.

    Returns:
        A transformation over ``{"base": ..., "adapter": ...}`` whose frozen leaves are masked.
    """
    rules: dict[Hashable, optax.GradientTransformation] = {
        "a": make_rule(1.0, True),
        "b": make_rule(ratio, True),
        "b_no_decay": make_rule(ratio, False),
        "embedding": make_rule(0.0, True),
    }
    return optax.partition(rules, lora_plus_groups)


def lora_plus_groups(tree: Any) -> Any:
    """Labels every leaf with its group.

    Raises:
        UserError: If no leaf is a factor ``b``.
    """
    names = [_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if not any(_is_factor(name, "b") for name in names):
        raise UserError(
            "optim.lora_plus_ratio: the method trains no factors a and b; set it to null, or take "
            "the method lora."
        )
    return jax.tree_util.tree_map_with_path(lambda keys, x: _group(_name(keys), x.ndim), tree)


def project_b() -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of B by those of LoRA-FA.

    Returns:
        A stateless transformation whose update takes two extra arguments: ``whole=``, the tree with
            its frozen leaves, which holds A (`jaxpeft.masked` passes it), and ``buffers=``, which
            hold the scales (the training step passes them).
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params
        whole, buffers = extra.get("whole"), extra.get("buffers")
        if whole is None or buffers is None:
            raise ValueError(
                "project_b: update needs whole= and buffers=; jaxpeft.masked and "
                "jaxpeft.make_train_step pass them."
            )

        def project(keys: Any, g: jax.Array) -> jax.Array:
            name = _name(keys)
            a = paths.get(whole, name.removesuffix("/b") + "/a")
            if not name.endswith("kernel/b") or a is None:
                return g
            place = name.removeprefix("adapter/").removesuffix("/b")
            return projected(g, a, paths.get(buffers, f"{place}/scale"))

        return jax.tree_util.tree_map_with_path(project, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def projected(g: jax.Array, a: jax.Array, scale: Any) -> jax.Array:
    """``(1 / scale^2) pinv(A^T A + 1e-8 I) g``; zero in layers whose scale is zero.

    The pseudo-inverse drops singular values that float32 cannot tell from zero: the padding of
    smaller ranks.

    Args:
        g: Gradient of B, ``(*stack, rank, d_out)``.
        a: ``(*stack, d_in, rank)``.
        scale: ``(*stack)``.
    """
    highest = jax.lax.Precision.HIGHEST
    gram = jnp.matmul(jnp.swapaxes(a, -1, -2), a, precision=highest)
    inverse = jnp.linalg.pinv(gram + DAMPING * jnp.eye(gram.shape[-1]), hermitian=True)
    on = scale != 0
    factor = jnp.where(on, 1.0 / jnp.square(jnp.where(on, scale, 1.0)), 0.0)
    return factor[..., None, None] * jnp.matmul(inverse, g, precision=highest)


def without_a(trainable: Any) -> Any:
    """Copies a tree of booleans over an adapter's arrays, False at the factors ``a`` of kernels.

    Both factors of the embedding table stay trained, as in PEFT, because the first starts at zero.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, on: on and not _name(keys).endswith("kernel/a"), trainable
    )


def check_factors(optim: Any, kind: str, params: Any) -> None:
    """Checks that a method has the factors that LoRA+ and LoRA-FA need.

    Args:
        optim: A `jaxpeft.updates.optimizers.OptimConfig`.
        kind: The kind of the adapter.
        params: Its trained arrays or their shapes.

    Raises:
        UserError: The config asks for one of them, and the method has no such factors.
    """
    if optim.lora_plus_ratio is not None:
        lora_plus_groups({"adapter": params})
    if optim.lora_fa and kind != "lora":
        raise UserError(
            f"optim.lora_fa: the step of its factor b is made for the method lora, not {kind}; set "
            "it to false."
        )


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_factor(name: str, letter: str) -> bool:
    return name.startswith("adapter/") and name.endswith("/" + letter)


def _group(name: str, ndim: int) -> str:
    place = name.partition("/")[2]
    if place in (f"{paths.EMBEDDING}/a", f"{paths.EMBEDDING}/b"):
        return "embedding"
    if "bias" in name:
        return "b_no_decay"
    vector = ndim - paths.is_stacked(place) == 1
    # In PEFT, AdaLoRA's singular values are a matrix with one column, not a vector.
    vector &= not _is_factor(name, "e")
    return "b" if vector or _is_factor(name, "b") else "a"
