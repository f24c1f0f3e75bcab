"""LoKr: the change of a kernel is a Kronecker product.

A kernel ``W`` of shape ``(m n, l k)`` is used as ``W + scale * kron(W1, W2)`` with
``W1: (m, l)``, ``W2: (n, k)`` and ``scale = alpha / rank``. Either factor is trained whole, or
as a product of rank `rank` if that is smaller (W1 only with `decompose_both`). The Kronecker
product is never built: inputs are reshaped to ``(m, n)`` and multiplied from both sides. Flax
kernels are the transpose of the paper's: our ``W1`` is PEFT's ``lokr_w1^T``. Layers of a stack
that are not adapted hold zeros in all factors and have rank 0.

Reference:
    Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
    Evaluation", 2023, https://arxiv.org/abs/2309.14859, section 3.3.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter, weigh_scales
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.kernels import lycoris
from jaxpeft.methods.kernels.lycoris import uniform
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import contiguous, modules_of, require_finite
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import PRODUCT, OnBase, linear, materialize, shape_of

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """Which kernels to adapt, how strongly, and how their sides are split.

    Attributes:
        rank: Inner dimension of factors that are products.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        decompose_both: Whether W1 may be a product too.
        decompose_factor: Size of W1's sides if it divides the kernel's, else an upper bound; -1
            splits near the square root.
    """

    name: ClassVar[str] = "lokr"

    rank: int = 8
    alpha: float = 8.0
    targets: paths.Targets = "all-linear"
    exclude: paths.Targets = ()
    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self):
        lycoris.check_fields(self)
        factor = self.decompose_factor
        if (
            isinstance(factor, bool)
            or not isinstance(factor, int)
            or not (factor > 0 or factor == -1)
        ):
            raise ValueError(
                f"LoKr.decompose_factor must be -1 or a whole number of at least 1, got {factor!r}."
            )

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        As in PEFT, W1 (or its second factor) is zero. The other arrays are uniform within ``1 /
        sqrt(inputs)``.

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

        def draw(path: str, key: jax.Array) -> dict[str, jax.Array]:
            *stacked, d_in, d_out = shape_of(paths.get(params, path))
            shapes = factor_shapes(
                d_in, d_out, self.rank, self.decompose_both, self.decompose_factor
            )
            drawn = {}
            for one, (name, shape) in zip(jax.random.split(key, 4), shapes.items(), strict=False):
                zero = name in ("w1", "w1_b")
                whole = (*stacked, *shape)
                drawn[name] = jnp.zeros(whole) if zero else uniform(one, whole, shape[0])
            return drawn

        options = make_options(self.decompose_both, self.decompose_factor)
        return lycoris.new_adapter(self, params, key, draw, options)


def make_options(decompose_both: bool, decompose_factor: int) -> tuple[tuple[str, Any], ...]:
    """The spec's options."""
    return ("decompose_both", decompose_both), ("decompose_factor", decompose_factor)


def split(size: int, factor: int) -> tuple[int, int]:
    """The sizes of both factors' sides: PEFT's ``factorization``.

    Args:
        size: Inputs or outputs of a kernel.
        factor: The first size if it divides, else an upper bound for the smaller size; -1 for no
            bound.

    Example:
        >>> split(128, -1), split(128, 4), split(128, 5)
        ((8, 16), (4, 32), (4, 32))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    first = max(n for n in range(1, most + 1) if size % n == 0)
    return first, size // first


def factor_shapes(
    d_in: int, d_out: int, rank: int, decompose_both: bool, decompose_factor: int
) -> dict[str, tuple[int, int]]:
    """The factors of a kernel and their shapes, by PEFT's rules."""
    (m, n), (l, k) = split(d_in, decompose_factor), split(d_out, decompose_factor)  # noqa: E741
    shapes = {}
    for name, rows, columns, low in (("w1", m, l, decompose_both), ("w2", n, k, True)):
        if low and rank < max(rows, columns) / 2:
            shapes[f"{name}_a"], shapes[f"{name}_b"] = (rows, rank), (rank, columns)
        else:
            shapes[name] = (rows, columns)
    return shapes


@flax.struct.dataclass
class LoKrKernel(OnBase):
    """A frozen kernel with the factors of its change.

    Attributes:
        base: Kernel ``(m n, l k)``, an array or a node.
        factors: ``w1`` of shape ``(m, l)``, or ``w1_a`` and ``w1_b`` whose product it is; the same
            for ``w2`` of shape ``(n, k)``; float32.
        scale: Scalar.
    """

    base: Any
    factors: dict
    scale: Any

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x (base + delta)`` without forming delta; float32 in the branch, rounded once."""
        y = linear(x, self.base)
        w1, w2 = (whole(self.factors, name) for name in ("w1", "w2"))
        h = x.astype(w1.dtype).reshape(-1, w1.shape[0], w2.shape[0])
        low = jnp.einsum("tmk,ml->tlk", checkpoint_name(h @ w2, PRODUCT), w1) * self.scale
        return (y.astype(low.dtype) + low.reshape(y.shape)).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``base + delta`` in float32, rounded to the base's dtype; also of a stack."""
        w1, w2 = (whole(self.factors, name) for name in ("w1", "w2"))
        delta = jnp.einsum("...ml,...nk->...mnlk", w1, w2, precision=HIGHEST).reshape(self.shape)
        delta *= jnp.asarray(self.scale, jnp.float32)[..., None, None]
        return (materialize(self.base).astype(jnp.float32) + delta).astype(self.dtype)


