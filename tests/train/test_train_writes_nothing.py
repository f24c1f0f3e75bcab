"""What is wrong with a base or a saved adapter is known before a run's folder is made."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import write_config

from jaxpeft import train as program
from jaxpeft.core.errors import UserError

METHOD = {"name": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
Q = "model.layers.1.self_attn.q_proj.weight"
A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def change_tensors(file: pathlib.Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def in_shards(model: pathlib.Path) -> pathlib.Path:
    """Turns the weights into two shards with an index; the second one's file."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model / "model-00002-of-00002.safetensors"


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def fill_with(value: float):
    def change(model):
        def fill(tensors):
            tensors[Q] = np.where(
                np.arange(tensors[Q].size).reshape(tensors[Q].shape) == 3, value, 0
            )
            tensors[Q] = tensors[Q].astype(np.float32)

        change_tensors(model / "model.safetensors", fill)

    return change


def write_text(name: str, text: str):
    return lambda model: (model / name).write_text(text)


WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BASES = {
    "cut short": (lambda model: cut(model / WEIGHTS), "cut short"),
    "a shard cut short": (lambda model: cut(in_shards(model)), "00002-of-00002.*cut short"),
    "a shard missing": (lambda model: in_shards(model).unlink(), "1 of 2 shards are not there"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "no weights"),
    "an empty file": (write_text(WEIGHTS, ""), "the file is empty"),
    "a pointer": (write_text(WEIGHTS, POINTER), "this is a git-LFS pointer"),
    "a web page": (write_text(WEIGHTS, "<!DOCTYPE html><html></html>"), "this is a web page"),
    "a tensor missing": (
        lambda model: change_tensors(model / WEIGHTS, lambda tensors: tensors.pop(Q)),
        f"1 missing: {Q}",
    ),
    "a tensor too many": (
        lambda model: change_tensors(
            model / WEIGHTS, lambda tensors: tensors.update(extra=np.zeros(3, np.float32))
        ),
        "1 unexpected: extra",
    ),
    "another shape": (
        lambda model: change_tensors(
            model / WEIGHTS, lambda tensors: tensors.update({Q: np.zeros((3, 3), np.float32)})
        ),
        rf"{Q} is \[3, 3\], expected",
    ),
    "no tokenizer": (lambda model: [*map(pathlib.Path.unlink, model.glob("token*"))], "tokenizer"),
}
VALUES = {
    "not a number": (fill_with(float("nan")), f"{Q}: 1 of .* not finite"),
    "infinite": (fill_with(float("inf")), f"{Q}: 1 of .* not finite"),
}


def change_json(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_sums(change):
    """A change of an adapter in a folder that has no checksums, as PEFT's own."""

    def changed(adapter):
        (adapter / "jaxpeft.json").unlink()
        change(adapter)

    return changed


TENSORS = "adapter_model.safetensors"
ADAPTERS = {
    "a tensor missing": (
        without_sums(lambda x: change_tensors(x / TENSORS, lambda tensors: tensors.pop(A))),
        "lora_A",
    ),
    "not finite": (
        without_sums(
            lambda x: change_tensors(x / TENSORS, lambda tensors: tensors[A].fill(np.nan))
        ),
        "finite",
    ),
    "cut short": (without_sums(lambda x: cut(x / TENSORS)), "cut short"),
    "a changed bit": (
        lambda x: change_tensors(x / TENSORS, lambda tensors: tensors[A].fill(0)),
        "changed since it was saved",
    ),
    "no tensors": (without_sums(lambda x: (x / TENSORS).unlink()), "has no adapter_model"),
    "another rank": (
        without_sums(lambda x: change_json(x / "adapter_config.json", r=2, lora_alpha=4)),
        "rank",
    ),
    "another scale": (
        without_sums(lambda x: change_json(x / "adapter_config.json", lora_alpha=4)),
        "scale is 1, not 2",
    ),
    "no json": (lambda x: (x / "adapter_config.json").write_text("{"), "not valid JSON"),
}


@pytest.fixture(scope="module")
def saved(plain) -> pathlib.Path:
    return plain / "adapter"


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing may load the weights."""
    monkeypatch.setattr(program, "load_model", lambda *_, **__: 1 / 0)


def content(folder: pathlib.Path) -> dict[pathlib.Path, bytes | None]:
    """Every file and folder, with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


PLACES = ("missing", "deep", "holds notes")


def refused(config: str, root: pathlib.Path, text: str, *flags: str) -> None:
    before = content(root)
    with pytest.raises(UserError, match=text) as error:
        program.main([config, *flags])
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) == 1
    assert content(root) == before


