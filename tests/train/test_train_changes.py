"""What may change before a run goes on: the table of configs/README.md, row by row."""

import json
import math
import os
import re
import shutil

import pytest
from places import CONFIGS
from tiny_run import read_lines, training_lines, write_config, write_rows
from train_runs import NO_EVAL, adapter_bytes, stop_at

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.config import run_config
from jaxpeft.core.errors import InterruptedRunError, UserError
from jaxpeft.files.storage import as_path
from jaxpeft.methods.registry import METHODS
from jaxpeft.pretrained.load import load_model_config
from jaxpeft.training.output import resume
from jaxpeft.training.run import Run
from jaxpeft.training.scored_on import scored_on

README = CONFIGS / "README.md"
CONSTANT = {"learning_rate": 0.01, "schedule": "constant"}


def table() -> list[tuple[list[str], str]]:
    """The rows of the table: patterns of keys, and what is said of them."""
    text = README.read_text().partition("# What may change before a run goes on")[2]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", text, re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", keys), rule) for keys, rule in rows]


WORDS = {
    "fine": resume.FINE,
    "needs `--accept_changes`": resume.ACCEPT,
    "fine under `optim.schedule: constant`, else refused": resume.STEPS,
    "refused": resume.REFUSED,
}


def test_the_table_says_of_every_key_what_the_code_does():
    said = {key: WORDS[rule] for keys, rule in table() for key in keys}
    for what in (resume.DATA, resume.TEMPLATE):  # no keys of the config
        assert said.pop(what) == resume.ACCEPT
    assert said == resume.RULES
    for key in run_config.SCHEMA.keys:
        assert resume.rule_of(key.path) in WORDS.values()


def test_the_guide_says_once_what_another_text_of_a_template_needs():
    text = README.read_text()
    section = text.partition("# A chat template of one's own")[2].partition("\n# ")[0]
    assert "another text stops" not in section
    assert f"`--accept_changes {resume.TEMPLATE}`" in section
    (row,) = [row for row in text.splitlines() if "`model.chat_template` (" in row]
    assert row.endswith("(its path; for the text see below) | fine |")


def test_keys_that_no_hash_covers_are_fine_and_no_others():
    config = small()
    hashed = run_config.dotted_values(config).keys() & run_config.hashed(config).keys()
    for path in run_config.dotted_values(config):
        assert (resume.rule_of(path) == resume.FINE) == (path not in hashed), path


def small(**changes):
    """A config, with values set by path."""
    lines = {
        "model.path": "base",
        "method.name": "lora",
        "data.train": "train.jsonl",
        "data.eval": "test.jsonl",
        "train.steps": 20,
        "output_dir": "out",
    }
    nested: dict = {}
    for key, value in {**lines, **changes}.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return run_config.yaml_reader.loads(run_config.SCHEMA, json.dumps(nested), "c.yaml")


OTHER = {
    "output_dir": "elsewhere",
    "track.tensorboard": True,
    "evaluation.every": 5,
    "checkpoint.every": 5,
    "mesh.fsdp": 2,
    "data.eval": "more.jsonl",
    "data.workers": 2,
    "model.chat_template": "t.jinja",
    "data.train": "moved.jsonl",
    "model.path": "moved",
    "model.revision": "v1",
    "model.compute_dtype": "float32",
    "method.init_from": "adapter",
    "optim.learning_rate": 0.5,
    "optim.schedule": "linear",
    "optim.warmup_steps": 2,
    "optim.clip_norm": 2.0,
    "optim.weight_decay": 0.5,
    "optim.b1": 0.5,
    "optim.b2": 0.5,
    "train.microbatch_size": 4,
    "train.remat": "none",
    "train.seed": 4,
    "train.batch_size": 16,
    "method.rank": 2,
    "method.dropout": 0.5,
    "optim.name": "sgd",
    "optim.lora_fa": True,
    "data.max_length": 64,
    "data.packing": False,
    "model.dtype": "bfloat16",
}


def test_the_table_is_tried_with_every_rule():
    tried = {resume.rule_of(key) for key in OTHER}
    assert tried == {resume.FINE, resume.ACCEPT, resume.REFUSED}
    known = {key.path for key in run_config.SCHEMA.keys}
    patterns = [key for key, rule in resume.RULES.items() if rule == resume.ACCEPT and key in known]
    assert set(patterns) <= set(OTHER)


@pytest.mark.parametrize("key", OTHER)
def test_a_changed_key_is_treated_as_its_row_says(key):
    old, new, output = small(), small(**{key: OTHER[key]}), as_path("out")
    rule = resume.rule_of(key)
    if rule == resume.FINE:
        assert resume.check_config(old, new, (), output) == []
        return
    with pytest.raises(UserError, match=re.escape(f"{key}: ")) as error:
        resume.check_config(old, new, (), output)
    assert len(str(error.value).splitlines()) == 1
    assert (f"add --accept_changes {key};" in str(error.value)) == (rule == resume.ACCEPT)
    if rule == resume.ACCEPT:
        (said,) = resume.check_config(old, new, (key,), output)
        assert said.startswith(f"{key}: ")
        assert said.endswith(f" -> {OTHER[key]}")
    else:
        with pytest.raises(
            UserError, match=r"--accept_changes: .* is no change that can be accepted"
        ):
            resume.parse_accepted(key)


