"""Every adapter that HF PEFT wrote: its logits bound and merged, and the same files back.

The folders were made with torch and PEFT by ``scripts/make_golden_methods.py``.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file

from jaxpeft.methods.merging import merge
from jaxpeft.methods.registry import KINDS
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.adapters import load_adapter, save_adapter
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model

NAMES = sorted(file.stem for file in (GOLDEN / "methods").glob("*.safetensors"))
STARTED = {"lora_pissa": "pissa", "lora_olora": "olora"}
"""Adapters whose first product PEFT takes off the base at every load; we never change a base.

They are saved as plain LoRAs of twice the rank, which PEFT makes of them on demand: other keys of
the config, other shapes, the same logits.
"""
RESTATED = {"oft_blocks": ("oft_block_size", "r")}
"""Keys whose values we save otherwise, to the same effect: the size of blocks, not their number."""
COPIES = (".base_layer.weight", ".modules_to_save.bias", ".original_module.bias")
"""Copies of weights that PEFT puts beside some adapters, and does not need."""


@functools.cache
def load_base(name):
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / name)
    return Model(params, config, Transformer(config), tokenizer, fingerprint, name)


@functools.cache
def golden(name):
    folder = GOLDEN / "methods" / name
    values = json.loads((folder / "adapter_config.json").read_text())
    base = load_base(values["base_model_name_or_path"])
    return folder, base, load_adapter(folder, base), load_file(folder.with_suffix(".safetensors"))


def run(base, adapter, expected):
    mask = jnp.asarray(expected["attention_mask"])
    logits = base(jnp.asarray(expected["input_ids"]), adapter=adapter, segment_ids=mask)
    return np.asarray(logits)[expected["attention_mask"].astype(bool)]


def assert_same_logits(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


every_golden = pytest.mark.parametrize("name", NAMES)
kept_golden = pytest.mark.parametrize("name", [name for name in NAMES if name not in STARTED])


@every_golden
def test_an_adapter_of_peft_gives_its_logits(name):
    _, base, adapter, expected = golden(name)
    wanted = expected["logits"][expected["attention_mask"].astype(bool)]
    assert_same_logits(run(base, adapter, expected), wanted)
    assert np.abs(run(base, None, expected) - wanted).max() > 0.1


@every_golden
def test_an_adapter_of_peft_merges_to_its_merged_logits(name):
    _, base, adapter, expected = golden(name)
    if KINDS[adapter.spec.kind].no_merge:
        assert "merged" not in expected
        return
    merged = base.replace(params=merge(base.params, adapter))
    wanted = expected.get("merged", expected["logits"])  # without, PEFT itself merges wrongly
    wanted = wanted[expected["attention_mask"].astype(bool)]
    assert_same_logits(run(merged, None, expected), wanted)


@kept_golden
def test_an_adapter_of_peft_is_saved_with_the_same_keys_shapes_and_values(name, tmp_path):
    folder, base, adapter, _ = golden(name)
    save_adapter(tmp_path / "out", adapter, base)
    ours, theirs = (
        load_file(place / "adapter_model.safetensors") for place in (tmp_path / "out", folder)
    )
    theirs = {key: value for key, value in theirs.items() if not key.endswith(COPIES)}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-6, atol=1e-7)
        assert ours[key].dtype == value.dtype


@kept_golden
def test_a_saved_config_has_the_keys_and_settings_of_peft(name, tmp_path):
    folder, base, adapter, _ = golden(name)
    save_adapter(tmp_path / "out", adapter, base)
    ours, theirs = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (tmp_path / "out", folder)
    )
    assert ours.keys() == theirs.keys()
    loose = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    loose += ("layers_to_transform", "layers_pattern", "init_lora_weights", "init_weights")
    loose += RESTATED.get(name, ())
    assert {k: v for k, v in ours.items() if k not in loose} == {
        k: v for k, v in theirs.items() if k not in loose
    }


@kept_golden
def test_what_is_saved_loads_as_the_same_adapter(name, tmp_path):
    _, base, adapter, _ = golden(name)
    save_adapter(tmp_path / "out", adapter, base)
    again = load_adapter(tmp_path / "out", base)
    assert again.spec == adapter.spec
    for old, new in ((adapter.params, again.params), (adapter.buffers, again.buffers)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), old, new)


@pytest.mark.parametrize("name", STARTED)
def test_a_part_of_the_base_is_saved_as_a_plain_lora_of_twice_the_rank(name, tmp_path):
    folder, base, adapter, expected = golden(name)
    assert dict(adapter.spec.options)["init_weights"] == STARTED[name]
    save_adapter(tmp_path / "out", adapter, base)
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert values["init_lora_weights"] is True
    ours, theirs = (
        load_file(place / "adapter_model.safetensors") for place in (tmp_path / "out", folder)
    )
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        axis = 0 if key.endswith("lora_A.weight") else 1
        trained, first = np.split(ours[key], 2, axis)
        np.testing.assert_array_equal(trained, value)
        assert np.abs(first).max() > 0.01
    again = load_adapter(tmp_path / "out", base)
    assert "init_weights" not in dict(again.spec.options)
    wanted = expected["logits"][expected["attention_mask"].astype(bool)]
    assert_same_logits(run(base, again, expected), wanted)


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.peft], ids=lambda k: k.name)
def test_dropout_of_peft_is_either_ours_or_of_its_training_alone(kind):
    rates = {key for key in kind.peft.defaults if "dropout" in key}
    assert rates <= {*kind.peft.read_keys, *kind.peft.harmless_keys}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *[("loha", "rank_dropout"), ("loha", "module_dropout"), ("lokr", "rank_dropout")],
        *[("lokr", "module_dropout"), ("oft", "module_dropout")],
    ],
)
def test_an_adapter_trained_with_dropout_that_only_peft_has_loads_the_same(tmp_path, name, key):
    source, base, adapter, _ = golden(name)
    folder = shutil.copytree(source, tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values[key] == 0
    (folder / "adapter_config.json").write_text(json.dumps(values | {key: 0.25}))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base), adapter)