def place_for(tmp_path: pathlib.Path, where: str) -> pathlib.Path:
    """An output_dir that is not there, or that holds something of the user's."""
    root = tmp_path / "runs"
    root.mkdir()
    if where == "deep":
        return root / "a" / "b" / "run"
    if where == "holds notes":
        (root / "run").mkdir()
        (root / "run" / "notes.txt").write_text("mine")
    return root / "run"


def write_beside(files, tmp_path, output, **changes) -> tuple[str, str]:
    """A config, and the flag that names the folder of its run."""
    config = pathlib.Path(write_config(files, tmp_path / "run", **changes))
    return str(config), f"--output_dir={output}"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", BASES)
def test_a_base_that_headers_show_to_be_bad_leaves_no_trace(files, tmp_path, name):
    where = PLACES[list(BASES).index(name) % len(PLACES)]
    damage, text = BASES[name]
    model = tmp_path / "model"
    shutil.copytree(files.model, model)
    damage(model)
    output = place_for(tmp_path, where)
    config, flag = write_beside(files, tmp_path, output, model={"path": str(model)})
    refused(config, tmp_path / "runs", text, flag)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", VALUES)
def test_a_base_whose_values_are_bad_leaves_no_trace(files, tmp_path, where, name):
    damage, text = VALUES[name]
    model = tmp_path / "model"
    shutil.copytree(files.model, model)
    damage(model)
    output = place_for(tmp_path, where)
    config, flag = write_beside(files, tmp_path, output, model={"path": str(model)})
    refused(config, tmp_path / "runs", text, flag)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_to_go_on_from_that_is_bad_leaves_no_trace(files, saved, tmp_path, name):
    where = PLACES[list(ADAPTERS).index(name) % len(PLACES)]
    damage, text = ADAPTERS[name]
    adapter = tmp_path / "adapter"
    shutil.copytree(saved, adapter)
    damage(adapter)
    output = place_for(tmp_path, where)
    method = METHOD | {"init_from": str(adapter)}
    config, flag = write_beside(files, tmp_path, output, method=method)
    refused(config, tmp_path / "runs", text, flag)


@pytest.mark.parametrize("where", PLACES)
def test_an_adapter_of_other_weights_leaves_no_trace(files, saved, tmp_path, where):
    model = tmp_path / "model"
    shutil.copytree(files.model, model)
    change_tensors(model / WEIGHTS, lambda tensors: tensors.update({Q: tensors[Q] * 2}))
    output = place_for(tmp_path, where)
    changes = {"method": METHOD | {"init_from": str(saved)}, "model": {"path": str(model)}}
    config, flag = write_beside(files, tmp_path, output, **changes)
    refused(config, tmp_path / "runs", r"trained on '.*' \(fingerprint", flag)


@pytest.mark.parametrize("name", ["cut short", "not a number"])
def test_a_run_that_overwrites_another_with_a_bad_base_changes_nothing(
    files, plain, tmp_path, name
):
    damage, text = (BASES | VALUES)[name]
    model, output = tmp_path / "model", place_for(tmp_path, "missing")
    shutil.copytree(files.model, model)
    damage(model)
    shutil.copytree(plain, output)
    config, flag = write_beside(files, tmp_path, output, model={"path": str(model)})
    refused(config, tmp_path / "runs", text, flag, "--overwrite")


def test_a_disk_that_fills_as_the_folder_is_made_leaves_no_trace(files, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxpeft.training.output.folder.tempfile.TemporaryFile", full)
    output = place_for(tmp_path, "deep")
    config, flag = write_beside(files, tmp_path, output)
    with pytest.raises(UserError, match="free some space") as error:
        program.main([config, flag])
    assert error.value.exit_code == 5
    assert not content(tmp_path / "runs")