@pytest.mark.parametrize("key", ["train.steps", "train.epochs"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_more_steps_are_fine_under_a_constant_rate_alone(key, schedule):
    old = small(**{"optim.schedule": schedule})
    changes = {key: 40} if key == "train.steps" else {"train.steps": None, "train.epochs": 2.0}
    new = small(**{"optim.schedule": schedule, **changes})
    if schedule == "constant":
        assert resume.check_config(old, new, (), as_path("out"))
        return
    with pytest.raises(
        UserError, match=rf"under optim.schedule {schedule} .*method\.init_from: out/adapter"
    ):
        resume.check_config(old, new, (), as_path("out"))


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"method.name": "full"}, "model.path: out/model"),
        ({"optim.trainable": ["embedding"]}, "model.path: out/model"),
        ({}, "method.init_from: out/adapter"),
    ],
)
def test_the_way_to_train_on_leads_to_what_the_run_exports(changes, way_out):
    old, new = small(**changes), small(**changes, **{"train.steps": 40})
    with pytest.raises(UserError, match=re.escape(f"learned, with {way_out}.")):
        resume.check_config(old, new, (), as_path("out"))


def test_a_method_that_plans_for_all_steps_has_no_more():
    changes = {"method.name": "adalora", "optim.schedule": "constant"}
    assert "adalora" in METHODS
    with pytest.raises(UserError, match="plans its ranks for all steps"):
        resume.check_config(
            small(**changes), small(**changes, **{"train.steps": 40}), (), as_path("out")
        )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"optim.clip_norm": None}),
        (
            {"optim.name": "adafactor"},
            {"optim.name": "adafactor", "optim.weight_decay": 0.1},
        ),
    ],
)
def test_what_would_give_the_optimizer_another_state_is_refused(before, after):
    key = list(after)[-1]
    with pytest.raises(UserError, match="holds a run with another config"):
        resume.check_config(small(**before), small(**after), (key,), as_path("out"))


def test_a_finished_run_goes_on_with_more_steps_to_what_a_longer_run_gives(
    files, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, optim=CONSTANT, train={"steps": 4})
    program.main([config])
    short = adapter_bytes(output)
    export = Run.export
    monkeypatch.setattr(Run, "export", lambda *_: 1 / 0)  # killed between last save and export
    with pytest.raises(ZeroDivisionError):
        program.main([config, "--train.steps", "7"])
    assert "train.steps: 4 -> 7" in capsys.readouterr().err
    assert jp.load_config(str(output / "config.yaml")).train.steps == 7
    monkeypatch.setattr(Run, "export", export)
    program.main([config, "--train.steps", "7"])
    assert adapter_bytes(output) != short
    whole = tmp_path / "whole"
    program.main([write_config(files, whole, **NO_EVAL, optim=CONSTANT, train={"steps": 7})])
    assert adapter_bytes(output) == adapter_bytes(whole)
    with pytest.raises(UserError, match=r"train\.steps: 5 are fewer than the 7 that are done"):
        program.main([config, "--train.steps", "5"])


