"""Metrics against float64 NumPy row by row, and exact match against answers made by hand."""

import io
import json
import math

import chex
import numpy as np
import pytest
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft import evaluate
from jaxpeft.core.errors import UserError
from jaxpeft.data.batches import eval_batches
from jaxpeft.data.encode import encode_rows
from jaxpeft.inference import metrics
from jaxpeft.inference.metrics import Sample, evaluate_file, evaluate_loss, exact_match

ROWS = [
    {"prompt": "two and two is", "completion": " four"},
    {"prompt": "Sing", "completion": ", o muse."},
    {"text": "All is text."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"prompt": "a", "completion": "b"},
]
LONGEST = 96


def encode(base, rows=ROWS):
    return encode_rows(rows, base.tokenizer, max_length=LONGEST)


def batches(base, examples, batch_size=2, packing=True):
    return eval_batches(
        examples,
        batch_size=batch_size,
        max_length=LONGEST,
        packing=packing,
        pad_id=base.config.pad_token_id,
    )


def numpy_metrics(base, examples, adapter=None):
    """Every example alone in a row, and the formulas in float64."""
    losses, hits = [], []
    for ids, learned in zip(examples.tokens, examples.masks, strict=True):
        row = np.zeros((1, LONGEST), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(base(row, adapter=adapter)[0], np.float64)
        for place in np.flatnonzero(learned[1:]):
            scores, target = logits[place], ids[place + 1]
            top = scores.max()
            losses.append(top + np.log(np.exp(scores - top).sum()) - scores[target])
            hits.append(scores.argmax() == target)
    return {
        "eval_loss": np.mean(losses),
        "eval_perplexity": np.exp(np.mean(losses)),
        "eval_token_accuracy": np.mean(hits),
    }


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_metrics_match_float64_numpy_row_by_row(getkey, packing, adapted):
    base = toy_model(getkey())
    adapter = toy_adapter(getkey(), base) if adapted else None
    (likely,) = jp.generate(base, ["Once"], adapter=adapter, max_new_tokens=12)
    examples = encode(base, [*ROWS, {"prompt": "Once", "completion": likely}])
    expected = numpy_metrics(base, examples, adapter)
    assert 0 < expected["eval_token_accuracy"] < 1
    metrics = evaluate_loss(base, batches(base, examples, packing=packing), adapter)
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_batches_are_placed_by_put(getkey):
    base, placed = toy_model(getkey()), []
    metrics = evaluate_loss(
        base, batches(base, encode(base)), put=lambda batch: placed.append(batch) or batch
    )
    assert len(placed) == len(list(batches(base, encode(base))))
    assert metrics == evaluate_loss(base, batches(base, encode(base)))


def test_a_loss_too_large_for_a_perplexity_gives_infinity(getkey):
    base = toy_model(getkey())
    head = {"kernel": 1e4 * base.params["lm_head"]["kernel"]}
    metrics = evaluate_loss(
        base.replace(params={**base.params, "lm_head": head}), batches(base, encode(base))
    )
    assert metrics["eval_loss"] > 700
    assert metrics["eval_perplexity"] == math.inf


def test_nothing_supervised_is_an_error(getkey):
    base = toy_model(getkey())
    (batch,) = batches(base, encode(base), batch_size=8)
    silent = {**batch, "weights": 0 * batch["weights"]}
    for given in ([], [silent]):
        with pytest.raises(UserError, match="at least one supervised token"):
            evaluate_loss(base, given)


def answers_of(texts, monkeypatch):
    """Lets the model answer with these texts, in order."""
    said = iter(texts)

    def answer(base, prompts, **_):
        return [base.tokenizer(next(said), add_special_tokens=False).input_ids for _ in prompts]

    monkeypatch.setattr(metrics, "generate_ids", answer)


def test_exact_match_ignores_blanks_around_and_nothing_else(getkey, monkeypatch):
    answers_of([" four\n", ", O muse.", "Ho", ""], monkeypatch)
    share, samples = exact_match(toy_model(getkey()), ROWS)
    assert share == 0.5
    assert samples == [
        Sample("two and two is", "four", "four"),
        Sample("Sing", ", o muse.", ", O muse."),
        Sample("Hi", "Ho", "Ho"),
        Sample("a", "b", ""),
    ]
    assert [sample.correct for sample in samples] == [True, False, True, False]


def test_thinking_is_learned_and_does_not_count_and_cut_thinking_is_named(getkey, monkeypatch):
    turn = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}
    rows = [{"messages": [{"role": "user", "content": "Is it?"}, turn]}] * 4
    rows = [dict(row) for row in rows]
    answers_of(["<think>hm</think>yes", "yes", "<think>no</think>no", "<think>yes"], monkeypatch)
    share, samples = exact_match(toy_model(getkey()), rows, max_new_tokens=10)
    assert share == 0.5
    assert [sample.answer for sample in samples] == ["yes", "yes", "no", "<think>yes"]
    assert [sample.reference for sample in samples] == ["yes"] * 4
    assert [sample.cut for sample in samples] == [False, False, False, True]
    assert metrics.count_cut(samples) == {"eval_answers_cut_in_thinking": 1.0}
    assert metrics.count_cut(samples[:3]) == {}


