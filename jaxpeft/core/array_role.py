"""The role of an adapter's array, for code that does not know the family it belongs to."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRole:
    """The properties of one array of an adapted place; the family declares them by the array's
    name.

    The defaults are those of an ordinary array.

    Attributes:
        rank_axis: The axis that is as wide as the rank, counted from the end: -1 for a factor
            ``(d_in, rank)``. Numbers beyond the rank of a layer are padding.
        side: The side of the base's matrix to which the array belongs. Its last axis (or the last
            but one, if the last is the rank's) is cut over devices like that side.
        replaces: "whole" for an array that replaces the base leaf and has its shape; "part" for an
            array that replaces some numbers of the leaf, such as rows. Neither can follow another
            adapter that changes the leaf.
        fast: Whether LoRA+ trains it at the higher rate; None decides by its number of axes:
            vectors are fast, matrices are not. Say it for arrays of kernels, because the stack axes
            of a model that is not of this package cannot be told from others.
        unreached: A clause for the user if no gradient reaches the array; "" for the usual text.
    """

    rank_axis: int | None = None
    side: Literal["in", "out"] | None = None
    replaces: Literal["whole", "part"] | None = None
    fast: bool | None = None
    unreached: str = ""


ORDINARY = ArrayRole()
"""The role of an array for which its family declares nothing."""
