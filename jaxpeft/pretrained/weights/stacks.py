"""Collects the layers of a parameter in host memory while a model is loaded.

A plain parameter is one buffer. A quantised one is read one layer at a time, and each layer becomes
codes and scales before the next is read.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from jaxpeft.files.tensors import TensorInfo, decode, deinterleave
from jaxpeft.ops.quant import QuantTensor, quantize_kernel

# Rows copied at once when a matrix is transposed, so that both sides stay in the cache.
TILE_ROWS = 64
# Values decoded at once, which bounds the memory for dequantising and casting.
SLAB_VALUES = 1 << 20


class PlainStack:
    """A parameter as one array.

    Attributes:
        result: The array.
    """

    def __init__(self, shape: tuple[int, ...], layers: int | None, dtype: Any):
        self.result = np.empty(((layers,) if layers else ()) + shape, dtype)
        self._stacked = layers is not None

    def buffer(self, layer: int) -> np.ndarray:
        """The buffer for the values of a layer."""
        return self.result[layer] if self._stacked else self.result

    def done(self, layer: int) -> None:
        """Is called when the buffer of this layer holds its values."""


class QuantStack:
    """A kernel that is quantised layer by layer.

    Attributes:
        result: Codes and scales in host memory.
    """

    def __init__(
        self, shape: tuple[int, ...], layers: int | None, dtype: Any, quant_type: str, double: bool
    ):
        self._layer = np.empty(shape, dtype)
        self._quant_type, self._double = quant_type, double
        stack = () if layers is None else (layers,)
        self._stacked = layers is not None
        quantize = functools.partial(quantize_kernel, quant_type=quant_type, double=double)
        one = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, dtype))
        self.result: QuantTensor = jax.tree.map(
            lambda leaf: np.empty((*stack, *leaf.shape), leaf.dtype), one
        )

    def buffer(self, layer: int) -> np.ndarray:
        """The buffer for the values of a layer, the same memory for all layers."""
        return self._layer

    def done(self, layer: int) -> None:
        """Quantises the values in the buffer."""
        quantized = quantize_kernel(self._layer, self._quant_type, self._double)

        def keep(whole: np.ndarray, one: jax.Array) -> None:
            whole[layer if self._stacked else ...] = np.asarray(one)

        jax.tree.map(keep, self.result, quantized)


def fill(out: np.ndarray, raw: np.ndarray, info: TensorInfo, transposed: bool, heads: int) -> int:
    """Decodes, transposes and casts one tensor into `out`, a slab of rows at a time.

    Args:
        out: The buffer, in the parameter's layout and the target dtype.
        raw: The tensor's bytes.
        info: Its dtype and shape.
        transposed: Whether `out` is the transpose of the tensor.
        heads: Heads whose rows are interleaved; 0 for none.

    Returns:
        The number of values in `out` that are not finite.
    """
    rows = info.shape[0]
    row_bytes = info.nbytes // rows
    unit = rows // heads if heads else 1
    step = max(SLAB_VALUES * rows // math.prod(info.shape) // unit, 1) * unit
    bad = 0
    for start in range(0, rows, step):
        part = raw[start * row_bytes : (start + step) * row_bytes]
        value = decode(
            part, dataclasses.replace(info, shape=(len(part) // row_bytes, *info.shape[1:]))
        )
        if heads:
            value = deinterleave(value, len(value) // unit)
        with np.errstate(over="ignore"):  # counted below
            value = value.astype(out.dtype, copy=False)
        bad += count_nonfinite(value)
        if transposed:
            for tile in range(0, len(value), TILE_ROWS):
                to = slice(start + tile, start + min(tile + TILE_ROWS, len(value)))
                out[:, to] = value[tile : tile + TILE_ROWS].T
        else:
            out[start : start + len(value)] = value
    return bad


def count_nonfinite(value: np.ndarray) -> int:
    """The number of values that are NaN or infinite, by their exponent bits."""
    bits, mask = {
        "float32": (np.uint32, 0x7F800000),
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
    }[value.dtype.name]
    flat = np.ascontiguousarray(value).reshape(-1).view(bits)
    step = 1 << 20
    return sum(
        int(np.count_nonzero((flat[i : i + step] & bits(mask)) == bits(mask)))
        for i in range(0, flat.size, step)
    )
