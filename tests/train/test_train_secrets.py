"""A token in the environment is not in anything that a run writes, prints or hands to trackers."""

import json
import sys
import types

import pytest
from tiny_run import write_config

from jaxpeft import train as program
from jaxpeft.core.errors import UserError

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


@pytest.fixture
def wandb(monkeypatch):
    """A module wandb that keeps what it is given."""
    given, module = [], types.ModuleType("wandb")
    run = types.SimpleNamespace(
        id="id", step=0, log=lambda *a, **k: given.append((a, k)), finish=lambda *a, **k: None
    )
    module.init = lambda **options: given.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return given


def test_a_token_lands_in_no_file_no_line_and_no_tracker(
    files, tmp_path, monkeypatch, wandb, capfd
):
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    changes = {"train": {"steps": 1}, "track": {"tensorboard": True, "wandb": "project"}}
    output = tmp_path / "run"
    program.main([write_config(files, output, evaluation={"every": None}, **changes)])
    written = [file for file in output.rglob("*") if file.is_file()]
    names = {file.name for file in written}
    assert {"config.yaml", "metrics.jsonl", "adapter_config.json", "README.md"} <= names
    assert "jaxpeft.json" in names
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in json.dumps(wandb, default=repr)
    assert any("config" in call for call in wandb if isinstance(call, dict))
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        ["--model.token", SECRET],
        [f"--model.hf_token={SECRET}"],
    ],
)
def test_a_token_on_the_command_line_is_not_repeated(files, tmp_path, flags):
    with pytest.raises(UserError) as error:
        program.main([write_config(files, tmp_path / "run"), *flags])
    assert SECRET not in str(error.value)


def test_a_token_in_a_config_is_not_repeated(files, tmp_path):
    config = write_config(files, tmp_path / "run", model={"hub_token": SECRET})
    with pytest.raises(UserError, match=r"model\.hub_token: unknown key") as error:
        program.main([config])
    assert SECRET not in str(error.value)
