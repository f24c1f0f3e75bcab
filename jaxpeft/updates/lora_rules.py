"""LoRA+ and LoRA-FA as optax transformations: learning rates and gradients of the factors.

**LoRA+**: ``B`` learns at `ratio` times the rate of ``A``. The groups are those of PEFT's
``create_loraplus_optimizer``: "a" (factors A, AdaLoRA's singular values and whole matrices, at the
usual rate), "b" (factors B and vectors, at the rate times the ratio), "b_no_decay" (biases, at the
same rate without weight decay) and "embedding" (factors of the embedding table, at a rate of their
own). Each family declares which arrays are factors B, and which arrays learn at another rate than
their number of axes implies.

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

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.core import paths
from jaxpeft.core.array_role import ORDINARY, ArrayRole
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import SCALE, Spec
from jaxpeft.methods.family import Kind
from jaxpeft.methods.registry import KINDS

EMBEDDING_RATE = 1e-6
"""Peak learning rate of the embedding table's factors in LoRA+, which is PEFT's default."""

DAMPING = 1e-8
"""The number that LoRA-FA adds to the diagonal of ``A^T A``."""


def lora_plus(
    make_rule: Callable[[float, bool], optax.GradientTransformation],
    ratio: float,
    arrays: Mapping[str, ArrayRole],
    spec: Spec | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The update rules of LoRA+, by group of leaves.

    Args:
        make_rule: ``make_rule(factor, decay)`` makes a rule. Its peak learning rate is `factor`
            times the usual one, or `EMBEDDING_RATE` for a factor of 0; `decay` says whether it
            decays weights.
        ratio: Learning rate of B over that of A.
        arrays: The roles of the adapter's arrays by name, `Kind.arrays` of its family.
        spec: For an adapter that was made with roles, its spec, which knows the tables.

    Returns:
        A transformation over ``{"base": ..., "adapter": ...}`` whose frozen leaves are masked.
    """
    rules: dict[Hashable, optax.GradientTransformation] = {
        "a": make_rule(1.0, True),
        "b": make_rule(ratio, True),
        "b_no_decay": make_rule(ratio, False),
        "embedding": make_rule(0.0, True),
    }
    return optax.partition(rules, lambda tree: lora_plus_groups(tree, arrays, spec))


def lora_plus_groups(tree: Any, arrays: Mapping[str, ArrayRole], spec: Spec | None = None) -> Any:
    """Labels every leaf of ``{"base": ..., "adapter": ...}`` with its group.

    Args:
        tree: Arrays or shapes.
        arrays: The roles of the adapter's arrays, as for `lora_plus`.
        spec: As for `lora_plus`.

    Raises:
        UserError: If no array is declared to learn faster, as LoRA's factor B is.
    """
    names = [_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if not any(_role(name, arrays).fast for name in names):
        raise UserError(
            "optim.lora_plus_ratio: this method has no array that learns faster; set it to null, "
            "or take the method lora."
        )
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: _group(_name(keys), x.ndim, arrays, spec), tree
    )


def project_b(kind: Kind) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of B by those of LoRA-FA.

    Args:
        kind: The family of the adapter. If it has no such factors, gradients are unchanged.

    Returns:
        A stateless transformation. Its update takes extra arguments. ``whole=`` is the tree with
        its frozen leaves, which holds A (`jaxpeft.masked` passes it). ``buffers=`` hold the scales,
        and ``spec=`` is the adapter's, which knows the tables (the training step passes both).
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
            place, _, array = _name(keys).rpartition("/")
            if kind.lora_fa is None or array != kind.lora_fa[1]:
                return g
            if _is_table(place.removeprefix("adapter/"), extra.get("spec")):
                return g
            a = paths.get(whole, f"{place}/{kind.lora_fa[0]}")
            scale = paths.get(buffers, f"{place.removeprefix('adapter/')}/{SCALE}")
            return projected(g, a, scale)

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


def without_a(trainable: Any, kind: Kind, spec: Spec | None = None) -> Any:
    """Copies a tree of booleans over an adapter's arrays, False at the factors A of kernels.

    Both factors of the embedding table stay trained, as in PEFT, because the first starts at zero.

    Args:
        trainable: Which arrays are trained, from `Method.trainable`.
        kind: The family of the adapter.
        spec: For an adapter that was made with roles, its spec.
    """

    def stays(keys: Any, on: bool) -> bool:
        place, _, array = _name(keys).rpartition("/")
        is_a = kind.lora_fa is not None and array == kind.lora_fa[0]
        return on and not (is_a and not _is_table(place, spec))

    return jax.tree_util.tree_map_with_path(stays, trainable)


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
        lora_plus_groups({"adapter": params}, KINDS[kind].arrays)
    if optim.lora_fa and KINDS[kind].lora_fa is None:
        raise UserError(
            f"optim.lora_fa: the step of its factor b is made for the method lora, not {kind}; set "
            "it to false."
        )


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_table(place: str, spec: Spec | None) -> bool:
    """Whether a place with factors is an embedding table; others are kernels, whatever the name."""
    if spec is None:
        return place.endswith("embedding")
    return place in spec.paths and spec.is_table(place)


def _role(name: str, arrays: Mapping[str, ArrayRole]) -> ArrayRole:
    """What a leaf of ``{"base": ..., "adapter": ...}`` is, by its path; the base's are ordinary."""
    owner, _, path = name.partition("/")
    return arrays.get(path.rpartition("/")[2], ORDINARY) if owner == "adapter" else ORDINARY


def _group(name: str, ndim: int, arrays: Mapping[str, ArrayRole], spec: Spec | None) -> str:
    path, role = name.partition("/")[2], _role(name, arrays)
    if _is_table(path.rpartition("/")[0], spec) and role.side is not None:
        return "embedding"
    if "bias" in name:
        return "b_no_decay"
    vector = ndim - paths.is_stacked(path) == 1
    return "b" if role.fast or (vector and role.fast is None) else "a"
