"""Saving a model folder: bit-equal after loading, readable by the safetensors package."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_models import BF16, CONFIGS, hf_tensors, write_hf

from jaxpeft.core.errors import UserError
from jaxpeft.core.paths import HEAD, flatten, put
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.save import save_hf


def load_tiny(folder: pathlib.Path, kind: str, dtype: str | None = None):
    params, config, *_ = load_params(write_hf(folder, kind, hf_tensors(kind)), dtype=dtype)
    return params, config


@pytest.mark.parametrize("kind", CONFIGS)
def test_saving_a_loaded_model_gives_back_its_tensors(tmp_path, kind):
    params, config = load_tiny(tmp_path / "in", kind)
    save_hf(tmp_path / "out", config, params)
    actual, expected = load_file(tmp_path / "out" / "model.safetensors"), hf_tensors(kind)
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_what_was_saved_gives_the_same_params_and_config(tmp_path, dtype, shard_bytes):
    params, config = load_tiny(tmp_path / "in", "qwen3-biased", dtype)
    save_hf(tmp_path / "out", config, params, shard_bytes=shard_bytes)
    again, config_again, *_ = load_params(tmp_path / "out", dtype=None)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {leaf.dtype for leaf in flatten(again).values()} == {jnp.dtype(dtype)}


def test_a_head_of_its_own_beside_a_tied_table_is_kept(tmp_path, getkey):
    params, config = load_tiny(tmp_path / "in", "llama-tied")
    head = jax.random.normal(getkey(), (config.d_model, config.vocab_size))
    untied = put(params, {HEAD: head})
    save_hf(tmp_path / "out", config, untied)
    again, config_again, *_ = load_params(tmp_path / "out", dtype=None)
    assert not config_again.tie_embeddings
    ids = jnp.arange(6)[None]
    actual, expected = (
        Transformer(c).apply({"params": p}, ids)
        for c, p in ((config_again, again), (config, untied))
    )
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(actual - Transformer(config).apply({"params": params}, ids)).max() > 0.1


def test_shards_stay_below_the_limit_and_are_all_indexed(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    save_hf(tmp_path / "out", config, params, shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [
        sum(value.nbytes for value in load_file(tmp_path / "out" / file).values()) for file in files
    ]
    assert max(sizes) <= 4000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_dtype_casts_while_writing(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    save_hf(tmp_path / "out", config, params, dtype="bfloat16")
    expected = hf_tensors("llama")["model.layers.1.mlp.down_proj.weight"].astype(BF16)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        np.testing.assert_array_equal(
            file.get_tensor("model.layers.1.mlp.down_proj.weight"), expected
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_numpy_leaves_are_saved_too(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    save_hf(tmp_path / "out", config, jax.tree.map(np.asarray, params))
    again, *_ = load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_params_that_do_not_fit_the_config_are_refused(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    bad = put(params, {"norm/scale": jnp.ones(3), "norm/bias": jnp.ones(3)})
    with pytest.raises(UserError, match=r"norm/bias is unexpected, norm/scale is \[3\]"):
        save_hf(tmp_path / "out", config, bad)
    assert not (tmp_path / "out").exists()


def test_non_finite_params_are_refused_and_nothing_is_left(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    bad = put(params, {"norm/scale": params["norm"]["scale"].at[2].set(jnp.nan)})
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 16 values are not finite"):
        save_hf(tmp_path / "out", config, bad)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_earlier_saved_model_is_replaced_whole(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    save_hf(tmp_path / "out", config, params, shard_bytes=4000)
    save_hf(tmp_path / "out", config, params, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_an_earlier_saved_model_stays_unless_it_shall_be_overwritten(tmp_path):
    params, config = load_tiny(tmp_path / "in", "llama")
    place = tmp_path / "out"
    place.mkdir()
    save_hf(place, config, params)  # empty: nothing is lost
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(UserError, match=r"out: holds a model already; .*overwrite=True"):
        save_hf(place, config, jax.tree.map(jnp.zeros_like, params))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_move_that_fails_brings_the_earlier_model_back(tmp_path, monkeypatch):
    params, config = load_tiny(tmp_path / "in", "llama")
    save_hf(tmp_path / "out", config, params)
    rename, calls = pathlib.Path.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", second_fails)
    with pytest.raises(UserError, match="out: cannot be written: Permission denied"):
        save_hf(tmp_path / "out", config, jax.tree.map(jnp.zeros_like, params), overwrite=True)
    again, *_ = load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_left_alone(tmp_path, overwrite):
    params, config = load_tiny(tmp_path / "in", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is no saved model"):
        save_hf(tmp_path / "out", config, params, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"
