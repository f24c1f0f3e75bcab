"""Quantised kernels: NF4, 4-bit and 8-bit integers, by blocks of 64 along the contracting axis.

Every block is divided by its largest magnitude, and each number becomes a code: the nearest of 16
values (``nf4``), or a whole number in -7..7 (``int4``) or -127..127 (``int8``). Two codes of 4 bits
share a byte: the first half of a block is in the low bits, the second half in the high bits. Scales
are float32, or are quantised to 8 bits as well (double quantisation, section 3).

==================  ===============  =================
quant_type          bytes a weight   double-quantised
==================  ===============  =================
``nf4``, ``int4``   0.5625           about 0.516
``int8``            1.0625           about 1.016
==================  ===============  =================

Reference:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
    https://arxiv.org/abs/2305.14314, equations 4 to 6 and appendix E.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.core.foreign_names import quantization_advice
from jaxpeft.ops.linear import Node
from jaxpeft.ops.products import product

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of NF4, appendix E."""

Quantization = Literal["nf4", "int4", "int8"]
BLOCK = 64
SCALE_GROUP = 256
"""How many neighbouring scales along d_out share one float32 when the scales are quantised."""


@flax.struct.dataclass
class QuantTensor(Node):
    """A kernel ``(d_in, d_out)`` as codes and scales.

    A stack of kernels has an axis of layers in front of every leaf.

    Attributes:
        codes: ``(blocks, 32, d_out)`` bytes of two codes each, or ``(blocks, 64, d_out)`` int8.
        scale: ``(blocks, d_out)``, float32, or int8 where `group_scale` is given.
        group_scale: ``(blocks, groups)``, float32: the factors of int8 scales.
        offset: Scalar that is added to int8 scales: the mean of all scales.
        quant_type: "nf4", "int4" or "int8".
        d_in: Rows of the kernel; the last block may have fewer than 64.
        dtype_name: The dtype of the kernel before quantisation.
    """

    codes: Any
    scale: Any
    group_scale: Any = None
    offset: Any = None
    quant_type: str = flax.struct.field(pytree_node=False, default="nf4")
    d_in: int = flax.struct.field(pytree_node=False, default=0)
    dtype_name: str = flax.struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel, layer axis included."""
        return (*self.codes.shape[:-3], self.d_in, self.codes.shape[-1])

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel before quantisation."""
        return jnp.dtype(self.dtype_name)

    @property
    def ndim(self) -> int:
        """Axes of the kernel, layer axis included."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def scales(self) -> Float[Array, "*stack blocks d_out"]:
        """The scale of every block in float32."""
        if self.group_scale is None:
            return self.scale
        d_out = self.scale.shape[-1]
        wide = jnp.repeat(self.group_scale, SCALE_GROUP, axis=-1)[..., :d_out]
        return self.scale.astype(jnp.float32) * wide + self.offset[..., None, None]

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*stack d_in d_out"]:
        """The kernel in `dtype`, computed from codes and scales."""
        if self.quant_type == "int8":
            values = self.codes.astype(jnp.float32)
        else:
            read = _select if self.quant_type == "nf4" else _signed
            halves = [read(self.codes & 15), read(self.codes >> 4)]
            values = jnp.concatenate(halves, axis=-2)
        values = (values * self.scales()[..., None, :]).astype(dtype)
        *stack, blocks, block, d_out = values.shape
        return values.reshape(*stack, blocks * block, d_out)[..., : self.d_in, :]

    def multiply(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """``x`` times the kernel; the backward pass dequantises again instead of keeping it."""
        return _product(x, self)

    def materialize(self) -> Float[Array, "*stack d_in d_out"]:
        """The kernel, or a stack of kernels, in the dtype before quantisation."""
        return self.dequantize(self.dtype)


@jax.custom_vjp
def _product(x: Any, weight: QuantTensor) -> Any:
    return product(x, weight.dequantize(x.dtype))


def _product_forward(x: Any, weight: QuantTensor) -> Any:
    return _product(x, weight), weight


def _product_backward(weight: QuantTensor, g: Any) -> Any:
    return product(g, weight.dequantize(g.dtype).T), None


_product.defvjp(_product_forward, _product_backward)


def _select(codes: Any) -> Any:
    """NF4 values of codes by nested selections, which vectorise better than a table look-up."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        values = [jnp.where(on, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def _signed(codes: Any) -> Any:
    return codes.astype(jnp.float32) - 8.0


def quantize_kernel(
    kernel: Float[Array | np.ndarray, "*stack d_in d_out"],
    quant_type: str = "nf4",
    double: bool = False,
) -> QuantTensor:
    """Quantises one kernel or a stack of kernels.

    Args:
        kernel: ``(d_in, d_out)`` or ``(layers, d_in, d_out)``; blocks run along ``d_in``, and the
            last one may be shorter.
        quant_type: "nf4", "int4" or "int8".
        double: Quantise the scales to 8 bits too.

    Returns:
        The node that stands for the kernel.

    Example:
        >>> quantize_kernel(jnp.array([[2.0], [0.3], [-2.0]])).dequantize()[:, 0]
        Array([ 2.       ,  0.3218604, -2.       ], dtype=float32)
    """
    coded = _quantize_blocks(kernel, quant_type)
    # Compiled apart: the scales of a kernel that several processes read are quantised later.
    return coded.replace(**quantize_scales(coded.scale)) if double else coded


