"""Runs and adapters of the version before go on, with one line, and end as they would have."""

import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file
from tiny_run import training_lines

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.config import run_config
from jaxpeft.config.schema import fields_of
from jaxpeft.core.errors import UserError
from jaxpeft.pretrained.adapters import notes_of

GOLDEN = GOLDEN / "versions" / "before_identity"


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A copy of what the version before wrote; paths in it are relative."""
    folder = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "older"))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_of_the_version_before_goes_on_to_the_same_adapter(older, capsys):
    assert (
        "identity"
        not in json.loads((older / "run/checkpoints/2/manifest.json").read_text())["meta"]
    )
    program.main(["run.yaml"])
    said = capsys.readouterr().err
    assert said.count("began with an earlier version of jaxpeft") == 1
    assert said.count("keeps the 4 steps it began with, not 5") == 1  # 4.4: it rounded down
    lines = training_lines(older / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["learning_rate"] == pytest.approx(0.01 / 4)  # linear, of 4 steps
    actual = load_file(older / "run" / "adapter" / "adapter_model.safetensors")
    expected = load_file(older / "adapter" / "adapter_model.safetensors")
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=1e-6)
    meta = json.loads((older / "run/checkpoints/4/manifest.json").read_text())["meta"]
    assert meta["steps"] == 4
    assert meta["identity"]["config"]["rope_theta"] == 10000.0


def test_an_adapter_of_the_version_before_loads_with_one_line(older, capsys):
    base = jp.load_model("model")
    adapter = jp.load_adapter("adapter", base)
    (note,) = notes_of("adapter", adapter, base)
    assert note.startswith("adapter: saved by an earlier version of jaxpeft")
    command = importlib.import_module("jaxpeft.generate")
    command.main(["--model", "model", "--adapter", "adapter", "--max_new_tokens", "1", "ab="])
    assert capsys.readouterr().err.count("note: adapter: saved by an earlier version") == 1
    jp.save_adapter("again", adapter, base)
    assert notes_of("again", jp.load_adapter("again", base), base) == []


def test_the_hash_of_a_config_has_no_keys_at_their_defaults(older):
    """So a key that a later version adds, with its default, changes no hash."""
    config = jp.load_config("run.yaml")
    written = {"data.train", "model.path", "method.name"}
    for field, hint in fields_of(type(config.optim)):
        del hint
        written |= (
            {f"optim.{field.name}"} if getattr(config.optim, field.name) != field.default else set()
        )
    seen = run_config.hashed_values(config)
    assert written <= set(seen)
    assert "optim.b1" not in seen
    assert "data.on_long" not in seen
    assert seen["optim.learning_rate"] == 0.01


def test_a_weight_of_the_base_that_changed_is_still_found(older):
    file = older / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="base weights are not those this run began with"):
        program.main(["run.yaml"])
