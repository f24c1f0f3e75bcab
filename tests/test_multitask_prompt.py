"""Multitask prompt tuning: each task's prompt is a plain prompt that NumPy multiplies out."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder, draw, make_batch

import jaxpeft as jp
from jaxpeft.decoding import generate_ids
from jaxpeft.methods import MultitaskPromptTuning
from jaxpeft.methods.prompt import arrays_of, prompt_adapter
from jaxpeft.model import Model
from jaxpeft.prompting import virtual_ids

N, TASKS = 3, 2


def model():
    module, params = decoder()
    return Model(params, CONFIG, module)


def trained():
    method = MultitaskPromptTuning(num_tokens=N, num_tasks=TASKS, rank=2)
    adapter = method.init(decoder()[1], jax.random.key(0))
    return adapter.replace(params=draw(adapter.params, seed=1, scale=1.0))


def plain(task):
    """The prompt of one task, as a prompt of its own."""
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays_of(trained()).items()}
    rows = arrays["prompt"] * (arrays["cols"][task] @ arrays["rows"][task])
    params = {"prompt": jnp.asarray(rows, jnp.float32)}
    return prompt_adapter("prompt_tuning", params, CONFIG.vocab_size)


@pytest.mark.parametrize("task", range(TASKS))
def test_a_task_has_the_logits_of_its_prompt_alone(task):
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    actual = model()(tokens, adapter=trained(), task=task)
    expected = model()(tokens, adapter=plain(task))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_may_be_of_different_tasks():
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    expected = [model()(tokens, adapter=trained(), task=task)[task] for task in range(TASKS)]
    for segments in (None, np.ones((2, 6), np.int32)):
        actual = model()(tokens, adapter=trained(), task=np.array([0, 1]), segment_ids=segments)
        np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_packed_row_may_mix_tasks():
    adapter, tokens = trained(), np.array([5, 6, 7, 8, 9])
    first, second = (virtual_ids(adapter, task) for task in range(TASKS))
    ids = np.concatenate([first, tokens[:2], second, tokens[2:]])[None]
    segments = np.array([[1] * 5 + [2] * 6])
    base = model()
    packed = base.module.apply(
        jp.bind(base.params, adapter), jnp.asarray(ids), segment_ids=jnp.asarray(segments)
    )[0]
    alone = [
        base(part[None], adapter=adapter, task=task)[0]
        for task, part in enumerate((tokens[:2], tokens[2:]))
    ]
    np.testing.assert_allclose(packed[3:5], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[8:], alone[1], rtol=1e-4, atol=1e-5)


def test_generation_takes_the_task():
    answers = [
        generate_ids(model(), [[5, 6, 7]], adapter=trained(), task=task, max_new_tokens=6)
        for task in range(TASKS)
    ]
    assert answers == [
        generate_ids(model(), [[5, 6, 7]], adapter=plain(task), max_new_tokens=6)
        for task in range(TASKS)
    ]


@pytest.mark.parametrize("task", [2, -1, 0.5])
def test_an_unknown_task_is_refused(task):
    with pytest.raises(jp.UserError, match="task: expected 0 to 1"):
        jp.with_prompt(trained(), np.ones((1, 2), np.int32), task=task)


def test_a_new_prompt_starts_from_the_table_and_small_factors():
    method = MultitaskPromptTuning(num_tokens=20, num_tasks=8, rank=4)
    arrays = arrays_of(method.init(decoder()[1], jax.random.key(0)))
    table = np.asarray(decoder()[1]["embed_tokens"]["embedding"])
    assert all((table == row).all(1).any() for row in np.asarray(arrays["prompt"]))
    for name in ("cols", "rows"):
        assert np.std(arrays[name]) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tasks": 0}, r"MultitaskPromptTuning\.num_tasks"),
        ({"rank": 0}, r"MultitaskPromptTuning\.rank"),
        ({"initial": "text"}, r"MultitaskPromptTuning\.text must be given"),
    ],
)
def test_nonsense_is_refused(values, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match=message):
        MultitaskPromptTuning(**values)
