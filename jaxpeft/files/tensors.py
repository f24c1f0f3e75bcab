"""A tensor in a file of any format: where its bytes lie, and how they are decoded."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxpeft.files.storage import StoragePath

PLAIN_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}


# Bytes of a block of 32 values in ggml's layouts.
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
BLOCK_VALUES = 32


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The place and type of one tensor.

    Attributes:
        file: The file that holds it.
        offset: First byte in the file.
        nbytes: Length in bytes.
        dtype: "F32", "F16", "BF16", or a ggml block type.
        shape: The shape in torch's order: a linear weight is ``(out, in)``.
    """

    file: StoragePath
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def expected_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The number of bytes of a tensor with this dtype and shape.

    Raises:
        ValueError: The last axis is no multiple of the block length.
        KeyError: The dtype is not supported.
    """
    count = math.prod(shape)
    if dtype in PLAIN_DTYPES:
        return count * PLAIN_DTYPES[dtype].itemsize
    block = BLOCK_BYTES[dtype]
    if not shape or shape[-1] % BLOCK_VALUES:
        raise ValueError(f"rows of {dtype} come in blocks of {BLOCK_VALUES} values")
    return count // BLOCK_VALUES * block


def decode(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Turns raw bytes into floats in the shape of `info`.

    Plain dtypes become views of `raw`; block types are dequantised to float32 by the gguf package.
    """
    if info.dtype in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[info.dtype]).reshape(info.shape)
    from gguf import GGMLQuantizationType, quants

    rows = raw.reshape(*info.shape[:-1], -1)
    return quants.dequantize(rows, GGMLQuantizationType[info.dtype]).reshape(info.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k.

    For each head, rows ``0, d/2, 1, d/2 + 1, ...`` become ``0, 1, 2, ...``.

    Args:
        rows: ``(heads * head_dim, ...)``.
        heads: Number of heads in axis 0.

    Returns:
        A copy in Hugging Face's order.
    """
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
