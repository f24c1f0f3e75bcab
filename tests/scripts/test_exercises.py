"""The exercises: every config is a run, the tables say what the runs' files say."""

import functools
import json
import math
import subprocess
from pathlib import Path

import exercises as ex
import jax
import numpy as np
import pytest
import sms_data
from places import ROOT
from quickstart_data import words
from safetensors.numpy import load_file
from toy_model import CONFIG, toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.config.run_config import load_config


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path) -> Path:
    """What a finished training leaves, with numbers made up."""
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "eval_loss": 3.0, "eval_exact_match": 0.0},
            {"step": 1, "loss": 2.5, "tokens_per_second": 1.0},
            {"step": 2, "loss": 2.0, "tokens_per_second": 210.0},
            {"step": 3, "loss": 1.5, "tokens_per_second": 230.0},
            {"step": 3, "eval_loss": 0.1234, "eval_exact_match": 0.845},
        ],
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(2_500_000))
    measures = {
        "peak_bytes": 3 * 2**29,
        "trainable": 11_520,
        "percent": 0.00856,
        "general_before": 30.0,
        "general_after": 31.255,
    }
    (tmp_path / "measures.json").write_text(json.dumps(measures))
    return tmp_path


def test_a_line_of_the_table_is_what_the_run_measured(run):
    assert ex.table_row("prompt-sampled", run) == [
        "prompt-sampled",
        "11,520",
        "0.00856",
        "2.50 MB",
        "0.0% -> 84.5%",
        "0.123",
        "30.00 -> 31.25",
        "220",
        "1.50 GiB",
    ]


def test_speed_measured_apart_counts_instead_of_the_run_s(run):
    (run / "speed.json").write_text("[100.0, 310.0, 205.0]")
    assert ex.table_row("prompt-sampled", run)[-2] == "205"


def test_speeds_are_those_behind_the_step_that_compiles():
    lines = [{"step": 0, "eval_loss": 1.0}, *({"tokens_per_second": x} for x in (1.0, 7.0, 9.0))]
    assert ex.speeds_of(lines) == [7.0, 9.0]


def test_a_whole_model_counts_where_one_was_saved(run):
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(bytes(4_000_000))
    assert ex.table_row("full", run)[3] == "4.00 MB"


def test_tables_are_markdown():
    assert ex.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize("name", ex.EXERCISES)
def test_every_exercise_is_a_config_that_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, module, program, config, *flags = ex.command(name, 3, ex.run_folder(name, 3))
    assert (module, program) == ("-m", "jaxpeft.train")
    loaded = load_config(config, flags)
    assert loaded.train.steps == 3
    assert loaded.output_dir == f"runs/exercises/{name}-3-steps"
    assert loaded.evaluation.exact_match


def test_what_is_done_is_not_done_again(run, monkeypatch):
    monkeypatch.setattr(ex, "run_folder", lambda name, steps: run)
    monkeypatch.setattr(ex.subprocess, "Popen", None)
    ex.train("dora", None)


def test_speed_is_that_of_short_runs_in_turns_beside_the_trainings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, folders = [100.0, 30.0, 40.0], []

    def run(command, stdout):
        config = load_config(str(ROOT / command[3]), command[4:])
        folder = Path(config.output_dir)
        folders.append(folder)
        folder.mkdir(parents=True)
        rows = [json.dumps({"step": i, "tokens_per_second": t}) for i, t in enumerate(lines)]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        assert (config.train.steps, config.data.eval) == (ex.SPEED_STEPS, None)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ex.subprocess, "run", run)
    for name in ("dora", "ia3"):
        ex.run_folder(name, 7).mkdir(parents=True)
    ex.measure_speed(["dora", "ia3"], 2, 7)
    assert [folder.name for folder in folders] == ["dora", "ia3"] * 2
    assert not any(folder.exists() for folder in folders)
    for name in ("dora", "ia3"):
        assert json.loads((ex.run_folder(name, 7) / ex.SPEED).read_text()) == [30.0, 40.0] * 2


LOAD = functools.cache(jp.load_model)  # what is loaded again is compiled again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "model"
    jp.save_model(str(folder), toy_model(jax.random.key(0), max_positions=512))
    return folder


@pytest.fixture
def base(folder, monkeypatch):
    """A small model that the exercises take for theirs."""
    monkeypatch.setattr(jp, "load_model", LOAD)
    monkeypatch.setattr(ex, "DATA", folder.parent)
    monkeypatch.setattr(ex, "MODEL_LINK", folder.name)
    return LOAD(folder)


def adapter_of(base, seed):
    return toy_adapter(jax.random.key(seed), base, targets=("q_proj", "down_proj"))