@functools.partial(jax.jit, static_argnames="quant_type")
def _quantize_blocks(
    kernel: Float[Array | np.ndarray, "*stack d_in d_out"], quant_type: str
) -> QuantTensor:
    *stack, d_in, d_out = kernel.shape
    count = -(-d_in // BLOCK)
    pad = [(0, 0)] * len(stack) + [(0, count * BLOCK - d_in), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), pad).reshape(*stack, count, BLOCK, d_out)
    top = {"nf4": 1.0, "int4": 7.0, "int8": 127.0}[quant_type]
    scale = jnp.max(jnp.abs(blocks), axis=-2) / top
    relative = blocks / jnp.where(scale == 0, 1.0, scale)[..., None, :]
    if quant_type == "int8":
        codes = jnp.clip(jnp.round(relative), -127, 127).astype(jnp.int8)
    else:
        if quant_type == "nf4":
            wide = jnp.searchsorted((NF4[1:] + NF4[:-1]) / 2, relative).astype(jnp.uint8)
        else:
            wide = (jnp.clip(jnp.round(relative), -7, 7) + 8).astype(jnp.uint8)
        low, high = jnp.split(wide, 2, axis=-2)
        codes = low | (high << 4)
    name = jnp.dtype(kernel.dtype).name
    return QuantTensor(codes, scale, quant_type=quant_type, d_in=d_in, dtype_name=name)


@jax.jit
def quantize_scales(scale: Float[Array, "*stack blocks d_out"]) -> dict[str, Any]:
    """Subtracts the mean of the scales and quantises them to int8, in groups of 256 (equation 6).

    Returns:
        The fields of a `QuantTensor`: `scale`, `group_scale` and `offset`.
    """
    *stack, blocks, d_out = scale.shape
    offset = scale.mean(axis=(-2, -1))
    groups = -(-d_out // SCALE_GROUP)
    rest = scale - offset[..., None, None]
    pad = [(0, 0)] * (len(stack) + 1) + [(0, groups * SCALE_GROUP - d_out)]
    grouped = jnp.pad(rest, pad).reshape(*stack, blocks, groups, SCALE_GROUP)
    step = jnp.max(jnp.abs(grouped), axis=-1) / 127
    codes = jnp.round(grouped / jnp.where(step == 0, 1.0, step)[..., None])
    codes = codes.reshape(*stack, blocks, groups * SCALE_GROUP)[..., :d_out].astype(jnp.int8)
    return {"scale": codes, "group_scale": step, "offset": offset}


def nf4_round_trip(kernel: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack d_in d_out"]:
    """A kernel after quantisation to NF4 and back, in float32; its scales stay float32."""
    return quantize_kernel(kernel).dequantize()


def check_quant_type(quant_type: str | None, double: bool = False) -> None:
    """Checks a type of quantisation.

    Args:
        quant_type: "nf4", "int8", "int4", or None for none.
        double: Whether the scales are quantised too.

    Raises:
        UserError: The type is unknown, or `double` is set without one.
    """
    known = get_args(Quantization)
    if quant_type is not None and quant_type not in known:
        raise UserError(
            f"quantization: must be one of {', '.join(map(repr, known))} or null, got "
            f"{quant_type!r}{quantization_advice(str(quant_type))}."
        )
    if quant_type is None and double:
        raise UserError("double_quantization: there are no scales without quantization.")


def is_quantized(path: str, head: bool = False) -> bool:
    """Whether the leaf at `path` is a kernel that `quantize` quantises."""
    return path.endswith("/kernel") and (head or path != paths.HEAD)


def is_coded(weight: Any) -> bool:
    """Whether a weight is quantised: a `QuantTensor`, or a node of another shape around one."""
    return isinstance(getattr(weight, "raw", weight), QuantTensor)


def scheme_of(params: Mapping) -> str:
    """How a base is quantised, such as "nf4" or "nf4, scales quantised"; "" if it is not."""
    for leaf in paths.flatten(params).values():
        if isinstance(leaf, QuantTensor):
            return (
                leaf.quant_type
                if leaf.group_scale is None
                else f"{leaf.quant_type}, scales quantised"
            )
    return ""


def relative_change(kernel: Any, other: Any) -> float:
    """The norm of the difference of two arrays, divided by the norm of the first, in float64."""
    wide = np.asarray(kernel, np.float64)
    change = np.asarray(other, np.float64) - wide
    return math.sqrt(float(np.sum(change**2)) / max(float(np.sum(wide**2)), 1e-300))
