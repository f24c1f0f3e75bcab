"""Paths that no file can have are one line with exit code 2, wherever a path is taken."""

import errno
import functools
import json

import jax
import pytest
import yaml
from tiny_models import hf_tensors, write_hf
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.cli import exits
from jaxpeft.core.errors import UserError
from jaxpeft.data.rows.kinds import read_rows
from jaxpeft.evaluate import main as evaluate_main
from jaxpeft.files import storage
from jaxpeft.generate import main as generate_main
from jaxpeft.merge import main as merge_main
from jaxpeft.plan import main as plan_main
from jaxpeft.pretrained.adapters import peek_kind
from jaxpeft.pretrained.hf.folder import open_folder
from jaxpeft.pretrained.load import load_model_config, load_tokenizer
from jaxpeft.train import main as train_main
from jaxpeft.training.init_from import check_init_from

BAD = {
    "NUL": ("a\0b", "a path cannot hold a NUL character"),
    "NUL in a folder's name": ("a\0/b", "a path cannot hold a NUL character"),
    "300 characters": ("x" * 300, "a name of 300 bytes in it; file systems take at most 255"),
    "200 characters of 2 bytes": ("\u00e9" * 200, "a name of 400 bytes"),
    "300 characters in the middle": (f"a/{'x' * 300}/b", "a name of 300 bytes"),
    "long path": ("ab/" * 2000 + "c", "a path of 6001 bytes; at most 4095"),
    "half a character": ("a\ud800", "a path must be text in UTF-8"),
    "bytes that are not UTF-8": ("a\udcff", "a path must be text in UTF-8"),
}


@functools.cache
def toy():
    base = toy_model(jax.random.key(0))
    return base, toy_adapter(jax.random.key(1), base)


OPTIONS = ["--model", "absent/model.gguf"]
TAKES_A_PATH = {
    "load_config": jp.load_config,
    "train CONFIG": lambda path: train_main([path]),
    "plan CONFIG": lambda path: plan_main([path]),
    "load_model": jp.load_model,
    "load_tokenizer": load_tokenizer,
    "config of a model": load_model_config,
    "load_adapter": jp.load_adapter,
    "save_adapter": lambda path: jp.save_adapter(path, *toy()[::-1]),
    "save_model": lambda path: jp.save_model(path, toy()[0]),
    "kind of an adapter": peek_kind,
    "init_from": lambda path: check_init_from(jp.LoRA(init_from=path), toy()[0], 1),
    "from_peft": jp.LoRA.from_peft,
    "rows": read_rows,
    "generate --model": lambda path: generate_main(["--model", path, "Who?"]),
    "evaluate --data": lambda path: evaluate_main([*OPTIONS, "--data", path]),
    "merge --model": lambda path: merge_main(
        ["--model", path, "--adapter", "b", "--output", "out"]
    ),
    "merge --output": lambda path: merge_main([*OPTIONS, "--adapter", "b", "--output", path]),
    "gs://": lambda path: storage.as_path(f"gs://bucket/{path}"),
}
KEYS = ("model.path", "data.train", "data.eval", "output_dir", "method.init_from")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


def check(error, why):
    text = str(error.value)
    assert error.value.exit_code == 2
    assert why in text
    assert "\n" not in text
    assert text.replace("\u00e9", "").isprintable()
    assert len(text) < 400


@pytest.mark.parametrize("place", TAKES_A_PATH)
@pytest.mark.parametrize("name", BAD)
def test_a_path_that_no_file_can_have_is_one_line(place, name):
    path, why = BAD[name]
    if place == "gs://" and ("characters" in name or name == "long path"):
        path, why = path * 20, "a path of "  # objects have names without folders
    with pytest.raises(UserError) as error:
        TAKES_A_PATH[place](path)
    check(error, why)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", BAD)
def test_a_key_of_the_config_is_named_with_its_line(key, name, tmp_path_factory):
    path, why = BAD[name]
    values = {
        "model": {"path": "m"},
        "method": {"name": "lora"},
        "data": {"train": "a.jsonl"},
        "train": {"steps": 1},
        "output_dir": "out",
    }
    section, _, leaf = key.rpartition(".")
    (values[section] if section else values)[leaf] = path
    file = tmp_path_factory.mktemp("configs") / "run.yaml"
    file.write_text(yaml.safe_dump(values, width=10_000))
    line = 1 + next(i for i, text in enumerate(file.read_text().split("\n")) if f"{leaf}: " in text)
    with pytest.raises(UserError) as error:
        jp.load_config(str(file))
    check(error, why)
    assert str(error.value).startswith(f"{file}:{line}: {key}: ")


@pytest.mark.parametrize("take", [jp.load_model, jp.load_adapter, load_model_config])
def test_a_home_folder_that_is_not_known_is_one_line(take):
    with pytest.raises(UserError, match=r"^~nobody-of-that-name/m: no home folder is known"):
        take("~nobody-of-that-name/m")


@pytest.mark.parametrize("name", BAD)
def test_the_base_that_an_adapter_names_is_checked_too(name, tmp_path_factory):
    path, why = BAD[name]
    folder = tmp_path_factory.mktemp("adapter")
    values = {"peft_type": "LORA", "base_model_name_or_path": path, "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        jp.load_adapter(folder)
    check(error, why)
    assert f"{folder}/adapter_config.json: base_model_name_or_path: " in str(error.value)


@pytest.mark.parametrize("name", BAD)
def test_an_index_names_no_such_file(name, tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("model"), "llama", hf_tensors("llama"), shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = f"{BAD[name][0]}.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"weight_map: model\.norm\.weight: .* is not a file name"):
        open_folder(folder)


def test_a_file_system_with_shorter_names_is_no_bug(capsys):
    assert exits.report(OSError(errno.ENAMETOOLONG, "File name too long", "a/b")) == 2
    assert capsys.readouterr().err == "error: a/b: File name too long; choose another path\n"


def test_a_path_with_a_revision_behind_it_is_one_line():
    with pytest.raises(UserError, match=r"^method.init_from: a/xxx.* a name of 303 bytes"):
        check_init_from(jp.LoRA(init_from=f"a/{'x' * 300}@v1"), toy()[0], 1)


def test_paths_of_all_scripts_are_fine():
    for path in (
        "models/Qwen3",
        "\u043c\u043e\u0434\u0435\u043b\u044c",
        "x" * 255,
        "gs://b/c",
        ".",
    ):
        assert storage.problem_of(path) == ""
