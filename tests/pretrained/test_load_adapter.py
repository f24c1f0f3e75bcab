"""Adapters by hub id, and adapters whose base is known by its config alone."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from places import GOLDEN

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.pretrained.adapters import load_adapter, peek_kind, save_adapter
from jaxpeft.pretrained.shapes import Weightless

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty hub cache, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put_in_cache(cache: pathlib.Path, name: str, folder: pathlib.Path, ref: str = "main"):
    """Lays a folder into the cache as the hub client would, under a branch."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / ref).write_text(COMMIT)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / str(number))


def adapter_naming(base: str, folder: pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """A golden LoRA, saved by PEFT, whose config names another base."""
    shutil.copytree(GOLDEN / "adapters" / "qv", folder)
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base_model_name_or_path": base, "revision": revision}))
    return folder


def assert_same(actual, expected):
    assert actual.spec == expected.spec
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_adapter_and_base_from_the_hub_cache_without_a_network(cache, tmp_path):
    put_in_cache(cache, "org/base", GOLDEN / "models" / "llama3")
    put_in_cache(cache, "some/adapter", adapter_naming("org/base", tmp_path / "a"))
    adapter = jp.load_adapter("some/adapter")
    assert adapter.base_name[:] == "org/base"
    base = jp.load_model(adapter.base_name)
    ids = np.array([[1, 2, 3]])
    assert not np.array_equal(base(ids, adapter=adapter), base(ids))
    assert_same(adapter, load_adapter(GOLDEN / "adapters" / "qv", base))


def test_revisions_of_adapter_and_base_are_honoured(cache, tmp_path):
    put_in_cache(cache, "org/base", GOLDEN / "models" / "llama3", ref="v1")
    put_in_cache(cache, "some/adapter", adapter_naming("org/base", tmp_path / "a", "v1"), ref="v2")
    with pytest.raises(UserError, match=r"some/adapter: .*not in the hub's local cache"):
        load_adapter("some/adapter")
    adapter = load_adapter("some/adapter", revision="v2")
    assert adapter.base_revision[:] == "v1"
    base = jp.load_model(adapter.base_name, revision=adapter.base_revision)
    save_adapter(tmp_path / "out", adapter, base)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/base", "v1")


def test_only_the_files_of_an_adapter_are_asked_for(cache, monkeypatch, tmp_path):
    asked = []

    def download(name, *, revision, allow_patterns, **_):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(adapter_naming(str(GOLDEN / "models" / "llama3"), tmp_path / "got"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_adapter("some/adapter", revision="v1")
    files = ["adapter_config.json", "adapter_model.safetensors", "jaxpeft.json"]
    assert asked == [("some/adapter", "v1", files)]


def test_shapes_are_checked_without_weights(cache, tmp_path):
    folder = adapter_naming(str(GOLDEN / "models" / "llama3"), tmp_path / "a")
    base = jp.load_model(GOLDEN / "models" / "llama3")
    assert_same(load_adapter(folder), load_adapter(folder, base))
    other = adapter_naming(str(GOLDEN / "models" / "qwen2"), tmp_path / "b")
    with pytest.raises(UserError, match=r"modules that the base .*qwen2. \(2 layers\) lacks"):
        load_adapter(other)


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("no/such", "the base it names cannot be found (no/such: "),
        ("", "names no base in base_model_name_or_path; pass it"),
        ("./gone", "the base it names cannot be found (./gone: no such file or folder"),
    ],
)
def test_a_base_that_is_not_there_is_named_with_the_way_out(cache, tmp_path, base, part):
    folder = adapter_naming(base, tmp_path / "a")
    with pytest.raises(UserError) as error:
        load_adapter(folder)
    text = str(error.value)
    assert text.startswith(f"{folder / 'adapter_config.json'}: ")
    assert part in text
    assert "load_adapter(..., base)" in text
    assert load_adapter(folder, jp.load_model(GOLDEN / "models" / "llama3")).spec.kind == "lora"


def test_what_needs_weights_says_to_pass_the_base():
    weight = Weightless((2, 3, 4), "layers/mlp/up_proj/kernel", "org/base")
    assert (weight.shape, weight.ndim, weight.dtype) == ((2, 3, 4), 3, np.float32)
    reads: tuple[Callable[[Any], Any], ...] = (
        np.asarray,
        jax.numpy.asarray,
        jax.jit(lambda w: w),
        lambda w: w[0],
        lambda w: w.astype("f"),
        lambda w: w.T,
    )
    for read in reads:
        with pytest.raises(UserError, match=r"up_proj/kernel: .*base=load_model\('org/base'\)"):
            read(weight)


@pytest.mark.parametrize("path", ["./adapter", "adapter", "a/b/c", ""])
def test_what_is_no_hub_id_never_asks_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"no such folder .*no network access was tried"):
        load_adapter(path)


def test_a_revision_of_a_local_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="revision 'v1' has no meaning for a local path"):
        load_adapter(tmp_path, revision="v1")


def test_the_kind_of_a_folder_is_known_without_its_tensors(tmp_path):
    folder = adapter_naming("org/base", tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    assert peek_kind(folder) == "lora"
