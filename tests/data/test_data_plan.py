import dataclasses
import hashlib

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.core.errors import UserError
from jaxpeft.data.batches import Plan, eval_batches, iterate
from jaxpeft.data.encode import Examples
from jaxpeft.data.settings import DataConfig


def examples_of(*pairs):
    """Examples from pairs of a list of ids and how many of them are learned, from the end."""
    return Examples(
        tokens=[np.array(ids, np.int32) for ids, _ in pairs],
        masks=[np.arange(len(ids)) >= len(ids) - learned for ids, learned in pairs],
        lines=[10 * (index + 1) for index in range(len(pairs))],
        rows=[{} for _ in pairs],
        dropped={},
        truncated=0,
        path="train.jsonl",
        sha256="",
    )


def many(count):
    lengths = np.random.default_rng(0).integers(2, 12, count)
    return examples_of(*[([index + 1] * int(n), 1) for index, n in enumerate(lengths)])


def plan_of(examples, **options):
    defaults = {"batch_size": 2, "max_length": 16, "packing": True, "seed": 0, "pad_id": 99}
    return Plan(examples, **(defaults | options))


def bytes_of(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = batch[name]
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def test_packed_sequence_has_every_array_as_written_by_hand():
    examples = examples_of(([5, 6, 7, 8], 2), ([1, 2, 3], 2))
    (batch,) = eval_batches(examples, batch_size=1, max_length=9, packing=True, pad_id=99)
    expected = {
        "tokens": [5, 6, 7, 8, 1, 2, 3, 99, 99],
        "targets": [6, 7, 8, 0, 2, 3, 0, 0, 0],
        "weights": [0, 1, 1, 0, 1, 1, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 0, 0],
    }
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)
        np.testing.assert_array_equal(batch[name], [values])


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=20),
    st.integers(0, 2**32),
)
def test_packed_segments_are_the_examples_with_their_own_next_tokens(rows, seed):
    plan = plan_of(examples_of(*[(ids, len(ids)) for ids in rows]), batch_size=1, seed=seed)
    found = []
    for step in range(plan.num_sequences):
        batch = {name: array[0] for name, array in plan.batch(step).items()}
        for segment in range(1, batch["segment_ids"].max() + 1):
            inside = batch["segment_ids"] == segment
            tokens = batch["tokens"][inside].tolist()
            assert batch["positions"][inside].tolist() == list(range(len(tokens)))
            assert batch["targets"][inside].tolist() == [*tokens[1:], 0]
            assert batch["weights"][inside].tolist() == [1.0] * (len(tokens) - 1) + [0.0]
            found.append(tokens)
    assert sorted(found) == sorted(rows)


def test_unpacked_sequences_are_as_long_as_the_longest_rounded_up_to_64():
    examples = examples_of(([1] * 70, 3), ([2] * 5, 1))
    assert plan_of(examples, packing=False, max_length=512).seq_len == 128
    assert plan_of(examples, packing=False, max_length=100).seq_len == 100
    assert plan_of(examples, packing=False, max_length=100).num_sequences == 2


def test_one_epoch_has_every_example_once():
    plan = plan_of(many(50), batch_size=1)
    lines = [line for step in range(plan.num_sequences) for line in plan.rows_of(step)]
    assert sorted(lines) == [10 * (index + 1) for index in range(50)]


def test_stream_goes_on_over_the_end_of_an_epoch_in_a_new_order():
    plan = plan_of(many(50), batch_size=4, packing=False)
    assert (plan.num_sequences, plan.steps_per_epoch) == (50, 13)
    stream = [line for step in range(25) for line in plan.rows_of(step)]
    first, second = stream[:50], stream[50:100]
    assert sorted(first) == sorted(second) == [10 * (index + 1) for index in range(50)]
    assert first != second


def test_counts_are_those_of_the_examples():
    plan = plan_of(examples_of(([1, 2, 3], 3), ([4, 5], 1)), batch_size=1)
    assert plan.tokens_per_epoch == 5
    assert plan.supervised_tokens_per_epoch == 3  # the first token is nobody's target
    assert plan.batch(0)["weights"].sum() == 3


