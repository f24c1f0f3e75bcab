"""Multitask prompt tuning: each task's prompt is a plain prompt that NumPy multiplies out."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder, draw, make_batch
from tiny_run import Files, write_config, write_rows
from toy_model import CONFIG as TOY
from toy_tokenizer import toy_tokenizer

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.inference import metrics
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.methods.prompts.multitask_prompt import MultitaskPromptTuning
from jaxpeft.methods.prompts.prompt import arrays_of, prompt_adapter
from jaxpeft.methods.virtual_tokens import virtual_ids
from jaxpeft.pretrained.model import Model

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
    packed = apply(base.module, jp.bind(base.params, adapter), ids, segment_ids=segments)[0]
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


# Tasks of rows of data.


def read(folder, rows, **method):
    """The data of a run on these rows, without loading a model."""
    folder.mkdir(exist_ok=True)
    files = Files(folder / "model", folder / "train.jsonl", folder / "train.jsonl")
    write_rows(files.train, rows)
    method = {"name": "multitask_prompt_tuning", "num_tokens": N, "num_tasks": TASKS} | method
    train = {"steps": 2, "batch_size": 1}
    config = write_config(files, folder / "run", method=method, train=train, evaluation=None)
    return program.read_data(jp.load_config(config), jp.ModelConfig(**TOY), toy_tokenizer())


def test_every_packed_segment_begins_with_the_prompt_of_its_rows_task(tmp_path):
    rows = [{"prompt": f"{i}=", "completion": "a", "task": i % 2} for i in range(7)]
    plan, vocab = read(tmp_path, rows).plan, TOY["vocab_size"]
    seen = set()
    for step in range(plan.steps_per_epoch):
        batch, lines = plan.batch(step), plan.rows_of(step)
        for segment, line in enumerate(lines, 1):
            ids = batch["tokens"][batch["segment_ids"] == segment]
            task = rows[line - 1]["task"]
            assert ids[:N].tolist() == [vocab + task * N + j for j in range(N)]
            assert (ids[N:] < vocab).all()
            seen.add((segment > 1, task))
    assert {task for _, task in seen} == {0, 1}
    assert {packed for packed, _ in seen} == {False, True}
    swapped = [row | {"task": 1 - row["task"]} for row in rows]
    assert read(tmp_path / "other", swapped).plan.hash != plan.hash


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": 2}, r"train\.jsonl:2: \"task\": expected a whole number from 0 to 1, got 2"),
        ({"task": "1"}, r"train\.jsonl:2: \"task\": expected .* from 0 to 1, got \"1\""),
        ({"task": True}, r"train\.jsonl:2: \"task\": expected .*, got true"),
        ({}, r"train\.jsonl:2: \"task\": missing; the method has 2 tasks"),
    ],
)
def test_a_row_without_a_task_of_the_method_is_told_with_its_line(tmp_path, task, message):
    row = {"prompt": "a=", "completion": "b"}
    with pytest.raises(jp.UserError, match=message) as error:
        read(tmp_path, [row | {"task": 0}, row | task])
    assert "\n" not in str(error.value)


def test_with_one_task_rows_need_not_name_it_and_other_methods_read_none(tmp_path):
    row = {"prompt": "a=", "completion": "b"}
    read(tmp_path, [row, row | {"task": 0}], num_tasks=1)
    with pytest.raises(jp.UserError, match="from 0 to 0, got 1"):
        read(tmp_path, [row | {"task": 1}], num_tasks=1)
    files = Files(tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "train.jsonl")
    write_rows(files.train, [row | {"task": "what"}])
    config = write_config(files, tmp_path / "other", train={"steps": 2, "batch_size": 1})
    program.read_data(jp.load_config(config), jp.ModelConfig(**TOY), toy_tokenizer())


def test_answers_are_those_of_every_rows_task(monkeypatch):
    rows = [{"prompt": "ab", "completion": "c", "task": task} for task in (1, 0, 1)]
    rows.insert(1, {"text": "without an answer", "task": 0})
    asked = {}
    monkeypatch.setattr(
        metrics,
        "generate_ids",
        lambda base, prompts, **o: asked.update(o) or [[5] for _ in prompts],
    )
    metrics.exact_match(model().replace(tokenizer=toy_tokenizer()), rows, trained())
    assert asked["task"] == [1, 0, 1]
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    mixed = generate_ids(model(), prompts, adapter=trained(), task=[1, 0, 0], max_new_tokens=6)
    alone = [
        generate_ids(model(), [ids], adapter=plain(task), max_new_tokens=6)[0]
        for ids, task in zip(prompts, (1, 0, 0), strict=True)
    ]
    assert mixed == alone
    with pytest.raises(jp.UserError, match="one for each of 3 prompts"):
        generate_ids(model(), prompts, adapter=trained(), task=[1, 0])
    with pytest.raises(jp.UserError, match="has no tasks"):
        generate_ids(model(), prompts, task=1)
