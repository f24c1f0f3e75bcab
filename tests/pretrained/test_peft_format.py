"""PEFT folders: those HF PEFT wrote give PEFT's logits; what we write says the same; faults.

The golden folders and logits were made with torch and PEFT by ``scripts/make_golden.py``.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_goldens import (
    BASE,
    BASES,
    GOLDEN,
    assert_one_line,
    assert_same_adapter,
    assert_same_logits,
    copy_golden,
    edit_config,
    edit_tensors,
    golden,
    run_golden,
)
from safetensors.numpy import load_file

from jaxpeft.core import paths
from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA, config_of
from jaxpeft.methods.lora.nodes import LoRAKernel
from jaxpeft.methods.lora.peft import config as lora_peft_config
from jaxpeft.methods.merging import merge
from jaxpeft.methods.peft.values import Values
from jaxpeft.pretrained.adapters import load_adapter, save_adapter


@pytest.mark.parametrize("name", BASES)
def test_adapters_of_peft_give_its_logits_bound_and_merged(name):
    folder, base = golden(name)
    expected = load_file(GOLDEN / "adapters" / f"{name}.safetensors")
    mask = expected["attention_mask"].astype(bool)
    adapter = load_adapter(folder, base)
    assert_same_logits(run_golden(base, adapter, expected), expected["logits"][mask])
    merged = base.replace(params=merge(base.params, adapter))
    assert_same_logits(run_golden(merged, None, expected), expected["merged"][mask])
    plain = run_golden(base, None, expected)
    assert np.abs(plain - expected["logits"][mask]).max() > 1.0


def test_bfloat16_layer_rounds_as_peft_does():
    golden = load_file(GOLDEN / "adapters" / "bf16_layer.safetensors")
    kernel = LoRAKernel(
        jnp.asarray(golden["weight"].T),
        jnp.asarray(golden["lora_A"].T),
        jnp.asarray(golden["lora_B"].T),
        jnp.asarray(golden["scale"]),
    )
    y = jax.jit(LoRAKernel.multiply)(kernel, jnp.asarray(golden["x"]))
    assert y.dtype == jnp.bfloat16
    # Sums run in another order here, so a rare value falls on the other side of a rounding.
    same = np.asarray(y == golden["y"])
    assert same.mean() > 0.99
    np.testing.assert_allclose(
        np.asarray(y, np.float32), golden["y"].astype(np.float32), rtol=2**-7, atol=1e-2
    )
    merged = np.asarray(kernel.materialize().T)
    assert (merged == golden["merged_weight"]).mean() > 0.995


def test_ranks_alphas_and_targets_follow_the_config():
    folder, base = golden("patterns")
    adapter = load_adapter(folder, base)
    assert adapter.spec.rank == 5
    ranks = {p: paths.get(adapter.buffers, p)["rank"].tolist() for p in adapter.spec.paths}
    assert ranks == {
        "layers/mlp/down_proj/kernel": [3, 3, 0],
        "layers/mlp/gate_proj/kernel": [2, 0, 0],
        "layers/self_attn/q_proj/kernel": [2, 5, 0],
    }
    scale = paths.get(adapter.buffers, "layers/self_attn/q_proj/kernel/scale")
    np.testing.assert_array_equal(scale, np.float32([7 / 2, 4 / 5, 0]))


def test_default_targets_are_q_and_v(tmp_path):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(folder, target_modules=None)
    assert_same_adapter(load_adapter(folder, base), load_adapter(golden("qv")[0], base))


def test_all_linear_as_a_word_means_all_but_the_head(tmp_path):
    folder, base = copy_golden("all_linear", tmp_path)
    edit_config(folder, target_modules="all-linear")
    assert_same_adapter(load_adapter(folder, base), load_adapter(golden("all_linear")[0], base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors_are_promoted_to_float32(tmp_path, dtype):
    folder, base = copy_golden("qv", tmp_path)
    half = {}

    def halve(tensors):
        for key in tensors:
            half[key] = tensors[key] = tensors[key].astype(jnp.dtype(dtype))

    edit_tensors(folder, halve)
    adapter = load_adapter(folder, base)
    a = paths.get(adapter.params, "layers/self_attn/q_proj/kernel/a")
    assert a.dtype == jnp.float32
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(a[1].T, half[key].astype(np.float32))


# Adapters that we write.


@pytest.mark.parametrize("name", BASES)
def test_save_then_load_is_the_identity(tmp_path, name):
    folder, base = golden(name)
    adapter = load_adapter(folder, base)
    save_adapter(tmp_path / "out", adapter, base)
    assert_same_adapter(load_adapter(tmp_path / "out", base), adapter)


@pytest.mark.parametrize("name", BASES)
def test_saved_tensors_equal_those_of_peft(tmp_path, name):
    folder, base = golden(name)
    save_adapter(tmp_path / "out", load_adapter(folder, base), base)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = load_file(folder / "adapter_model.safetensors")
    theirs = {key: value for key, value in theirs.items() if "base_layer" not in key}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, strict=True)


@pytest.mark.parametrize("name", ["qv", "all_linear", "rslora", "lm_head"])
def test_saved_config_equals_that_of_peft(tmp_path, name):
    folder, base = golden(name)
    save_adapter(tmp_path / "out", load_adapter(folder, base), base)
    ours, theirs = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (tmp_path / "out", folder)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["regex", "patterns"])
def test_saved_config_means_what_that_of_peft_means(tmp_path, name):
    folder, base = golden(name)
    save_adapter(tmp_path / "out", load_adapter(folder, base), base)

    def parsed(place):
        values = json.loads((place / "adapter_config.json").read_text())
        return lora_peft_config.parse(Values(values, place, lora_peft_config.DEFAULTS))

    ours, theirs = parsed(tmp_path / "out"), parsed(folder)
    for module in (*paths.module_names(base.params), "model.embed_tokens"):
        assert ours.selection.selects(module) == theirs.selection.selects(module)
        if ours.selection.selects(module):
            assert ours.rank_of(module) == theirs.rank_of(module)
            assert ours.scale_of(module) == theirs.scale_of(module)


def test_a_new_adapter_survives_the_round_trip(tmp_path, getkey):
    base = BASE["llama2"]
    method = LoRA(rank=3, alpha=0.1, targets=("v_proj", "lm_head"), dropout=0.1, rslora=True)
    adapter = init_adapter(method, base.params, getkey())
    save_adapter(tmp_path / "out", adapter, base)
    assert_same_adapter(load_adapter(tmp_path / "out", base), adapter)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 0.1, 0.1)
    assert config["target_modules"] == ["lm_head", "v_proj"]


@pytest.mark.parametrize("alpha", [1.0, 16.0, 5.5, 0.1, 1e-11, 3.25e12])
def test_saved_alpha_and_dropout_are_those_of_the_config(tmp_path, getkey, alpha):
    base = BASE["llama2"]
    method = LoRA(rank=3, alpha=alpha, targets=("v_proj",), dropout=0.35)
    adapter = init_adapter(method, base.params, getkey())
    save_adapter(tmp_path / "out", adapter, base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (alpha, 0.35)
    assert isinstance(config["lora_alpha"], int if alpha.is_integer() else float)
    assert config_of(load_adapter(tmp_path / "out", base)).alpha == alpha


def test_saved_bytes_depend_on_the_adapter_only(tmp_path):
    folder, base = golden("patterns")
    for name in ("first", "second"):
        save_adapter(tmp_path / name, load_adapter(folder, base), base)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_saving_replaces_an_older_adapter_and_leaves_nothing_beside_it(tmp_path):
    base = BASE["llama3"]
    save_adapter(tmp_path / "out", load_adapter(golden("rslora")[0], base), base)
    newer = load_adapter(golden("qv")[0], base)
    save_adapter(tmp_path / "out", newer, base)
    assert_same_adapter(load_adapter(tmp_path / "out", base), newer)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "jaxpeft.json",
    }


def test_an_adapter_is_found_in_the_folder_of_its_run(tmp_path):
    folder, base = golden("qv")
    adapter = load_adapter(folder, base)
    save_adapter(tmp_path / "run" / "adapter", adapter, base)
    assert_same_adapter(load_adapter(tmp_path / "run", base), adapter)


def test_a_failed_save_keeps_the_older_adapter(tmp_path, monkeypatch):
    folder, base = golden("qv")
    adapter = load_adapter(folder, base)
    save_adapter(tmp_path / "out", adapter, base)

    def full(file, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(ResourceError) as error:
        save_adapter(tmp_path / "out", load_adapter(golden("rslora")[0], base), base)
    assert_one_line(error, tmp_path / "out", "no space left")
    assert_same_adapter(load_adapter(tmp_path / "out", base), adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_brings_the_older_adapter_back(tmp_path, monkeypatch):
    folder, base = golden("qv")
    adapter = load_adapter(folder, base)
    save_adapter(tmp_path / "out", adapter, base)
    rename = pathlib.Path.rename

    def fail_on_the_new_one(self, target):
        if self.name.startswith(".out.") and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_on_the_new_one)
    with pytest.raises(UserError, match="Input/output error"):
        save_adapter(tmp_path / "out", adapter, base)
    assert_same_adapter(load_adapter(tmp_path / "out", base), adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saving_removes_no_foreign_files(tmp_path):
    folder, base = golden("qv")
    adapter = load_adapter(folder, base)
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(UserError) as error:
        save_adapter(tmp_path, adapter, base)
    assert_one_line(error, tmp_path, "thesis.txt")
    with pytest.raises(UserError, match="is a file"):
        save_adapter(tmp_path / "thesis.txt", adapter, base)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_saving_refuses_what_peft_could_not_read(tmp_path, getkey):
    folder, base = golden("qv")
    adapter = load_adapter(folder, base)
    path = "layers/self_attn/q_proj/kernel"

    def change(tree, leaf, value):
        return adapter.replace(
            **{tree: paths.put(getattr(adapter, tree), {f"{path}/{leaf}": value})}
        )

    a = paths.get(adapter.params, f"{path}/a")
    with pytest.raises(UserError, match="not finite"):
        save_adapter(tmp_path / "out", change("params", "a", a.at[1, 2, 0].set(jnp.nan)), base)
    with pytest.raises(ValueError, match="beyond rank 3"):
        save_adapter(tmp_path / "out", change("buffers", "rank", jnp.array([4, 3, 4])), base)
    rates = jnp.array([0.0, 0.1, 0.0])
    with pytest.raises(UserError, match="one dropout rate"):
        save_adapter(tmp_path / "out", change("buffers", "dropout", rates), base)
    with pytest.raises(UserError, match="adapts no module"):
        save_adapter(tmp_path / "out", jax.tree.map(jnp.zeros_like, adapter), base)
    with pytest.raises(UserError, match="'full'"):
        save_adapter(tmp_path / "out", init_adapter(Full(), base.params, getkey()), base)
    with pytest.raises(UserError, match="another model"):
        save_adapter(tmp_path / "out", adapter, BASE["llama_bias"])
    assert not (tmp_path / "out").exists()


# Faults of folders.
