import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.data.packing import pack

cases = st.integers(1, 80).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room))
)


def first_fit_decreasing(lengths, max_length):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [index for index, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[fits[0]] -= length
        else:
            rooms.append(max_length - length)
    return len(rooms)


@given(cases, st.integers(0, 3))
def test_every_example_is_in_exactly_one_sequence(case, seed):
    lengths, room = case
    packed = pack(lengths, room, seed)
    assert sorted(index for sequence in packed for index in sequence) == list(range(len(lengths)))


@given(cases, st.integers(0, 3))
def test_no_sequence_is_over_full_or_empty(case, seed):
    lengths, room = case
    for sequence in pack(lengths, room, seed):
        assert 1 <= sum(lengths[index] for index in sequence) <= room


@given(cases, st.integers(0, 3))
def test_at_most_eleven_ninths_of_the_sequences_of_first_fit_are_used(case, seed):
    lengths, room = case
    bound = 11 / 9 * first_fit_decreasing(lengths, room) + 6 / 9
    assert len(pack(lengths, room, seed)) <= bound


@given(cases, st.integers(0, 3))
def test_no_two_sequences_fit_into_one(case, seed):
    lengths, room = case
    loads = sorted(sum(lengths[i] for i in sequence) for sequence in pack(lengths, room, seed))
    assert len(loads) < 2 or loads[0] + loads[1] > room


def test_each_example_goes_where_it_fits_best():
    # 6 and 5 open sequences; 4 fills the one with room 4 and 5 the other.
    packed = pack([6, 4, 5, 5], 10, seed=0)
    assert sorted(sorted(sequence) for sequence in packed) == [[0, 1], [2, 3]]


def test_the_seed_decides_and_nothing_else():
    lengths = [5] * 20 + [3] * 20
    assert pack(lengths, 16, 1) == pack(list(lengths), 16, 1)
    assert pack(lengths, 16, 1) != pack(lengths, 16, 2)


def test_length_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"lengths\[1\] is 9; expected 1 to max_length 8"):
        pack([3, 9], 8, 0)


def test_a_hundred_thousand_examples_are_packed_in_seconds_and_tightly():
    lengths = np.random.default_rng(0).integers(10, 400, 100_000).tolist()
    start = time.perf_counter()
    packed = pack(lengths, 2048, 0)
    assert time.perf_counter() - start < 10
    assert sum(lengths) / (len(packed) * 2048) > 0.99
