"""Folders given as the model or the adapter that are something else: what to give instead."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import hf_tensors, write_hf

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.pretrained.hf.folder import open_folder
from jaxpeft.pretrained.load import load_model_config

HASH = "0123456789abcdef0123456789abcdef01234567"
MLX = {
    "fine_tune_type": "lora",
    "model": "mlx-community/m",
    "num_layers": 16,
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
}
PEFT = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}


def write(folder, **files):
    """Files by name, "__" for "/" and "_json" for ".json"; dicts are written as JSON."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace(
            "_st", ".safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"x": np.zeros(2, np.float32)}, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def refusal(load, path, kind=UserError):
    with pytest.raises(kind) as error:
        load(path)
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    return text


def cached(tmp_path, *names):
    repo = tmp_path / "hub" / "models--org--tiny"
    write(repo, refs__main=HASH, blobs__x="")
    (repo / "snapshots" / HASH).mkdir(parents=True)
    for name in names:
        (repo / "snapshots" / HASH / name).write_text("{}")
    return repo


@pytest.mark.parametrize(
    ("load", "file"), [(load_model_config, "config.json"), (jp.load_adapter, "adapter_config.json")]
)
def test_a_folder_of_the_hubs_cache_points_to_its_snapshot(tmp_path, load, file):
    repo = cached(tmp_path, file)
    older = repo / "snapshots" / ("f" * 40)
    older.mkdir()
    (older / file).write_text("{}")
    for place in (repo, repo / "snapshots", repo / "blobs"):
        text = refusal(load, place)
        assert f"give {repo / 'snapshots' / HASH}, or the hub id org/tiny" in text
    (repo / "refs" / "main").unlink()
    assert f"give {older}, or the hub id" in refusal(load, repo)
    assert "the hub's cache; give a hub id: org/tiny" in refusal(load, repo.parent)


def test_a_cached_repository_without_the_file_is_to_be_downloaded(tmp_path):
    text = refusal(load_model_config, cached(tmp_path, "README.md"))
    assert "no snapshot in it has config.json; give the hub id org/tiny" in text


def test_the_snapshot_that_is_named_loads(tmp_path):
    repo = cached(tmp_path)
    source = write_hf(tmp_path / "source", "llama", hf_tensors("llama"))
    shutil.copytree(source, repo / "snapshots" / HASH, dirs_exist_ok=True)
    named = refusal(load_model_config, repo).partition("give ")[2].partition(",")[0]
    assert load_model_config(named) == load_model_config(source)


def test_a_cached_dataset_is_no_model(tmp_path):
    folder = write(tmp_path / "datasets--org--rows", refs__main=HASH)
    assert "a cached repository of datasets, not of a model" in refusal(load_model_config, folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"adapter_config_json": PEFT, "adapter_model_st": ""},
            "give its base as the model, org/base",
        ),
        ({"adapters_st": "", "config_yaml": ""}, "an adapter of MLX"),
        ({"params_json": {}, "consolidated_st": ""}, "in the format of its authors (params.json)"),
        ({"model_index_json": {}}, "a pipeline that makes pictures"),
        ({"checkpoint-8__config_json": {}}, "config.json lies in "),
        ({}, "config.json: file not found; a Hugging Face model folder has one"),
    ],
)
def test_what_is_no_model_is_told_with_the_way_out(tmp_path, files, words):
    assert words in refusal(load_model_config, write(tmp_path, **files))


def test_the_folder_of_a_run_points_to_its_result(tmp_path):
    write(tmp_path, **{"metrics.jsonl": "", "config.yaml": ""})
    assert "has exported nothing yet" in refusal(load_model_config, tmp_path)
    assert "has exported no adapter yet" in refusal(jp.load_adapter, tmp_path)
    write(tmp_path, adapter__adapter_config_json=PEFT)
    assert f"{tmp_path / 'adapter'} as the adapter" in refusal(load_model_config, tmp_path)
    write(tmp_path, model__config_json={})
    assert f"its model is {tmp_path / 'model'}" in refusal(load_model_config, tmp_path)


def test_an_adapter_of_mlx_is_called_so(tmp_path):
    folder = write(tmp_path / "a", adapter_config_json=MLX, adapters_st="")
    for text in (
        refusal(jp.load_adapter, folder),
        refusal(jp.LoRA.from_peft, folder),
        refusal(jp.load_adapter, write(tmp_path / "b", adapters_st="")),
        refusal(jp.load_adapter, write(tmp_path / "c", **{"adapters.npz": "x"})),
        refusal(load_model_config, folder / "adapters.safetensors"),
    ):
        assert "MLX" in text or "not a model" in text
    assert "lora_alpha its scale times the rank" in refusal(jp.load_adapter, folder)


