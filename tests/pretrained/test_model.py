"""The model record: calls, what recompiles them, and model folders out and in."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.pretrained import model as model_file

IDS = np.array([[5, 9, 40, 7, 3, 3, 80, 12]])


def test_call_gives_the_logits_of_apply_on_bound_parameters(getkey):
    base = toy_model(getkey())
    adapter = toy_adapter(getkey(), base)
    for given in (None, adapter):
        expected = jax.jit(base.module.apply)(jp.bind(base.params, given), IDS)
        logits = base(IDS, adapter=given)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_packed_segments_are_separate_texts(getkey):
    base = toy_model(getkey())
    packed = base(
        IDS,
        segment_ids=np.array([[1] * 5 + [2] * 3]),
        positions=np.array([[0, 1, 2, 3, 4, 0, 1, 2]]),
    )
    np.testing.assert_allclose(packed[:, :5], base(IDS[:, :5]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], base(IDS[:, 5:]), rtol=1e-5, atol=1e-5)


def test_another_adapter_does_not_recompile(getkey, monkeypatch):
    traced = []

    def bind(*args, **options):
        traced.append(1)
        return jp.bind(*args, **options)

    monkeypatch.setattr(model_file, "bind", bind)
    base = toy_model(getkey(), d_ff=18)
    answers = [
        base(IDS, adapter=toy_adapter(getkey(), base, alpha=alpha, dropout=dropout))
        for alpha, dropout in ((1.0, 0.0), (4.0, 0.0), (4.0, 0.5))
    ]
    assert len(traced) == 1
    assert not np.allclose(answers[0], answers[1])


def test_adapter_of_another_model_is_refused(getkey):
    base, other = toy_model(getkey()), toy_model(getkey(), d_ff=20)
    with pytest.raises(UserError, match="another model"):
        base(IDS, adapter=toy_adapter(getkey(), other))


def test_model_is_a_pytree_over_its_parameters(getkey):
    base = toy_model(getkey())
    leaves, tree = jax.tree.flatten(base)
    assert len(leaves) == len(paths.flatten(base.params))
    doubled = jax.jit(lambda model: jax.tree.map(lambda x: 2 * x, model))(base)
    assert doubled.tokenizer is base.tokenizer
    assert jax.tree.structure(doubled) == tree
    np.testing.assert_array_equal(doubled.params["norm"]["scale"], 2.0)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_saved_model_loads_with_its_own_logits(getkey, tmp_path, dtype):
    base = toy_model(getkey(), eos_token_ids=(1,))
    jp.save_model(str(tmp_path / "out"), base, dtype=dtype)
    loaded = jp.load_model(str(tmp_path / "out"))
    rounded = jax.tree.map(lambda x: x.astype(dtype or x.dtype).astype(x.dtype), base.params)
    np.testing.assert_array_equal(loaded(IDS), base.replace(params=rounded)(IDS))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert stored == (dtype or "float32")
    text = "<|im_start|>user\nHi there<|im_end|>\n"
    assert loaded.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template


def test_model_saved_with_an_adapter_computes_what_both_compute_together(getkey, tmp_path):
    base = toy_model(getkey(), tie_embeddings=True)
    adapter = toy_adapter(getkey(), base)
    before = jax.tree.map(np.array, base.params)
    jp.save_model(str(tmp_path / "out"), base, adapter=adapter)
    merged = jp.load_model(str(tmp_path / "out"))
    expected = base(IDS, adapter=adapter)
    np.testing.assert_allclose(merged(IDS), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, base(IDS), atol=0.1)
    jax.tree.map(np.testing.assert_array_equal, base.params, before)


def test_unknown_dtype_of_a_saved_model_is_refused(getkey, tmp_path):
    with pytest.raises(UserError, match="'float33' is not one of float32, bfloat16, float16"):
        jp.save_model(str(tmp_path / "out"), toy_model(getkey()), dtype="float33")
    assert not (tmp_path / "out").exists()


def test_a_model_is_never_saved_over_the_folder_it_was_loaded_from(getkey, tmp_path):
    folder, link = tmp_path / "model", tmp_path / "link"
    jp.save_model(str(folder), toy_model(getkey(), eos_token_ids=(1,)))
    link.symlink_to(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    base = jp.load_model(str(folder))
    for place in (folder, link, tmp_path / "x" / ".." / "model"):
        with pytest.raises(UserError, match="model: is the model that is read"):
            jp.save_model(str(place), base, dtype="bfloat16", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    jp.save_model(str(tmp_path / "other"), base)
    jp.save_model(str(tmp_path / "other"), base, overwrite=True)


def test_a_hub_id_is_no_folder_here(getkey, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = toy_model(getkey()).replace(name="org/name")
    jp.save_model("org/name", model)
    assert (tmp_path / "org" / "name" / "config.json").is_file()


@pytest.mark.parametrize("compute_dtype", ["bf16", "float64", ""])
def test_an_unknown_compute_dtype_is_refused_before_anything_is_read(compute_dtype):
    words = f"compute_dtype: {compute_dtype!r} is not one of auto, float32, bfloat16, float16"
    with pytest.raises(UserError, match=words):
        jp.load_model("./nowhere", compute_dtype=compute_dtype)


def test_a_model_is_shown_in_one_line(getkey):
    base = toy_model(getkey())
    assert re.fullmatch(r"Model\('toy', llama, [\d,]+ parameters\)", repr(base))
