"""Orthogonal fine-tuning (OFT): inputs are rotated before they meet the frozen kernel.

A kernel is used as ``y = (x R) W`` with a block-diagonal, orthogonal ``R``. A block is made from a
skew-symmetric ``Q``, whose upper triangle is trained, by Cayley's transform. There are two modes,
as in PEFT; one is the transpose of the other:

* exact: ``R = (I + Q)^-1 (I - Q)``;
* Cayley-Neumann, the default: ``(I + Q)(I - Q)^-1`` as a series, by five terms
  ``R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``; nearly orthogonal as long as ``Q`` is small.

References:
    Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023,
    https://arxiv.org/abs/2306.07280, section 3.3.
    Qiu et al., "Orthogonal Finetuning Made Scalable", 2025, https://arxiv.org/abs/2506.19847,
    section 3.3 (the series).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import keep_targets, require_count
from jaxpeft.methods.kernels.cayley import cayley
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import (
    contiguous,
    modules_of,
    require_finite,
    stack,
    targets_value,
)
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import OnBase, linear, materialize, shape_of

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Which kernels are rotated, and how.

    Attributes:
        block_size: Width of a block; it must divide the inputs of every kernel.
        targets: "all-linear", a regex matched in full, or module names, as in PEFT.
        exclude: Modules to leave alone: a regex or names; wins over `targets`.
        exact: Use Cayley's transform itself, which solves a linear system for every block, instead
            of its series.
        terms: Terms of the series, counted as PEFT does.
    """

    name: ClassVar[str] = "oft"

    block_size: int = 32
    targets: paths.Targets = "all-linear"
    exclude: paths.Targets = ()
    exact: bool = False
    terms: int = 5

    def __post_init__(self):
        for field in ("block_size", "terms"):
            require_count(self, field, least=2)
        keep_targets(self)

    def check_any_model(self) -> None:
        """It can: what it does to a kernel or a bias needs nothing else of a model."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter that does not rotate: all ``Q`` are zero.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key; not used.
            context: Not used.

        Returns:
            The adapter.

        Raises:
            UserError: If a pattern matches nothing or the block size does not divide a width.
        """
        del key, context
        sites = paths.match(self.targets, self.exclude, paths.module_names(params))
        trained, buffers = {}, {}
        for path, rank in selected_layers(params, sites).items():
            d_in = shape_of(paths.get(params, path))[-2]
            blocks = count_blocks(d_in, self.block_size, f"OFT.block_size: {path}")
            width = self.block_size * (self.block_size - 1) // 2
            trained[path] = {"q": jnp.zeros((*rank.shape, blocks, width))}
            buffers[path] = {"rank": rank}
        spec = make_spec(tuple(sorted(trained)), self.block_size, self.exact, self.terms)
        return Adapter(paths.unflatten(trained), paths.unflatten(buffers), spec)


def make_spec(places: tuple[str, ...], block_size: int, exact: bool, terms: int) -> Spec:
    """The static part of an adapter."""
    options = (("block_size", block_size), ("exact", exact), ("terms", terms))
    return Spec(kind=OFT.name, paths=places, options=options)


def count_blocks(d_in: int, block_size: int, where: str) -> int:
    """The number of blocks that make up the inputs of a kernel.

    Args:
        d_in: Number of inputs.
        block_size: Inputs in a block.
        where: What the message begins with.

    Raises:
        UserError: The block size does not divide the inputs.
    """
    if d_in % block_size:
        fit = [n for n in range(2, d_in + 1) if d_in % n == 0]
        near = sorted(fit, key=lambda n: abs(n - block_size))[:3]
        raise UserError(
            f"{where} has {d_in} inputs, which {block_size} does not divide; block sizes that do "
            f"are {', '.join(map(str, sorted(near)))}."
        )
    return d_in // block_size


