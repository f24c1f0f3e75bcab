"""A path, a hub id or a typo: what is meant, and when the network is left alone."""

import pathlib

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from places import ROOT
from tiny_models import VOCAB, hf_tensors, write_hf

from jaxpeft.core.errors import UserError
from jaxpeft.files.locate import locate, looks_local
from jaxpeft.pretrained.load import load_model_config, load_params

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An offline hub cache that holds org/tiny: links to blobs, as the hub client writes it."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--tiny"
    source = write_hf(tmp_path / "source", "llama", hf_tensors("llama"))
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    (repo / "blobs").mkdir()
    for i, file in enumerate(source.iterdir()):
        file.rename(repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / str(i))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


@pytest.mark.parametrize("revision", [None, "main", REVISION])
@pytest.mark.usefixtures("hub_cache")
def test_a_cached_hub_model_loads_offline(revision):
    params, config, _, _ = load_params("org/tiny", revision=revision)
    assert config.vocab_size == VOCAB
    assert params["norm"]["scale"].shape == (config.d_model,)


@pytest.mark.parametrize(("name", "revision"), [("org/absent", None), ("org/tiny", "v2")])
@pytest.mark.usefixtures("hub_cache")
def test_a_model_that_is_not_cached_is_told_offline(name, revision):
    with pytest.raises(UserError, match=r"not in the hub's local cache.*HF_HUB_OFFLINE") as error:
        load_model_config(name, revision=revision)
    assert str(error.value).startswith(name)


# The small files of a repository, its weights, and what is never wanted.
REPO = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model.bin",
    "modeling_own.py",
    "README.md",
    ".env",
    "original/config.json",
    "original/tokenizer.model",
    "onnx/model.safetensors",
    "additional_chat_templates/run.py",
    "tokenizer.pt",
    "consolidated.safetensors",
]


def test_weights_are_asked_for_only_when_wanted(monkeypatch, tmp_path):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, [*filter_repo_objects(REPO, allow_patterns=allow_patterns)]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("org/name", "v1", weights=False) == tmp_path
    assert locate("org/name", weights=True) == tmp_path
    (name, revision, small), (_, _, everything) = asked
    assert (name, revision) == ("org/name", "v1")
    assert small == REPO[:12]
    assert everything == REPO[:16]


@pytest.mark.usefixtures("no_network")
def test_a_typo_in_a_path_names_what_is_near(tmp_path):
    write_hf(tmp_path / "models" / "smollm2", "llama", hf_tensors("llama"))
    with pytest.raises(UserError) as error:
        load_model_config(tmp_path / "models" / "smolm2")
    text = str(error.value)
    assert str(tmp_path / "models" / "smollm2") in text
    assert "no network access was tried" in text
    with pytest.raises(UserError, match=r"near names: .*/models;"):
        load_model_config(tmp_path / "modles" / "smollm2")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("org/name", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("gpt2", False),
        ("./name", True),
        ("../org/name", True),
        ("~/name", True),
        ("/name", True),
        ("a/b/c", True),
        ("org/name.gguf", True),
        ("org/model.safetensors", True),
        ("org/", True),
        ("my model", True),
        ("a\\b", True),
        ("jaxpeft/absent", True),
    ],
)
def test_only_the_form_of_a_hub_id_can_mean_the_hub(text, local, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert looks_local(text) == local


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "weights alone are no model; give a folder that holds them"),
        ("model.bin", "expected a Hugging Face folder, a .gguf file or a hub id"),
        ("", "expected a folder, a .gguf file or a hub id"),
    ],
)
def test_files_of_other_kinds_say_what_to_give(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    if name:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        load_model_config(name)


def test_a_folder_of_gguf_files_names_one(tmp_path):
    (tmp_path / "m.Q8_0.gguf").write_text("x")
    with pytest.raises(UserError, match=r"name one: .*/m\.Q8_0\.gguf"):
        load_model_config(tmp_path)


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"))
    with pytest.raises(UserError, match="revision 'main' has no meaning for a local path"):
        load_model_config(tmp_path, revision="main")