def whole(factors: Mapping[str, Any], name: str) -> Float[Array, "*stack rows columns"]:
    """``w1`` or ``w2`` as one array; factors are multiplied."""
    if name in factors:
        return factors[name]
    return jnp.matmul(factors[f"{name}_a"], factors[f"{name}_b"], precision=HIGHEST)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel adapted with LoKr."""
    return {leaf.path: LoKrKernel(leaf.base, leaf.params, leaf.buffers["scale"])}


def leaf_shape(params: dict) -> tuple[int, ...]:
    """The shape of the kernel that the factors of one leaf belong to, layer axis included."""
    sides = []
    for name in ("w1", "w2"):
        parts = [params[part] for part in (name, f"{name}_a", f"{name}_b") if part in params]
        sides.append((*parts[0].shape[:-1], parts[-1].shape[-1]))
    (*stacked, m, l), (*_, n, k) = sides  # noqa: E741
    return (*stacked, m * n, l * k)


def config_of(adapter: Adapter) -> LoKr:
    """The config of an adapter; targets come back as full names.

    Raises:
        UserError: If ranks or scales differ from layer to layer.
    """
    rank, alpha, names = lycoris.rank_and_alpha(adapter)
    return LoKr(rank=rank, alpha=alpha, targets=names, **dict(adapter.spec.options))


def config_from_peft(values: Values) -> LoKr:
    """Reads PEFT's config; see `PeftFormat`."""
    return LoKr(**lycoris.fields_from_peft(values), **_split_fields(values))


def _split_fields(values: Values) -> dict[str, Any]:
    """The fields about the split of a kernel's sides, from PEFT's config."""
    both, factor = values.flag("decompose_both"), values.get("decompose_factor")
    if factor != -1:
        factor = values.count("decompose_factor")
    return {"decompose_both": both, "decompose_factor": factor}


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`.

    Raises:
        UserError: A factor would be a product in some layers and whole in others.
    """
    sites = paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    ranks = lycoris.read_ranks(values, chosen)
    options = _split_fields(values)
    shapes, kinds = {}, {}
    for name, site in chosen.items():
        *_, d_in, d_out = shape_of(paths.get(base.params, site.path))
        shapes[name] = factor_shapes(d_in, d_out, ranks[name][0], **options)
        kinds.setdefault(site.path, set()).add(tuple(shapes[name]))
    mixed = [path for path, found in kinds.items() if len(found) > 1]
    if mixed:
        raise UserError(
            f"{values.file}: rank_pattern: makes factors of {first_few(mixed, 3)} products in some "
            "layers and whole in others, which is not supported yet."
        )
    wanted = {
        _key(name, part): shape[::-1] for name in chosen for part, shape in shapes[name].items()
    }
    tensors.require(wanted, base.name)
    width, modules = max(rank for rank, _ in ranks.values()), {}
    for name in chosen:
        modules[name] = {}
        for part in shapes[name]:
            more = width - ranks[name][0]
            pad = {"_a": ((0, 0), (0, more)), "_b": ((0, more), (0, 0))}.get(
                part[2:], ((0, 0),) * 2
            )
            modules[name][part] = np.pad(tensors.read(_key(name, part)).T, pad)
    return lycoris.stacked_adapter(LoKr.name, modules, ranks, base, make_options(**options))


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    ranks, _ = lycoris.ranks_and_alphas(adapter)
    tensors = {}
    for name, path, at in modules_of(adapter):
        for part, array in paths.get(adapter.params, path).items():
            value = np.asarray(array)[at]
            require_finite(name, value)
            if part.endswith("_a"):
                value = value[:, : ranks[name]]
            elif part.endswith("_b"):
                value = value[: ranks[name]]
            tensors[_key(name, part)] = contiguous(value.T)
    return lycoris.ranks_values(adapter, base) | dict(adapter.spec.options), tensors


def _key(name: str, part: str) -> str:
    """PEFT's key of a factor; the factors of a product are swapped, because PEFT transposes."""
    part = part.translate(str.maketrans("ab", "ba"))
    return f"{PREFIX}{name}.lokr_{part}"


PEFT = PeftFormat(
    type="LOKR",
    title="LoKr adapter",
    defaults=lycoris.DEFAULTS
    | {"decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
    read_keys=(*lycoris.READ_KEYS, "decompose_both", "decompose_factor"),
    harmless_keys=(*lycoris.HARMLESS_KEYS, "rank_dropout_scale"),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=LoKr,
    bind=bind,
    leaf_shape=leaf_shape,
    config_of=config_of,
    arrays={
        **dict.fromkeys(("w1_a", "w2_a"), ArrayRole(rank_axis=-1)),
        **dict.fromkeys(("w1_b", "w2_b"), ArrayRole(rank_axis=-2)),
    },
    weigh=weigh_scales,
    peft=PEFT,
)
