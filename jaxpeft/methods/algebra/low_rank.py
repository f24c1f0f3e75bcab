"""Low-rank factors by singular value decomposition.

Reference:
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936,
    https://doi.org/10.1007/BF02288367.
"""

from typing import Any

import numpy as np

from jaxpeft.core.errors import UserError


def check_cut(rank: Any, energy: Any) -> None:
    """Checks the options that limit the size of low-rank factors.

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
    """Splits the top singular values evenly between two factors.

    It keeps `rank` of them, or as many as give the share `energy` of the squared norm.
    """
    if rank is None:
        share = np.cumsum(s**2) / max(float(np.sum(s**2)), np.finfo(np.float64).tiny)
        # The tolerance covers singular values that only rounding of float32 factors made nonzero.
        rank = int(np.searchsorted(share, (energy or 1.0) - 1e-12)) + 1
    root = np.sqrt(s[:rank])
    return u[:, : root.size] * root, root[:, None] * vt[: root.size]


def svd_of_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of ``a @ b`` from the small factors of their QR decompositions, in float64.

    Singular values that rounding may have caused are dropped, as in NumPy's ``matrix_rank``, but
    relative to ``|a| |b|``, because the product itself may be zero, as at PiSSA's start.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    q_left, r_left = np.linalg.qr(a)
    q_right, r_right = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    size = max(len(a), b.shape[1]) * np.linalg.norm(a) * np.linalg.norm(b)
    rank = int(np.sum(s > np.finfo(np.float64).eps * size))
    return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T
