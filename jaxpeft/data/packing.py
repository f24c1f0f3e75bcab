"""Best-fit packing: several short examples share one sequence of fixed length.

Best-fit decreasing takes examples from long to short, and puts each into the fullest sequence that
still has room. It never uses more than 11/9 of the least possible number of sequences (plus one).

Reference:
    D. S. Johnson, "Near-optimal bin packing algorithms", 1973.
    Ding et al., "Fewer Truncations Improve Language Modeling", 2024,
    https://arxiv.org/abs/2404.10830, for packing of language model data.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Packs examples into sequences by best-fit decreasing.

    There is a list of sequences for every amount of room, and the amounts that occur are the set
    bits of one integer. The tightest fit is the lowest set bit from the length on, so the cost is
    linear in the number of examples, with ``max_length / 64`` words per example.

    Args:
        lengths: Tokens of every example.
        max_length: Room of a sequence in tokens.
        seed: Orders examples of equal length.

    Returns:
        Indices into `lengths`, one list per sequence; every index is in exactly one of them.

    Raises:
        ValueError: If a length is below 1 or above `max_length`.

    Example:
        >>> sorted(sorted(sequence) for sequence in pack([5, 3, 4, 2], 7, seed=0))
        [[0, 3], [1, 2]]
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(
                f"lengths[{index}] is {length}; expected 1 to max_length {max_length}."
            )
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> sequences
    rooms = 0  # bit r is set while with_room[r] is not empty
    for index in _long_to_short(lengths, seed):
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = max_length, len(sequences)
            sequences.append([])
        sequences[sequence].append(index)
        room -= length
        if room:
            with_room.setdefault(room, []).append(sequence)
            rooms |= 1 << room
    return sequences


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """A permutation of ``range(count)`` that depends on the seeds alone.

    It sorts raw Philox draws. NumPy guarantees that these stay the same in all versions, but does
    not for ``Generator.permutation``.

    Args:
        count: The number of elements.
        *seeds: Non-negative integers.

    Returns:
        int64 of shape ``(count,)``.
    """
    draws = np.random.Philox(np.random.SeedSequence(list(seeds))).random_raw(count)
    return np.argsort(draws, kind="stable")


def _long_to_short(lengths: Sequence[int], seed: int) -> list[int]:
    order = shuffled(len(lengths), seed, 0)
    decreasing = np.argsort(-np.asarray(lengths, np.int64)[order], kind="stable")
    return order[decreasing].tolist()