def test_exact_match_of_the_models_own_answers_is_one(getkey):
    base = toy_model(getkey())
    adapter = toy_adapter(getkey(), base)
    prompts = ["two and two is", "Sing", "a", "z"]
    answers = jp.generate(base, prompts, adapter=adapter, max_new_tokens=8)
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    assert exact_match(base, rows, adapter, max_new_tokens=8)[0] == 1.0
    assert exact_match(base, rows, None, max_new_tokens=8)[0] < 1.0


def test_exact_match_without_references_is_an_error(getkey):
    with pytest.raises(UserError, match="needs rows with a prompt and an answer"):
        exact_match(toy_model(getkey()), [{"text": "All is text."}])


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_a_file_is_evaluated_for_every_adapter_with_one_compile(getkey, write, monkeypatch):
    traced = []
    original = metrics.make_lm_loss
    monkeypatch.setattr(
        metrics, "make_lm_loss", lambda *a, **k: traced.append(1) or original(*a, **k)
    )
    base = toy_model(getkey(), d_ff=20)
    adapters = {  # of several ranks: the smaller one is padded
        "one": toy_adapter(getkey(), base, alpha=1.0),
        "two": toy_adapter(getkey(), base, alpha=9.0, rank=3),
    }
    results = evaluate_file(
        base, write(ROWS), adapters, max_length=LONGEST, batch_size=2, max_new_tokens=4
    )
    assert len(traced) == 1
    for name, adapter in adapters.items():
        loss = evaluate_loss(base, batches(base, encode(base)), adapter)
        share, _ = exact_match(base, ROWS, adapter, max_new_tokens=4, batch_size=8)
        assert results[name] == pytest.approx({**loss, "eval_exact_match": share}, rel=1e-5)
    assert results["one"]["eval_loss"] != results["two"]["eval_loss"]


def test_only_the_first_rows_of_a_file_are_evaluated_if_wanted(getkey, write):
    base = toy_model(getkey())
    results = evaluate_file(
        base,
        write([{"text": "first"}, {"text": "second"}, *ROWS]),
        {"base": None},
        max_rows=2,
        max_length=LONGEST,
        batch_size=2,
    )
    rows = [{"text": "first"}, {"text": "second"}]
    assert results == {"base": evaluate_loss(base, batches(base, encode(base, rows)))}


def test_results_are_printed_as_one_line_for_each(getkey):
    stream = io.StringIO()
    evaluate.print_results(
        {
            "base": {"eval_loss": 2.0, "eval_perplexity": 7.38905609893},
            "runs/[bold]a": {"eval_loss": 0.25, "eval_perplexity": 1.0},
        },
        stream,
    )
    lines = [line.split() for line in stream.getvalue().splitlines() if any(map(str.isalnum, line))]
    assert lines == [
        ["adapter", "loss", "perplexity"],
        ["base", "2", "7.389"],
        ["runs/[bold]a", "0.25", "1"],
    ]


def test_nothing_is_dropped_out_in_evaluation(getkey):
    base, key = toy_model(getkey()), getkey()
    plain, dropping = (
        evaluate_loss(base, batches(base, encode(base)), toy_adapter(key, base, dropout=rate))
        for rate in (0.0, 0.9)
    )
    assert plain == dropping


def test_evaluation_is_traced_at_most_once(getkey, monkeypatch):
    """For all batches, and for adapters that differ in numbers alone."""
    base = toy_model(getkey(), d_ff=36)
    chex.clear_trace_counter()
    make = metrics.make_lm_loss
    once = lambda *args, **kwargs: chex.assert_max_traces(make(*args, **kwargs), n=1)  # noqa: E731
    monkeypatch.setattr(metrics, "make_lm_loss", once)
    parts = list(batches(base, encode(base), packing=False))
    assert len(parts) > 1
    for alpha in (2.0, 8.0):
        evaluate_loss(base, parts, toy_adapter(getkey(), base, alpha=alpha))
    with pytest.raises(AssertionError, match="traced"):  # the check can fail
        evaluate_loss(base, parts)