def test_rows_of_names_the_lines_in_the_batch():
    plan = plan_of(many(20), batch_size=2)
    for step in range(5):
        ids = set(plan.batch(step)["tokens"].ravel()) - {99}
        assert {10 * int(token) for token in ids} == set(plan.rows_of(step))


def test_batch_is_a_function_of_the_step_whatever_was_read_before():
    first, second = plan_of(many(40)), plan_of(many(40))
    later = first.batch(33)
    for step in range(33):
        second.batch(step)
    assert bytes_of([later]) == bytes_of([second.batch(33)])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 3},
        {"max_length": 17},
        {"packing": False},
        {"pad_id": 98},
    ],
)
def test_hash_changes_with_every_setting(change):
    assert plan_of(many(30)).hash == plan_of(many(30)).hash
    assert plan_of(many(30), **change).hash != plan_of(many(30)).hash


def test_hash_changes_with_a_token_and_with_the_mask():
    plan = plan_of(examples_of(([1, 2, 3], 1), ([4, 5, 6], 1)), batch_size=1)
    token = plan_of(examples_of(([1, 2, 3], 1), ([4, 5, 7], 1)), batch_size=1)
    mask = plan_of(examples_of(([1, 2, 3], 1), ([4, 5, 6], 2)), batch_size=1)
    assert len({plan.hash, token.hash, mask.hash}) == 3


def test_order_is_the_same_on_every_machine_and_numpy():
    # Pinned: a run that is resumed under another NumPy must see the same rows.
    plan = plan_of(many(10), packing=False, batch_size=10, seed=3)
    assert plan.rows_of(0) == [60, 90, 100, 70, 40, 80, 10, 20, 30, 50]


def test_fewer_sequences_than_a_batch_are_refused_with_numbers():
    with pytest.raises(UserError) as caught:
        plan_of(examples_of(([1, 2], 1), ([3, 4], 1), ([5, 6], 1)), batch_size=4)
    assert str(caught.value) == (
        "train.jsonl: 3 examples packed into 1 sequences do not fill one batch of 4; "
        "set train.batch_size to at most 1, data.packing to false, or add rows."
    )


def test_evaluation_sees_every_example_once_and_fills_with_padding():
    batches = list(eval_batches(many(7), batch_size=4, max_length=16, packing=False, pad_id=None))
    assert [batch["tokens"].shape for batch in batches] == [(4, 16), (4, 16)]
    assert batches[1]["segment_ids"].any(axis=1).tolist() == [True, True, True, False]
    assert not batches[1]["weights"][3].any()
    assert sum(batch["weights"].sum() for batch in batches) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_of_every_batch_are_the_same_for_any_worker_count(workers):
    plan = plan_of(many(40))
    expected = bytes_of(plan.batch(step) for step in range(3, 16))
    assert bytes_of(iterate(plan, 3, 16, workers=workers)) == expected


def test_some_rows_of_a_batch_are_those_of_the_whole_batch():
    plan, rows = plan_of(many(40), batch_size=4), [0, 3]
    for step, part in enumerate(iterate(plan, 0, 3, rows=rows)):
        for name, whole in plan.batch(step).items():
            np.testing.assert_array_equal(part[name], whole[rows])


def test_counts_of_a_step_are_those_of_its_whole_batch():
    plan = plan_of(many(40), batch_size=4)
    for step in range(12):
        batch = plan.batch(step)
        expected = (batch["segment_ids"] > 0).sum(), (batch["weights"] > 0).sum()
        assert plan.counts(step) == expected


def test_no_steps_give_no_batches():
    assert list(iterate(plan_of(many(10)), 5, 5)) == []


def test_iteration_can_be_left_early():
    batches = iterate(plan_of(many(40)), 0, 10**9)
    next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "DataConfig.train"),
        ({"eval": ""}, "DataConfig.eval"),
        ({"max_length": 1}, "DataConfig.max_length must be at least 2, got 1"),
        ({"workers": -1}, "DataConfig.workers"),
        ({"on_long": "drpo"}, "DataConfig.on_long must be one of error, drop, truncate, got"),
        ({"on_bad_row": "truncate"}, "DataConfig.on_bad_row must be one of error, drop, got"),
    ],
)
def test_config_refuses_nonsense(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"train": "train.jsonl"} | change))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig(train="train.jsonl").train = "other"
