"""PEFT folders of models that are not ours, by a map from paths to names of modules.

The goldens are of HF PEFT; the model is ours, taken for a function that is not known.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import MODELS, ROLES, moved, start
from places import GOLDEN
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.load import load_params

FOLDERS = sorted(file.stem for file in (GOLDEN / "methods").glob("*.safetensors"))
KERNELS = {
    "layers/*/*/kernel": "model.layers.{layer}.{}.{}",
    "lm_head/kernel": "lm_head",
}


@functools.cache
def described(name):
    """The module, its parameters as a tree of which nothing is known, and their roles."""
    params, config, *_ = load_params(GOLDEN / "models" / name)
    module = Transformer(config)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return module, params, jp.describe(module.apply, {"params": params}, ids)


@functools.cache
def golden(name):
    folder = GOLDEN / "methods" / name
    values = json.loads((folder / "adapter_config.json").read_text())
    module, params, roles = described(values["base_model_name_or_path"])
    names = {pattern: name for pattern, name in KERNELS.items() if matches(pattern, roles)}
    return folder, module, params, roles, names, load_file(folder.with_suffix(".safetensors"))


def matches(pattern, roles):
    return any(paths.path_matches(pattern, path) for path in roles)


def is_of_kernels(name):
    """Whether a folder holds changes of kernels alone."""
    tensors = load_file(GOLDEN / "methods" / name / "adapter_model.safetensors")
    others = ("embed", "modules_to_save", "trainable_tokens", ".bias", "ln_tuning", "prompt")
    odd = any(word in key for key in tensors for word in others if "lora_B.bias" not in key)
    return not odd and name not in ("prefix", "p_tuning", "lora_head_tied")


STARTED = ("lora_pissa", "lora_olora")
"""These are saved as plain LoRAs of twice the rank."""

OF_KERNELS = [name for name in FOLDERS if is_of_kernels(name)]


@pytest.mark.parametrize("name", OF_KERNELS)
def test_a_folder_of_peft_gives_its_logits_on_a_model_that_is_not_known(name):
    folder, module, params, roles, names, expected = golden(name)
    adapter = jp.load_adapter(folder, params, roles=roles, names=names)
    mask = jnp.asarray(expected["attention_mask"])
    run = jax.jit(
        lambda tree, ids: jp.lift(module.apply)(jp.bind(tree, adapter), ids, segment_ids=mask)
    )
    logits = np.asarray(run(params, jnp.asarray(expected["input_ids"])))
    real = expected["attention_mask"].astype(bool)
    ours, theirs = logits[real], expected["logits"][real]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", [name for name in OF_KERNELS if name not in STARTED])
def test_a_folder_of_peft_is_saved_with_the_same_keys_and_values(name, tmp_path):
    folder, _, params, roles, names, _ = golden(name)
    adapter = jp.load_adapter(folder, params, roles=roles, names=names)
    jp.save_adapter(tmp_path, adapter, params, roles=roles, names=names)
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path, folder))
    theirs = {key: value for key, value in theirs.items() if ".base_layer." not in key}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in OF_KERNELS])
def test_a_folder_of_more_than_kernels_is_refused_in_one_line(name):
    folder, _, params, roles, names, _ = golden(name)
    with pytest.raises(jp.UserError) as caught:
        jp.load_adapter(folder, params, roles=roles, names=names)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("model", ["unrolled", "scanned", "linen", "nnx"])
def test_names_hold_what_stars_match_and_the_index_in_a_stack(model, tmp_path):
    """The factors of every layer lie under its own name; those of kernels of any rank too."""
    names = {
        "unrolled": {"layers/*/*/kernel": "model.layers.{}.{}_proj"},
        "scanned": {"blocks/*/kernel": "model.layers.{layer}.{}_proj"},
        "linen": {"layers/*_0/*/kernel": "model.{layer}.{}.{}", "layers/*/kernel": "m.{layer}.{}"},
        "nnx": {"**/kernel": "model.{}proj"},
    }[model]
    params, roles = MODELS[model][1], ROLES[model]
    adapter = moved(start(model, "lora"))
    jp.save_adapter(tmp_path, adapter, params, roles=roles, names=names)
    again = jp.load_adapter(tmp_path, params, roles=roles, names=names)
    assert again.spec == adapter.spec
    for one, other in zip(*map(jax.tree.leaves, (again, adapter)), strict=True):
        np.testing.assert_array_equal(one, other)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path in adapter.spec.paths:
        a = np.asarray(paths.get(adapter.params, f"{path}/a"))
        for layer, factor in enumerate(a if a.ndim == 3 else [a]):
            found = [key for key, value in tensors.items() if np.array_equal(value, factor.T)]
            assert len(found) == 1, path
            assert a.ndim == 2 or f".{layer}." in found[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"missing/*": "a.{}"}, "'missing/\\*' matches no kernel of this model"),
        ({"layers/*/query/kernel": "q"}, "'q': layers/0/query/kernel needs 1 times {} for what"),
        ({"layers/*/*/kernel": "a.{}"}, "needs 2 times"),
        ({"layers/*/query/kernel": "a.{}.{layer}"}, "and 0 times {layer}"),
        ({"layers/0/*/kernel": "{}", "layers/1/*/kernel": "{}"}, "is the name of layers/0/"),
        ({"layers/0/*/kernel": "a.{}"}, "layers/1/out/kernel, layers/1/query/kernel: a folder of"),
    ],
)
def test_wrong_names_are_refused_in_one_line(names, message, tmp_path):
    adapter, params = start("unrolled", "lora"), MODELS["unrolled"][1]
    with pytest.raises(jp.UserError, match=message):
        jp.save_adapter(tmp_path / "out", adapter, params, roles=ROLES["unrolled"], names=names)
    assert not (tmp_path / "out").exists()


def test_names_go_with_parameters_and_roles(tmp_path):
    adapter, params = start("unrolled", "lora"), MODELS["unrolled"][1]
    with pytest.raises(jp.UserError, match="they go with the model's parameters"):
        jp.save_adapter(tmp_path / "out", adapter, params, names={"layers/*/*/kernel": "{}.{}"})
