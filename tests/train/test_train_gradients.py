"""A run tells once what no gradient has reached, after its first good steps, and in no file."""

import re

import pytest
from tiny_run import read_lines
from toy_tokenizer import toy_tokenizer
from train_runs import losses, poison

from jaxpeft.updates.reached import Reached

LINE = {
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


@pytest.fixture
def notes(capsys):
    """The notes about gradients that were made since it was last asked."""
    return lambda: re.findall(r".*no gradient reached.*", capsys.readouterr().err)


def absent(text="xyz"):
    """Trains the tokens of letters that no row of the training file has."""
    return {"name": "trainable_tokens", "token_ids": toy_tokenizer()(text)["input_ids"]}


def test_tokens_that_the_data_lack_are_named_once_and_in_no_file(
    files, tmp_path, monkeypatch, notes
):
    asked, add = [], Reached.add
    monkeypatch.setattr(
        Reached, "add", lambda self, flags, last: asked.append(last) or add(self, flags, last=last)
    )
    losses(files, tmp_path / "run", method=absent(), train={"steps": 7})
    (note,) = notes()
    assert "no gradient reached embed_tokens/embedding (rows) in the first 5 steps of the" in note
    assert note.endswith("compare method.token_ids with the tokens of data.train")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["grad_norm"] for line in lines] == [0.0] * 7
    assert [set(line) for line in lines] == [LINE] * 7
    assert len(asked) == 5  # later flags are not fetched


def test_a_skipped_step_does_not_count(files, tmp_path, monkeypatch, notes):
    poison(monkeypatch, {1, 3})
    losses(files, tmp_path / "run", method=absent(), train={"steps": 6})
    (note,) = notes()
    assert "in the first 4 steps of the run" in note  # judged at the end


def test_a_healthy_run_tells_nothing(files, tmp_path, notes):
    layer = {"targets": ["q_proj", "layers.1.mlp.down_proj"]}
    warm = {"warmup_steps": 3}
    losses(files, tmp_path / "run", method=layer, optim=warm, train={"steps": 3})
    assert notes() == []
