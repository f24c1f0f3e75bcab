"""What an array of an adapter is to code that does not know the family it belongs to."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRole:
    """What one array of an adapted place is; the family declares it by the array's name.

    Every default says that there is nothing special about the array.

    Attributes:
        rank_axis: The axis that is as wide as the rank, counted from the end: -1 for a factor
            ``(d_in, rank)``. Numbers beyond the rank of a layer are padding.
        side: Which side of the base's matrix the array belongs to. Its last axis (the last but
            one where the last is the rank's) is then cut over devices as that side is.
        replaces: "whole" for an array of the base leaf's own shape that stands in for it; "part"
            for one that takes the place of some of the leaf's numbers, such as its rows. Neither
            can follow another adapter that changes the leaf.
        fast: Whether LoRA+ trains it at the higher rate; None leaves that to its number of axes:
            vectors are fast, matrices are not.
        unreached: What to tell the user where no gradient reaches the array, a clause; "" for the
            usual text.
    """

    rank_axis: int | None = None
    side: Literal["in", "out"] | None = None
    replaces: Literal["whole", "part"] | None = None
    fast: bool | None = None
    unreached: str = ""


ORDINARY = ArrayRole()
"""The role of an array that its family says nothing about."""