def test_an_mlx_adapter_rewritten_as_told_computes_what_mlx_computes(tmp_path):
    """MLX adds ``scale * (x @ lora_a) @ lora_b``; the recipe of the message must give that."""
    base = jp.load_model(write_hf(tmp_path / "base", "llama", hf_tensors("llama")))
    rng = np.random.default_rng(0)
    name, rank, scale = "model.layers.1.self_attn.q_proj", 2, 20.0
    kernel = np.asarray(base.params["layers"]["self_attn"]["q_proj"]["kernel"][1])
    a = rng.normal(size=(kernel.shape[0], rank)).astype(np.float32)
    b = rng.normal(size=(rank, kernel.shape[1])).astype(np.float32)
    folder = tmp_path / "peft"
    folder.mkdir()
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    key = f"base_model.model.{name}"
    tensors = {f"{key}.lora_A.weight": a.T.copy(), f"{key}.lora_B.weight": b.T.copy()}
    save_file(tensors, folder / "adapter_model.safetensors")
    merged = jp.merge(base.params, jp.load_adapter(folder, base))
    found = np.asarray(merged["layers"]["self_attn"]["q_proj"]["kernel"][1])
    np.testing.assert_allclose(found, kernel + scale * a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config_json": {}, "model_st": ""}, "a model, not an adapter; give it as the model"),
        ({"checkpoint-8__adapter_config_json": PEFT}, "adapter_config.json lies in "),
        ({}, "adapter_config.json: no such file; a PEFT folder has one"),
    ],
)
def test_what_is_no_adapter_is_told_with_the_way_out(tmp_path, files, words):
    assert words in refusal(jp.load_adapter, write(tmp_path, **files))


def test_shards_without_an_index_get_one_by_the_command_that_is_told(tmp_path):
    tensors = hf_tensors("llama")
    folder = write_hf(tmp_path, "llama", tensors, shards=3)
    index = folder / "model.safetensors.index.json"
    index.unlink()
    text = refusal(open_folder, folder)
    assert "all 3 shards, and no model.safetensors.index.json" in text
    code = text.partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)
    assert open_folder(folder).tensors.keys() == tensors.keys()
    index.unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "2 of 3 shards, and no model.safetensors.index.json" in refusal(open_folder, folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("consolidated.safetensors", "in the format of their authors"),
        ("adapter_model.safetensors", "only an adapter's weights"),
        ("weights.safetensors", "no model.safetensors, only weights.safetensors; if that is all"),
        ("weights.npz", "weights of MLX"),
        ("pytorch_model.bin", "never opened: convert them elsewhere"),
        ("notes.txt", "no weights: expected model.safetensors"),
    ],
)
def test_weights_of_other_names_are_told(tmp_path, name, words):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"))
    (folder / "model.safetensors").rename(folder / name)
    assert words in refusal(open_folder, folder)


@pytest.mark.parametrize(
    ("start", "words", "useless"),
    [
        (b"", "the file is empty; download it again", ""),
        (b"<!DOCTYPE html><html>" + b" " * 60, "download the file itself", "download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "`git lfs pull` fetches it",
            "download it again",
        ),
        (b"PK\x03\x04" + b"x" * 60, "convert it elsewhere", "download it again"),
        (b"GGUF" + b"\0" * 60, "give its path, with the ending .gguf", "download it again"),
        (b"\xff" * 64, "download it again", ""),
    ],
)
def test_to_download_again_is_said_only_where_it_helps(tmp_path, start, words, useless):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"))
    (folder / "model.safetensors").write_bytes(start)
    text = refusal(open_folder, folder)
    assert words in text
    assert not useless or useless not in text


def test_a_model_quantised_by_mlx_is_called_so(tmp_path):
    quantization = {"group_size": 64, "bits": 4}
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"), quantization=quantization)
    assert "weights quantised by 'MLX' are not read" in refusal(load_model_config, folder)


def test_a_folder_that_cannot_be_listed_names_nothing_near(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "iterdir", denied)
    assert "no such file or folder" in refusal(load_model_config, tmp_path / "absent")
