"""Adapters that we save: HF PEFT's logits for them, and that we still write the same files.

``scripts/make_golden_saved.py`` made the folders with jaxpeft, and the logits with torch and PEFT.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from make_golden_saved import ADAPTERS, build
from places import GOLDEN
from safetensors.numpy import load_file

from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.adapters import load_adapter, save_adapter
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model

WRITTEN = ("adapter_config.json", "adapter_model.safetensors")
CHANGED = (
    "what is written has changed: let PEFT read it (both steps of scripts/make_golden_saved.py), "
    "and commit the new folders."
)


@functools.cache
def load_base(name):
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / name)
    return Model(params, config, Transformer(config), tokenizer, fingerprint, name)


def run(base, adapter, expected):
    mask = jnp.asarray(expected["attention_mask"])
    logits = base(jnp.asarray(expected["input_ids"]), adapter=adapter, segment_ids=mask)
    return np.asarray(logits)[expected["attention_mask"].astype(bool)]


def test_every_adapter_has_a_folder_and_logits():
    for kind in (GOLDEN / "saved").glob("*/"), (GOLDEN / "saved").glob("*.safetensors"):
        assert sorted(path.stem for path in kind) == sorted(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_our_logits_from_a_folder_of_ours(name):
    base = load_base(ADAPTERS[name][0])
    expected = load_file(GOLDEN / "saved" / f"{name}.safetensors")
    theirs = expected["logits"][expected["attention_mask"].astype(bool)]
    ours = run(base, build(name, base), expected)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_adapter_is_saved_as_the_files_that_peft_read(name, tmp_path):
    base = load_base(ADAPTERS[name][0])
    save_adapter(tmp_path / "built", build(name, base), base)
    save_adapter(tmp_path / "again", load_adapter(GOLDEN / "saved" / name, base), base)
    for file in WRITTEN:
        expected = (GOLDEN / "saved" / name / file).read_bytes()
        for folder in (tmp_path / "built", tmp_path / "again"):
            actual = (folder / file).read_bytes()
            if actual != expected and file.endswith(".json"):
                assert json.loads(actual) == json.loads(expected), CHANGED
            assert actual == expected, CHANGED
