"""Low-rank factors by singular value decomposition, and a LoRA from the factors of every layer.

Reference:
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936,
    https://doi.org/10.1007/BF02288367.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Spec


def check_cut(rank: Any, energy: Any) -> None:
    """Checks what limits the factors of a `truncate`.

    Args:
        rank: The rank to keep, or None.
        energy: The share of the squared singular values to keep, or None.

    Raises:
        UserError: Both are given, or one is out of its range.
    """
    if rank is not None and energy is not None:
        raise UserError("rank, energy: give one of them.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UserError(f"rank: must be a whole number of at least 1, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy: must be above 0 and at most 1, got {energy!r}.")


def cut(
    u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the largest singular values, each with their root: so many, or so much energy."""
    if rank is None:
        share = np.cumsum(s**2) / max(float(np.sum(s**2)), np.finfo(np.float64).tiny)
        # Less by what rounding of float32 factors leaves in singular values that should be zero.
        rank = int(np.searchsorted(share, (energy or 1.0) - 1e-12)) + 1
    root = np.sqrt(s[:rank])
    return u[:, : root.size] * root, root[:, None] * vt[: root.size]


def svd_of_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of ``a @ b`` from the small factors of their QR decompositions, in float64.

    Singular values that rounding may have made are left out, as NumPy's ``matrix_rank`` does, but
    measured against ``|a| |b|``: the product itself may be zero, as where PiSSA starts.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    q_left, r_left = np.linalg.qr(a)
    q_right, r_right = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    size = max(len(a), b.shape[1]) * np.linalg.norm(a) * np.linalg.norm(b)
    rank = int(np.sum(s > np.finfo(np.float64).eps * size))
    return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T


def lora_of(
    layers: Mapping[str, list[Any]],
    widths: Mapping[str, tuple[int, int]],
    scale: float,
    dropout: float,
    source: Adapter,
) -> Adapter:
    """A plain LoRA from the factors of every layer, None where a layer is left as it is.

    It has the base's name and revision of its `source`, and its chat settings.

    Raises:
        UserError: All layers are left as they are, so there is no LoRA to make.
    """
    ranks = {
        path: [0 if f is None else f[0].shape[1] for f in each] for path, each in layers.items()
    }
    width = max(max(each) for each in ranks.values())
    if width == 0:
        raise UserError("the adapters change nothing: there is no LoRA to make.")
    trained, frozen = {}, {}
    for path, each in layers.items():
        (d_in, d_out), count = widths[path], len(each)
        a, b = (
            np.zeros((count, d_in, width), np.float32),
            np.zeros((count, width, d_out), np.float32),
        )
        for layer, factors in enumerate(each):
            if factors is not None:
                a[layer, :, : ranks[path][layer]], b[layer, : ranks[path][layer]] = factors
        rank = np.array(ranks[path], np.int32)
        arrays = {
            "a": a,
            "b": b,
            "scale": np.where(rank > 0, np.float32(scale), np.float32(0)),
            "rank": rank,
            "dropout": np.full(count, dropout, np.float32),
            "rslora": np.zeros(count, bool),
        }
        if not paths.is_stacked(path):
            arrays = {name: value[0] for name, value in arrays.items()}
        arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
        trained[path] = {name: arrays.pop(name) for name in ("a", "b")}
        frozen[path] = arrays
    spec = Spec(kind="lora", paths=tuple(sorted(layers)), rank=width)
    params, buffers = paths.unflatten(trained), paths.unflatten(frozen)
    return dataclasses.replace(source, params=params, buffers=buffers, spec=spec)