def test_accepted_changes_are_used_noted_and_kept(files, tmp_path, monkeypatch, capsys):
    rows, output = tmp_path / "train.jsonl", tmp_path / "run"
    shutil.copy(files.train, rows)
    changes = {"data": {"train": str(rows), "eval": None}, "evaluation": None}
    config = write_config(files, output, **changes, checkpoint=None, train={"steps": 4})
    stop_at(monkeypatch, 2)
    with pytest.raises(InterruptedRunError):
        program.main([config])
    write_rows(rows, read_lines(rows)[:-1])
    rate = ["--optim.learning_rate", "0.02"]
    with pytest.raises(
        UserError, match=r"learning_rate: 0\.01 -> 0\.02\).*--accept_changes optim\."
    ):
        program.main([config, *rate])
    accept = [*rate, "--accept_changes"]
    with pytest.raises(
        UserError,
        match=r"training data are not those this run began with \(sha256 \w{12}, now \w{12}\); put "
        r".*train\.jsonl back, add --accept_changes data",
    ):
        program.main([config, *accept, "optim.learning_rate"])
    with pytest.raises(UserError, match=r"'train\.seed' is no change that can be accepted"):
        program.main([config, *accept, "train.seed"])
    program.main([config, *accept, "optim.learning_rate,data"])
    said = capsys.readouterr().err
    assert "optim.learning_rate: 0.01 -> 0.02" in said
    assert "the training data changed (sha256 " in said
    (noted,) = [line for line in read_lines(output / "metrics.jsonl") if "notes" in line]
    assert noted["step"] == 2
    assert len(noted["notes"]) == 2
    lines = training_lines(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["learning_rate"] == pytest.approx(0.02 * 0.5)  # cosine, half way
    assert jp.load_config(str(output / "config.yaml")).optim.learning_rate == 0.02
    program.main([config, *rate])
    assert "already finished" in capsys.readouterr().out


def stopped_at_three(files, tmp_path, monkeypatch, num_rows=32, **changes):
    """A run of one epoch, with a data file of its own, that a signal ended before its fourth step.

    Returns:
        Its config, its data file, and the rows that are not in it.
    """
    rows, output, lines = tmp_path / "train.jsonl", tmp_path / "run", read_lines(files.train)
    write_rows(rows, lines[:num_rows])
    data = {"train": str(rows), "eval": None, "packing": False}
    train = {"steps": None, "epochs": 1}
    settings = {"evaluation": None, "checkpoint": None, "train": train, **changes}
    config = write_config(files, output, data=data, **settings)
    stop_at(monkeypatch, 3)
    with pytest.raises(InterruptedRunError):
        program.main([config])
    return config, rows, lines


def test_other_data_change_no_number_of_steps_that_a_schedule_is_made_for(
    files, tmp_path, monkeypatch, capsys
):
    config, rows, lines = stopped_at_three(files, tmp_path, monkeypatch)
    write_rows(rows, lines[:96])
    program.main([config, "--accept_changes", "data"])
    assert "the run keeps the 4 steps it began with, not 12" in capsys.readouterr().err
    rates = [line["learning_rate"] for line in training_lines(tmp_path / "run")]
    cosine = [0.01 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(cosine)


def test_other_data_give_a_run_of_a_constant_rate_another_number_of_steps(
    files, tmp_path, monkeypatch, capsys
):
    config, rows, lines = stopped_at_three(files, tmp_path, monkeypatch, optim=CONSTANT)
    write_rows(rows, lines[:8])
    told = r"train\.epochs: 1 make 1 steps, which are fewer than the \d that are done; give more"
    with pytest.raises(UserError, match=told):
        program.main([config, "--accept_changes", "data"])
    write_rows(rows, lines[:48])
    program.main([config, "--accept_changes", "data"])
    assert "the run has 6 steps, not the 4 it began with" in capsys.readouterr().err
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "exported"),
    [pytest.param({}, 2, marks=pytest.mark.slow), ({"evaluation.max_rows": "5"}, 4)],
    ids=["nothing", "fewer rows"],
)
def test_scores_of_other_evaluations_do_not_decide_about_the_best(
    files, tmp_path, monkeypatch, capsys, change, exported
):
    scores = {0: 5.0, 2: 0.1, 4: 2.0, 6: 3.0}

    def evaluate(run):
        return {"eval_loss": scores[int(run.state.step)]}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)
    output = tmp_path / "run"
    checkpoint = {"best": "eval_loss", "every": None, "keep": 1}
    evaluation, train = {"every": 2}, {"steps": 6}
    config = write_config(files, output, evaluation=evaluation, checkpoint=checkpoint, train=train)
    stop_at(monkeypatch, 3)
    with pytest.raises(InterruptedRunError):
        program.main([config])
    kept = json.loads((output / "checkpoints" / "2" / "manifest.json").read_text())
    assert kept["metric"] == 0.1
    flags = [part for key, value in change.items() for part in (f"--{key}", value)]
    program.main([config, *flags])
    said = capsys.readouterr()
    assert f"(step {exported})" in said.out
    assert ("those of steps 2 decide about the best checkpoint no more" in said.err) == bool(change)
    assert sorted(map(int, os.listdir(output / "checkpoints"))) == [exported, 6]


def test_what_scores_are_measured_on_is_what_decides_them(files, tmp_path):
    other = tmp_path / "eval.jsonl"
    write_rows(other, [*read_lines(files.eval)[1:], {"prompt": "xyyz=", "completion": "y"}])
    shutil.copy(files.eval, tmp_path / "moved.jsonl")

    def found(best, **changes):
        sections = {"checkpoint": {"best": best}, "evaluation": {"exact_match": True}, **changes}
        config = jp.load_config(write_config(files, tmp_path / "run", **sections))
        return scored_on(config, program.read_data(config, load_model_config(files.model)))

    def evaluated(**values):
        return {"evaluation": {"exact_match": True, **values}}

    loss, exact = found("eval_loss"), found("eval_exact_match")
    assert loss != exact
    assert found(None) == ""
    assert found("eval_perplexity") != loss
    for best, same in (("eval_loss", loss), ("eval_exact_match", exact)):
        assert found(best, data={"eval": str(tmp_path / "moved.jsonl")}) == same
        assert found(best, **evaluated(every=2, batch_size=2)) == same
        assert found(best, data={"eval": str(other)}) != same
        assert found(best, **evaluated(max_rows=9)) != same
        tokens = evaluated(max_new_tokens=2)
        assert (found(best, **tokens) == same) == (best == "eval_loss")
