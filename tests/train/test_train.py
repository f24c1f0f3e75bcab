"""The training program, called in this process on a tiny model: what a finished run leaves."""

import os
import pathlib
import shutil

import numpy as np
import pytest
import yaml
from tiny_run import (
    STEPS,
    evaluation_lines,
    read_lines,
    training_lines,
    write_config,
    write_rows,
)
from train_runs import NO_EVAL, curve, output_of, steps_of

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core.errors import UserError
from jaxpeft.data.batches import eval_batches
from jaxpeft.data.encode import encode_file
from jaxpeft.inference.metrics import evaluate_loss
from jaxpeft.pretrained.load import load_model
from jaxpeft.training.checks import check_unchanged


def test_loss_falls_and_the_metrics_have_their_fields(finished):
    lines = read_lines(output_of(finished) / "metrics.jsonl")
    training = training_lines(output_of(finished))
    assert steps_of(training) == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, STEPS]
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    for line in training:
        assert set(line) == {
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "supervised_tokens",
            "seconds",
            "data_wait_seconds",
            "skipped_updates",
        }
        assert line["seconds"] > 0
        assert line["data_wait_seconds"] >= 0
        assert line["tokens_per_second"] > 0
    for line in lines:
        if "eval_loss" in line:
            assert set(line) == {
                "step",
                "eval_loss",
                "eval_perplexity",
                "eval_token_accuracy",
                "eval_exact_match",
            }


def test_learning_rate_is_logged_as_the_cosine_says(finished):
    rates = [line["learning_rate"] for line in training_lines(output_of(finished))]
    counts = np.arange(STEPS)
    np.testing.assert_allclose(rates, 0.01 * 0.5 * (1 + np.cos(np.pi * counts / STEPS)), rtol=1e-5)


def test_samples_have_question_reference_and_answer(finished):
    samples = read_lines(output_of(finished) / "samples.jsonl")
    assert steps_of(samples) == [0] * 10 + [6] * 10 + [STEPS] * 10
    assert all(set(line) == {"step", "prompt", "reference", "answer"} for line in samples)
    rows = read_lines(pathlib.Path(settings_of(finished)["data"]["eval"]))
    assert [line["prompt"] for line in samples[:10]] == [row["prompt"] for row in rows]
    assert [line["reference"] for line in samples[:10]] == [row["completion"] for row in rows]
    matches = [sum(s["answer"] == s["reference"] for s in samples[i : i + 10]) for i in (0, 10, 20)]
    scores = [line["eval_exact_match"] for line in evaluation_lines(output_of(finished))]
    np.testing.assert_allclose(scores, np.array(matches) / 10)


def settings_of(config: str) -> dict:
    return yaml.safe_load(pathlib.Path(config).read_text())


def test_the_folder_holds_the_documented_files(finished):
    output = output_of(finished)
    assert {path.name for path in output.iterdir()} == {
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
    }
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["12", "9"]
    assert jp.load_config(str(output / "config.yaml")) == jp.load_config(finished)


def test_the_exported_adapter_gives_the_last_evaluation(finished, files):
    base = load_model(files.model)
    adapter = jp.load_adapter(str(output_of(finished)), base)
    examples = encode_file(
        files.eval, base.tokenizer, max_length=32, vocab_size=base.config.vocab_size
    )
    batches = list(eval_batches(examples, batch_size=8, max_length=32, packing=True, pad_id=None))
    after = evaluate_loss(base, batches, adapter)
    before = evaluate_loss(base, batches)
    lines = evaluation_lines(output_of(finished))
    # No adapter at all: the first evaluation is the base's own, to the last bit.
    assert {"step": 0, **before} == {k: v for k, v in lines[0].items() if k != "eval_exact_match"}
    assert after["eval_loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-6)


def test_a_second_call_says_that_all_is_done(finished, capsys, monkeypatch):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: 1 / 0)
    before = (output_of(finished) / "metrics.jsonl").read_bytes()
    program.main([finished])
    assert "already finished" in capsys.readouterr().out
    assert (output_of(finished) / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_differences(finished):
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.01 -> 0\.02") as error:
        program.main([finished, "--optim.learning_rate", "0.02", "--train.seed", "3"])
    assert "train.seed: 0 -> 3" in str(error.value)
    assert "--overwrite" in str(error.value)


def test_resume_never_refuses_a_folder_with_a_run(finished):
    with pytest.raises(UserError, match="--resume never"):
        program.main([finished, "--resume", "never"])


def test_a_finished_run_is_not_called_finished_with_other_data(finished, tmp_path):
    draft = settings_of(finished)
    rows = read_lines(pathlib.Path(draft["data"]["train"]))
    path = pathlib.Path(draft["data"]["train"])
    before = path.read_bytes()
    try:
        write_rows(path, rows[:-1])
        with pytest.raises(UserError, match="training data are not those this run began with"):
            program.main([finished])
    finally:
        path.write_bytes(before)


def test_base_weights_with_a_fingerprint_of_the_first_version_are_not_called_others(tmp_path):
    saved, now = "0" * 64, "v2:" + "0" * 64
    with pytest.raises(UserError, match="fingerprints of the base weights cannot be compared"):
        check_unchanged("base weights", saved, now, tmp_path)
    with pytest.raises(UserError, match="base weights are not those this run began with"):
        check_unchanged("base weights", now[:-1] + "1", now, tmp_path)
    check_unchanged("base weights", now, now, tmp_path)


def test_printed_config_reads_back_as_the_same_config(finished, capsys, tmp_path):
    program.main([finished, "--print_config", "--optim.b1", "0.5"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert jp.load_config(str(again)) == jp.load_config(finished, ["--optim.b1", "0.5"])


def test_overwrite_discards_the_run_and_nothing_else(files, plain, tmp_path):
    output = pathlib.Path(shutil.copytree(plain, tmp_path / "run"))
    first = curve(output)
    (output / "notes.txt").write_text("mine")
    (output / "tensorboard").mkdir()
    config = write_config(files, output, **NO_EVAL, checkpoint=None)
    program.main([config, "--overwrite", "--train.seed=1", "--train.steps=4"])
    second = training_lines(output)
    assert steps_of(second) == [1, 2, 3, 4]
    assert second[0]["loss"] != first[0]
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "tensorboard").exists()
    assert os.listdir(output / "checkpoints") == ["4"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints"])
def test_folders_that_belong_to_no_run_are_left_alone(files, tmp_path, name, flags):
    output = tmp_path / "run"
    (output / name).mkdir(parents=True)
    (output / name / "precious").write_text("mine")
    with pytest.raises(UserError, match=f"holds {name} but no config.yaml"):
        program.main([write_config(files, output), *flags])
    assert (output / name / "precious").read_text() == "mine"
