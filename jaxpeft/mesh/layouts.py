"""The placement of arrays: a table of path patterns over the mesh ``("data", "fsdp", "tensor")``.

A leaf of the base follows the first rule whose pattern matches its whole path; a config may put
rules of its own in front. Leaves without a rule, as other models have them, are placed by the
meaning or the sizes of their axes (`jaxpeft.mesh.any_model`). A dimension is replicated if the axis
does not divide it or if heads would be cut; `unsharded` names such leaves. An adapter's factors
follow their kernel's tensor axis, are replicated over fsdp, and never split the rank. The
optimizer's moments follow their parameter. Batches are split over data and fsdp.

Reference:
    Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3 (which side of
    each matrix the tensor axis cuts).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AxisType, Mesh

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embed_tokens/embedding", ("tensor", "fsdp")),
    ("lm_head/kernel", ("fsdp", "tensor")),
    ("layers/self_attn/(q|k|v)_proj/kernel", (None, "fsdp", "tensor")),
    ("layers/self_attn/(q|k|v)_proj/bias", (None, "tensor")),
    ("layers/self_attn/o_proj/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/(gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    ("layers/mlp/(gate|up)_proj/bias", (None, "tensor")),
    ("layers/mlp/down_proj/kernel", (None, "tensor", "fsdp")),
    (".*/bias", ()),
    (".*scale", ()),
)
"""Pairs of a pattern of base paths and the mesh axis of each dimension."""

VOCAB = ("tensor", "fsdp")

HEADS: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    paths.HEAD: (None, VOCAB),
    paths.EMBEDDING: (VOCAB, None),
}
"""Sharding of the head while logits are computed: each device holds a slice of the vocabulary."""


@runtime_checkable
class Sizes(Protocol):
    """The sizes of a model that decide which cuts are allowed; `jaxpeft.ModelConfig` has them."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, with the rules that place leaves on it.

    Attributes:
        mesh: Over ``data``, ``fsdp`` and ``tensor``.
        rules: Rules in front of `RULES`, see `parse_rules`.
        model: Sizes of the model, so that the tensor axis never cuts a head: if the axis has more
            shards than there are key/value heads, their projections are replicated. None allows any
            cut that divides.
        gathered: The sharding of weights while in use: unsharded over fsdp, heads as in `HEADS`.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    model: Sizes | None = None
    gathered: bool = False

    @property
    def shape(self) -> Mapping[str, int]:
        """The number of devices along every axis of the mesh."""
        return self.mesh.shape

    @property
    def spreads_vocab(self) -> bool:
        """Whether every device of the fsdp and tensor axes can hold a slice of the vocabulary."""
        shards = self.shape["tensor"] * self.shape["fsdp"]
        return self.model is not None and self.model.vocab_size % shards == 0

    def axes(self, path: str) -> tuple[Any, ...] | None:
        """The mesh axes of a base leaf's dimensions, never cutting a head; None without a rule."""
        if self.gathered and self.spreads_vocab and path in HEADS:
            return HEADS[path]
        axes = spec_of(path, self.rules)
        left_out = ("fsdp",) * self.gathered + ("tensor",) * bool(self.cut_heads(path))
        return axes and tuple(None if axis in left_out else axis for axis in axes)

    def cut_heads(self, path: str) -> int:
        """The number of heads that the tensor axis would have to cut in this leaf; 0 for none."""
        found = re.search(r"self_attn/(q|k|v|o)_proj/", path)
        if found is None or self.model is None:
            return 0
        heads = self.model.num_kv_heads if found[1] in "kv" else self.model.num_heads
        return heads if heads % self.shape["tensor"] else 0


def as_layout(mesh: Mesh | Layout, model: Sizes | None = None) -> Layout:
    """The layout of a mesh, or a given layout, with the model's sizes."""
    layout = mesh if isinstance(mesh, Layout) else Layout(mesh)
    return layout if model is None else dataclasses.replace(layout, model=model)


def parse_rules(rules: Mapping[str, str]) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Parses rules from a config.

    Args:
        rules: A dict from patterns of whole base paths to the mesh axis of each dimension, "-" for
            none: ``{"layers/mlp/up_proj/kernel": "- fsdp tensor"}``. Dimensions that are left out
            have none.

    Returns:
        Rules in the form of `RULES`.

    Raises:
        ValueError: A pattern is no regular expression, or an axis is unknown or given twice.

    Example:
        >>> parse_rules({"norm/scale": "fsdp"})
        (('norm/scale', ('fsdp',)),)
    """
    parsed = []
    for pattern, text in rules.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rules: {pattern!r} is no regular expression: {error}") from None
        axes = tuple(None if word == "-" else word for word in text.split())
        named = [axis for axis in axes if axis]
        if set(named) - set(AXES) or len(set(named)) < len(named):
            raise ValueError(
                f"rules: {pattern}: expected '-' or one of {', '.join(AXES)} for each dimension, "
                f"none twice, got {text!r}"
            )
        parsed.append((pattern, axes))
    return tuple(parsed)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh over all devices, or over some.

    Args:
        data: Devices that hold copies of the base and see different rows.
        fsdp: Devices that the base is spread over; they see different rows too.
        tensor: Devices that each matrix is cut over. One of the three may be -1: all devices that
            the others leave.
        devices: Which devices; None for all devices of all processes.

    Returns:
        A mesh with axes "data", "fsdp" and "tensor", of type Auto.

    Raises:
        UserError: If the product is not the number of devices.
    """
    sizes = [data, fsdp, tensor]
    count = jax.device_count() if devices is None else len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        asked = ", ".join(f"{axis}: {size}" for axis, size in zip(AXES, sizes, strict=True))
        divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"mesh: {{{asked}}} does not make {count} devices; each axis must be one of "
            f"{', '.join(divisors)} with product {count}, one of them may be -1."
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)


def spec_of(path: str, rules: Sequence[tuple] = ()) -> tuple[str | None, ...] | None:
    """The mesh axes in the first matching rule of `rules` and `RULES`; None without a rule."""
    return first_match(path, (*rules, *RULES))


def first_match(path: str, rules: Sequence[tuple]) -> tuple[str | None, ...] | None:
    """The mesh axes in the first rule whose pattern is the whole path; None without one."""
    for pattern, axes in rules:
        if re.fullmatch(pattern, path):
            return axes
    return None