@flax.struct.dataclass
class OFTKernel(OnBase):
    """A frozen kernel after a rotation of its inputs.

    Attributes:
        base: Kernel ``(d_in, d_out)``, an array or a node.
        q: Upper triangles, row by row: ``(blocks, size * (size - 1) / 2)``, float32.
        rank: Scalar; 0 for a layer that is not adapted.
        exact: See `OFT`.
        terms: See `OFT`.
    """

    base: Any
    q: Any
    rank: Any
    exact: bool = flax.struct.field(pytree_node=False, default=False)
    terms: int = flax.struct.field(pytree_node=False, default=5)

    def rotations(self) -> Float[Array, "*stack blocks size size"]:
        """The blocks of ``R``; the identity, without a gradient, where the rank is 0."""
        on = jnp.asarray(self.rank)[..., None, None] > 0
        return cayley(jnp.where(on, self.q, 0.0), self.exact, self.terms)

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Computes ``(x R) W``; the rotation in float32, rounded to the dtype of `x`."""
        r = self.rotations()
        blocks = x.astype(r.dtype).reshape(-1, *r.shape[-3:-1])
        rotated = jnp.einsum("nbk,bkc->nbc", blocks, r, precision=HIGHEST)
        return linear(rotated.reshape(x.shape).astype(x.dtype), self.base)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """``R W`` in float32, rounded to the base's dtype; also of a stack."""
        r, w = self.rotations(), materialize(self.base).astype(jnp.float32)
        blocks = w.reshape(*w.shape[:-2], *r.shape[-3:-1], w.shape[-1])
        product = jnp.einsum("...bkc,...bcd->...bkd", r, blocks, precision=HIGHEST)
        return product.reshape(w.shape).astype(self.dtype)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for a rotated kernel."""
    exact, terms = leaf.options["exact"], leaf.options["terms"]
    q, rank = leaf.params["q"], leaf.buffers["rank"]
    return {leaf.path: OFTKernel(leaf.base, q, rank, exact=exact, terms=terms)}


def check(params: dict, adapter: Adapter) -> None:
    """Checks that the blocks make up the inputs of every kernel.

    Raises:
        UserError: The blocks of a kernel do not.
    """
    size = dict(adapter.spec.options)["block_size"]
    for path in adapter.spec.paths:
        base = paths.get(params, path)
        shape, theirs = shape_of(base), tuple(paths.get(adapter.params, f"{path}/q").shape)
        if theirs[:-1] != (*shape[:-2], shape[-2] // size):
            raise UserError(
                f"{path}: the adapter has blocks {theirs[:-1]} of size {size}, this base has "
                f"shape {shape}; it belongs to another model."
            )


def config_of(adapter: Adapter) -> OFT:
    """The config of an adapter; targets come back as full names."""
    options = dict(adapter.spec.options)
    return OFT(targets=tuple(name for name, _, _ in modules_of(adapter)), **options)


def config_from_peft(values: Values) -> OFT:
    """Reads PEFT's config; see `PeftFormat`.

    Raises:
        UserError: The config gives the number of blocks, or a setting that rotates nothing.
    """
    values.only("init_weights", True)
    values.only("module_dropout", 0)
    if values.get("r"):
        raise values.wrong("r", "0, and oft_block_size in its place: OFT.block_size holds a size")
    block_size = values.count("oft_block_size")
    return OFT(
        block_size=block_size,
        **_rotation_fields(values),
        **values.selection().fields(values.file),
    )


def _rotation_fields(values: Values) -> dict[str, Any]:
    """The fields about rotations, from PEFT's config."""
    exact, terms = not values.flag("use_cayley_neumann"), values.count("num_cayley_neumann_terms")
    if terms < 2 and not exact:
        raise values.wrong("num_cayley_neumann_terms", "at least 2: PEFT rotates nothing by fewer")
    return {"exact": exact, "terms": max(terms, 2)}


@functools.cache
def size_in_peft(d_in: int, block_size: int, blocks: int) -> int:
    """The width of the blocks that PEFT makes: the divisor of the inputs nearest to the setting.

    Args:
        d_in: Inputs of the kernel.
        block_size: PEFT's ``oft_block_size``, or 0.
        blocks: PEFT's ``r``, or 0; one of the two is 0.
    """
    wanted = min(block_size or blocks, d_in)
    divisors = [n for n in range(1, d_in + 1) if d_in % n == 0]
    found = min(divisors, key=lambda n: (abs(n - wanted), n))
    return found if block_size else d_in // found


def _block_size(values: Values, widths: dict[str, int]) -> int:
    """The common width of all blocks; `widths` are the inputs of the kernels by module."""
    given = [values.count(key) if values.get(key) else 0 for key in ("oft_block_size", "r")]
    if all(given) or not any(given):
        raise values.wrong(
            "r", "0 beside an oft_block_size, and a number in its place if that is 0"
        )
    sizes = {name: size_in_peft(d_in, *given) for name, d_in in widths.items()}
    where = f"{values.file}: {'oft_block_size' if given[0] else 'r'} {max(given)}"
    if small := [name for name, size in sizes.items() if size < 2]:
        raise UserError(f"{where} makes blocks of one input in {small[0]}, which rotate nothing.")
    first, *others = sizes
    if other := [name for name in others if sizes[name] != sizes[first]]:
        raise UserError(
            f"{where} makes blocks of {sizes[first]} in {first} and of {sizes[other[0]]} in "
            f"{other[0]}; blocks of several sizes in one adapter are not supported."
        )
    return sizes[first]


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`.

    Raises:
        UserError: The config's block size does not fit every module of the base.
    """
    rotation, sites = _rotation_fields(values), paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    widths = {
        name: shape_of(paths.get(base.params, site.path))[-2] for name, site in chosen.items()
    }
    size = _block_size(values, widths)
    shapes = {_key(n): (d_in // size, size * (size - 1) // 2) for n, d_in in widths.items()}
    tensors.require(shapes, base.name)
    q = stack({name: {"q": tensors.read(_key(name))} for name in chosen}, sites, base.params)
    ranks = {path: {"rank": rank} for path, rank in selected_layers(base.params, chosen).items()}
    spec = make_spec(tuple(sorted(q)), size, **rotation)
    return Adapter(paths.unflatten(q), paths.unflatten(ranks), spec)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    tensors, names, options = {}, [], dict(adapter.spec.options)
    for name, path, at in modules_of(adapter):
        q = np.asarray(paths.get(adapter.params, f"{path}/q"))[at]
        require_finite(name, q)
        tensors[_key(name)] = contiguous(q)
        names.append(name)
    values = {
        "num_cayley_neumann_terms": options["terms"],
        "oft_block_size": options["block_size"],
        "target_modules": targets_value(names, paths.module_names(base.params)),
        "use_cayley_neumann": not options["exact"],
    }
    return values, tensors


def _key(name: str) -> str:
    return f"{PREFIX}{name}.oft_R.weight"


PEFT = PeftFormat(
    type="OFT",
    title="OFT adapter",
    defaults={
        "bias": "none",
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": 32,
        "r": 0,
        "target_modules": None,
        "use_cayley_neumann": True,
    },
    read_keys=(
        *("exclude_modules", "layers_pattern", "layers_to_transform", "num_cayley_neumann_terms"),
        *("oft_block_size", "r", "target_modules", "use_cayley_neumann"),
    ),
    harmless_keys=("eps", "init_weights", "module_dropout"),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=OFT,
    bind=bind,
    leaf_shape=lambda params: None,
    config_of=config_of,
    check=check,
    peft=PEFT,
)
