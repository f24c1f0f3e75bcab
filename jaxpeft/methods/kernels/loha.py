"""LoHa: the change of a kernel is the element-wise product of two low-rank matrices.

A kernel ``W`` is used as ``W + scale * (A1 B1) * (A2 B2)`` with ``A: (d_in, rank)``,
``B: (rank, d_out)`` and ``scale = alpha / rank``. This equals a plain product of two matrices with
``rank ** 2`` inner columns: all products of a column of A1 with one of A2, and of a row of B1 with
one of B2. If that is smaller than the kernel, it is used; if not, the change is built for one layer
at a time inside the layer, as PEFT always does. Flax kernels are the transpose of the paper's: our
``A1 B1`` is PEFT's ``(hada_w1_a hada_w1_b)^T``. Layers of a stack that are not adapted hold zeros
in all factors and have rank 0.

References:
    Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
    Learning", 2022, https://arxiv.org/abs/2108.06098, section 2.2.
    Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
    Evaluation", 2023, https://arxiv.org/abs/2309.14859, section 3.2.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
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
class LoHa(Method):
    """Which kernels to adapt, and how strongly.

    Attributes:
        rank: Inner dimension of both products.
        alpha: Numerator of the scale.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
    """

    name: ClassVar[str] = "loha"

    rank: int = 8
    alpha: float = 8.0
    targets: paths.Targets = "all-linear"
    exclude: paths.Targets = ()

    def __post_init__(self):
        lycoris.check_fields(self)

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that leaves the model's function unchanged.

        As in PEFT, A1 is uniform within ``1 / sqrt(d_in)``, B1 and B2 within ``1 / sqrt(rank)``,
        and A2 is zero.

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
            keys = jax.random.split(key, 3)
            return {
                "a1": uniform(keys[0], (*stacked, d_in, self.rank), d_in),
                "b1": uniform(keys[1], (*stacked, self.rank, d_out), self.rank),
                "a2": jnp.zeros((*stacked, d_in, self.rank)),
                "b2": uniform(keys[2], (*stacked, self.rank, d_out), self.rank),
            }

        return lycoris.new_adapter(self, params, key, draw)


@flax.struct.dataclass
class LoHaKernel(OnBase):
    """A frozen kernel with the factors of its change.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        a1: ``(d_in, rank)``, float32; so is `a2`.
        b1: ``(rank, d_out)``, float32; so is `b2`.
        a2: See `a1`.
        b2: See `b1`.
        scale: Scalar.
    """

    base: Any
    a1: Any
    b1: Any
    a2: Any
    b2: Any
    scale: Any

    def delta(self) -> Float[Array, "*stack d_in d_out"]:
        """The change of the kernel, in float32; also of a stack."""
        first = jnp.matmul(self.a1, self.b1, precision=HIGHEST)
        second = jnp.matmul(self.a2, self.b2, precision=HIGHEST)
        return jnp.asarray(self.scale, jnp.float32)[..., None, None] * first * second

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x (base + delta)``, the change computed and added in float32 and rounded once."""
        y = linear(x, self.base)
        h = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        (d_in, rank), d_out = self.a1.shape, self.b1.shape[-1]
        if rank**2 * (d_in + d_out) < d_in * d_out:
            a = (self.a1[:, :, None] * self.a2[:, None, :]).reshape(d_in, rank**2)
            b = (self.b1[:, None, :] * self.b2[None, :, :]).reshape(rank**2, d_out)
            change = (checkpoint_name(h @ a, PRODUCT) @ b) * self.scale
        else:
            change = h @ self.delta()
        return (y.astype(jnp.float32) + change.reshape(y.shape)).astype(x.dtype)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``base + delta`` in float32, rounded to the base's dtype; also of a stack."""
        return (materialize(self.base).astype(jnp.float32) + self.delta()).astype(self.dtype)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a kernel adapted with LoHa."""
    return {leaf.path: LoHaKernel(leaf.base, **leaf.params, scale=leaf.buffers["scale"])}


def leaf_shape(params: dict) -> tuple[int, ...]:
    """The shape of the kernel that the factors of one leaf belong to, layer axis included."""
    return (*params["a1"].shape[:-1], params["b1"].shape[-1])


def config_of(adapter: Adapter) -> LoHa:
    """The config of an adapter; targets come back as full names.

    Raises:
        UserError: If ranks or scales differ from layer to layer.
    """
    rank, alpha, names = lycoris.rank_and_alpha(adapter)
    return LoHa(rank=rank, alpha=alpha, targets=names)


PEFT_NAMES = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
"""PEFT's name of every factor; PEFT stores the transpose."""


def config_from_peft(values: Values) -> LoHa:
    """Reads PEFT's config; see `PeftFormat`."""
    return LoHa(**lycoris.fields_from_peft(values))


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`."""
    sites = paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    ranks = lycoris.read_ranks(values, chosen)
    shapes = {}
    for name, site in chosen.items():
        *_, d_in, d_out = shape_of(paths.get(base.params, site.path))
        for ours, theirs in PEFT_NAMES.items():
            rank = ranks[name][0]
            shapes[f"{PREFIX}{name}.{theirs}"] = (rank, d_in) if ours[0] == "a" else (d_out, rank)
    tensors.require(shapes, base.name)
    width, modules = max(rank for rank, _ in ranks.values()), {}
    for name in chosen:
        more = width - ranks[name][0]
        modules[name] = {
            ours: np.pad(
                tensors.read(f"{PREFIX}{name}.{theirs}").T,
                ((0, 0), (0, more)) if ours[0] == "a" else ((0, more), (0, 0)),
            )
            for ours, theirs in PEFT_NAMES.items()
        }
    return lycoris.stacked_adapter(LoHa.name, modules, ranks, base)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    ranks, _ = lycoris.ranks_and_alphas(adapter)
    tensors = {}
    for name, path, at in modules_of(adapter):
        for ours, theirs in PEFT_NAMES.items():
            value = np.asarray(paths.get(adapter.params, f"{path}/{ours}"))[at]
            require_finite(name, value)
            value = value[:, : ranks[name]] if ours[0] == "a" else value[: ranks[name]]
            tensors[f"{PREFIX}{name}.{theirs}"] = contiguous(value.T)
    return lycoris.ranks_values(adapter, base), tensors


PEFT = PeftFormat(
    type="LOHA",
    title="LoHa adapter",
    defaults=lycoris.DEFAULTS,
    read_keys=lycoris.READ_KEYS,
    harmless_keys=lycoris.HARMLESS_KEYS,
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=LoHa,
    bind=bind,
    leaf_shape=leaf_shape,
    config_of=config_of,
    arrays={
        **dict.fromkeys(("a1", "a2"), ArrayRole(rank_axis=-1)),
        **dict.fromkeys(("b1", "b2"), ArrayRole(rank_axis=-2)),
    },
    weigh=weigh_scales,
    peft=PEFT,
)
