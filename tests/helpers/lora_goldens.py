"""LoRA folders that HF PEFT wrote, their bases, and what to do with them."""

import json
import shutil

import jax
import numpy as np
from places import GOLDEN
from safetensors.numpy import load_file, save_file

from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model

BASES = {
    "qv": "llama3",
    "all_linear": "llama_bias",
    "rslora": "llama3",
    "regex": "llama3",
    "patterns": "llama2",
    "lm_head": "llama2",
}


def load_base(name):
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / name)
    return Model(params, config, Transformer(config), tokenizer, fingerprint, name)


BASE = {name: load_base(name) for name in set(BASES.values())}


def golden(name):
    return GOLDEN / "adapters" / name, BASE[BASES[name]]


def copy_golden(name, tmp_path):
    folder, base = golden(name)
    return shutil.copytree(folder, tmp_path / name), base


def edit_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def assert_same_logits(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


def assert_same_adapter(actual, expected):
    assert actual.spec == expected.spec
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def run_golden(base, adapter, expected):
    """Logits at every position that is not padding."""
    ids, mask = jax.device_put((expected["input_ids"], expected["attention_mask"]))
    logits = base(ids, adapter=adapter, segment_ids=mask)
    return np.asarray(logits)[expected["attention_mask"].astype(bool)]


def assert_one_line(error, *parts):
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


# Adapters that PEFT wrote.