def perplexity(base, lines, adapter):
    """By its definition, in float64: every line alone, and a token that ends it."""
    losses = []
    for line in lines:
        ids = [*base.tokenizer(line).input_ids, base.tokenizer.eos_token_id]
        row = np.pad(ids, (0, 32 - len(ids)))[None]
        logits = np.asarray(base(row, adapter=adapter)[0], np.float64)
        for at, target in enumerate(ids[1:]):
            losses.append(np.log(np.exp(logits[at]).sum()) - logits[at, target])
    return math.exp(np.mean(losses))


def test_a_run_is_measured_by_its_sizes_and_its_perplexity_on_general_text(
    base, tmp_path, monkeypatch
):
    lines = ["Rain fell all day.", "The bridge is old."]
    (tmp_path / "general.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(ex, "GENERAL", tmp_path / "general.txt")
    adapter = adapter_of(base, 1)
    jp.save_adapter(tmp_path / "adapter", adapter, base)
    measures = ex.measure(tmp_path)
    d, ff = CONFIG["d_model"], CONFIG["d_ff"]
    inner = CONFIG["num_heads"] * CONFIG["head_dim"]
    total = sum(x.size for x in load_file(Path(base.name, "model.safetensors")).values())
    trainable = CONFIG["num_layers"] * 2 * (d + inner + ff + d)
    expected = {
        "trainable": trainable,
        "percent": 100 * trainable / total,
        "general_before": perplexity(base, lines, None),
        "general_after": perplexity(base, lines, adapter),
    }
    assert measures == pytest.approx(expected, rel=1e-5)
    jp.save_model(str(tmp_path / "model"), base, adapter=adapter)  # as full fine-tuning leaves one
    expected |= {"trainable": total, "percent": 100.0}
    assert ex.measure(tmp_path) == pytest.approx(expected, rel=1e-4)


def test_the_matrix_says_how_many_answers_of_each_adapter_are_those_of_the_task(base, tmp_path):
    loaded = {"none": None, "first": adapter_of(base, 1), "second": adapter_of(base, 2)}
    for name in ("first", "second"):
        jp.save_adapter(tmp_path / name, loaded[name], base)
    prompts = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    said = [
        jp.generate(base, prompts, adapter=adapter, max_new_tokens=8, batch_size=4)
        for adapter in loaded.values()
    ]
    told_apart = [
        (prompt, dict(zip(loaded, answers, strict=True)))
        for prompt, *answers in zip(prompts, *said, strict=True)
        if len({answer.strip() for answer in answers} - {""}) == len(loaded)
    ]
    assert len(told_apart) >= 4
    tasks = {"a": ("none", "first", "first", "second"), "b": ("second",) * 3 + ("none",)}
    for task, owners in tasks.items():
        rows = [
            {"prompt": prompt, "completion": answers[owner]}
            for (prompt, answers), owner in zip(told_apart, owners, strict=False)
        ]
        write_jsonl(tmp_path / f"{task}.jsonl", rows)
    folders = {name: tmp_path / name for name in ("first", "second")}
    assert ex.matrix(folders, {task: tmp_path / f"{task}.jsonl" for task in tasks}) == [
        ["a", "25.0%", "50.0%", "25.0%"],
        ["b", "25.0%", "0.0%", "75.0%"],
    ]


def test_general_text_is_sixty_different_sentences():
    lines = ex.GENERAL.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 60
    assert all(line.endswith(".") for line in lines)


def test_messages_are_balanced_apart_and_without_twins(tmp_path):
    spam = [f'{i},1,"Win prize{chr(97 + i)} now, call {i}{chr(97 + i)}"' for i in range(10)]
    ham = [f"{i},0,see you at {chr(97 + i)}{chr(98 + i)} then" for i in range(20)]
    source = tmp_path / "sms.csv"
    source.write_text("\n".join([",spam,text", *spam, *ham, ham[0]]) + "\n")
    sms_data.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
    rows = {
        part: [json.loads(line)["messages"] for line in (tmp_path / part).read_text().splitlines()]
        for part in ("train.jsonl", "eval.jsonl")
    }
    for part, count in (("train.jsonl", 6), ("eval.jsonl", 4)):
        answers = [turns[2]["content"] for turns in rows[part]]
        assert sorted(answers) == ["ham"] * (count // 2) + ["spam"] * (count // 2)
        assert {turns[0]["content"] for turns in rows[part]} == {sms_data.INSTRUCTION}
    texts = [words(turns[1]["content"]) for part in rows.values() for turns in part]
    assert len(set(texts)) == 10


def test_a_message_without_a_label_is_named():
    with pytest.raises(ValueError, match=r"sms\.csv: row 2: expected spam as 0 or 1"):
        sms_data.read_messages(",spam,text\n0,1,hello\n1,maybe,you\n", "sms.csv")


def test_too_few_messages_are_said_so():
    messages = sms_data.read_messages(",spam,text\n0,1,hello\n1,0,you\n", "sms.csv")
    with pytest.raises(ValueError, match="at most 2"):
        sms_data.balanced(messages, 4, 0)
