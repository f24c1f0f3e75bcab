"""EVA in the training command: from YAML, resumed, and gone on from in a second run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import evaluation_lines, make_files, training_lines, write_config

from jaxpeft import train as program
from jaxpeft.methods.lora import eva

METHOD = {"name": "lora", "rank": 3, "alpha": 6, "init_weights": "eva", "eva_rho": 3.0}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def train(files, output, method=(), steps=6):
    section = METHOD | dict(method)
    program.main([write_config(files, output, method=section, train={"steps": steps})])


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    """The folder of a finished run; look at it, don't change it."""
    output = tmp_path_factory.mktemp("first") / "run"
    train(files, output)
    return output


def no_inputs(*args):
    raise AssertionError("the inputs of the kernels are read again")


@pytest.mark.slow
def test_ranks_are_redistributed_and_the_loss_falls(first):
    config = json.loads((first / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(first / "adapter" / "adapter_model.safetensors")
    ranks = [len(value) for key, value in tensors.items() if key.endswith("lora_A.weight")]
    assert sum(ranks) == 3 * 2 * 7
    assert len(set(ranks)) > 1
    assert max(ranks) <= 9
    assert config["rank_pattern"]
    scales = {rank: 2.0 * rank for rank in set(ranks)}  # alpha grows with the rank
    for name, rank in config["rank_pattern"].items():
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == scales[rank]
    lines = evaluation_lines(first)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


@pytest.mark.slow
def test_a_resumed_run_reads_no_inputs_and_ends_with_the_same_bytes(
    files, first, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    shutil.copytree(first, output)
    shutil.rmtree(output / "adapter")
    newest = max((output / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    monkeypatch.setattr(eva, "captured", no_inputs)
    train(files, output)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        ours, theirs = (folder / "adapter" / file for folder in (output, first))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_another_run_goes_on_from_the_adapter_without_its_inputs(
    files, first, tmp_path, monkeypatch
):
    monkeypatch.setattr(eva, "captured", no_inputs)
    train(files, tmp_path / "run", {"init_from": str(first)}, steps=1)
    before, after = evaluation_lines(first)[-1], evaluation_lines(tmp_path / "run")[0]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert np.isfinite(training_lines(tmp_path / "run")[-1]["loss"])
