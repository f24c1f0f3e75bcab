"""PEFT folders that are damaged, or say what cannot be honoured: one line, exit code 2."""

import json

import numpy as np
import pytest
from lora_goldens import (
    BASE,
    assert_one_line,
    assert_same_adapter,
    copy_golden,
    edit_config,
    edit_tensors,
    golden,
)

from jaxpeft.core.errors import UserError
from jaxpeft.methods.peft.patterns import Selection
from jaxpeft.pretrained.adapters import load_adapter, save_adapter


def saved(tmp_path, name="qv"):
    folder, base = golden(name)
    save_adapter(tmp_path / "out", load_adapter(folder, base), base)
    return tmp_path / "out", base


def test_another_base_is_an_error_that_names_both(tmp_path):
    folder, base = saved(tmp_path)
    other = base.replace(fingerprint="v2:" + "f" * 64, name="other/model")
    with pytest.raises(UserError) as error:
        load_adapter(folder, other)
    assert_one_line(
        error, "llama3", base.fingerprint[:12], "other/model", "ffff", "allow_other_base"
    )
    adapter = load_adapter(folder, other, allow_other_base=True)
    assert_same_adapter(adapter, load_adapter(folder, base))


def test_a_fingerprint_of_the_first_version_is_not_taken_for_another_base(tmp_path):
    folder, base = saved(tmp_path)
    expected = load_adapter(folder, base)
    side = json.loads((folder / "jaxpeft.json").read_text())
    side["base"]["fingerprint"] = "f" * 64
    (folder / "jaxpeft.json").write_text(json.dumps(side))
    with pytest.warns(UserWarning, match=r"'llama3' is the base it was .* cannot be checked"):
        assert_same_adapter(load_adapter(folder, base), expected)
    assert_same_adapter(load_adapter(folder, base, allow_other_base=True), expected)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_changed_behind_our_back_are_noticed(tmp_path, file):
    folder, base = saved(tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[-20] ^= 1
    (folder / file).write_bytes(bytes(content))
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    if file.endswith("json"):
        assert_one_line(error, folder / file)
    else:
        assert_one_line(error, folder / file, "changed since it was saved", "jaxpeft.json")


def test_an_edited_alpha_is_noticed(tmp_path):
    folder, base = saved(tmp_path)
    edit_config(folder, lora_alpha=800)
    with pytest.raises(UserError, match="changed since it was saved"):
        load_adapter(folder, base)


@pytest.mark.parametrize(
    ("side", "part"),
    [
        ('{"format": 99}', "format: this version reads 1, got 99"),
        ('{"format": 1}', "lacks base or sha256"),
        ("", "the file is empty"),
        ('{"format": 1, "base": {}, "sha256": {"../secret": "00"}}', "'../secret'"),
    ],
)
def test_a_damaged_side_file_is_an_error(tmp_path, side, part):
    folder, base = saved(tmp_path)
    (folder / "jaxpeft.json").write_text(side)
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder / "jaxpeft.json", part)


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "the file is empty"), ("{", "not valid JSON"), ("[1]", "expected a JSON object")],
)
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, text, part):
    folder, base = copy_golden("qv", tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder / "adapter_config.json", part)


def test_missing_files_are_errors(tmp_path):
    folder, base = copy_golden("qv", tmp_path)
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path / "nowhere", base)
    assert_one_line(error, tmp_path / "nowhere", "no such folder")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder, "has no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder, "pickle", "safe_serialization=True")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder / "adapter_config.json", "no such file")


def test_a_truncated_tensor_file_is_an_error(tmp_path):
    folder, base = copy_golden("qv", tmp_path)
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            load_adapter(folder, base)
        assert_one_line(error, file)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def drop_b(tensors):
    del tensors[f"{Q0}.lora_B.weight"]


def drop_layer(tensors):
    for key in [key for key in tensors if ".layers.2." in key]:
        del tensors[key]


def add_bias(tensors):
    tensors[f"{Q0}.lora_B.bias"] = np.zeros(32, np.float32)


def add_embedding(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 128), np.float32)


def add_layer(tensors):
    for letter in "AB":
        key = f"{Q0}.lora_{letter}.weight"
        tensors[key.replace("layers.0", "layers.3")] = tensors[key].copy()


def add_k_proj(tensors):
    for letter, shape in (("A", (4, 32)), ("B", (16, 4))):
        key = f"{Q0}.lora_{letter}.weight".replace("q_proj", "k_proj")
        tensors[key] = np.zeros(shape, np.float32)


def widen(tensors):
    for key in [key for key in tensors if "lora_A" in key]:
        tensors[key] = np.zeros((4, 48), np.float32)


def change_rank(tensors):
    tensors[f"{Q0}.lora_A.weight"] = np.zeros((5, 32), np.float32)


def flatten(tensors):
    tensors[f"{Q0}.lora_A.weight"] = np.zeros(128, np.float32)


def put_nan(tensors):
    tensors[f"{Q0}.lora_B.weight"][3, 1] = np.nan


def put_integers(tensors):
    tensors[f"{Q0}.lora_B.weight"] = np.zeros((32, 4), np.int8)


def put_changed_head(tensors):
    tensors["base_model.model.lm_head.weight"] = np.zeros((128, 32), np.float32)


def adapt_tied_head(tensors):
    for letter, shape in (("A", (4, 32)), ("B", (128, 4))):
        tensors[f"base_model.model.lm_head.lora_{letter}.weight"] = np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (drop_b, ["1 tensors are missing", "layers.0.self_attn.q_proj.lora_B.weight"]),
        (drop_layer, ["no tensors for 2 modules", "model.layers.2.self_attn.q_proj", "3 layers"]),
        (add_bias, ["1 unexpected tensors", "q_proj.lora_B.bias"]),
        (add_embedding, ["1 tensors are missing", "embed_tokens.lora_embedding_B"]),
        (add_layer, ["1 modules that the base 'llama3' (3 layers) lacks", "model.layers.3."]),
        (add_k_proj, ["does not select", "model.layers.0.self_attn.k_proj"]),
        (widen, ["6 tensors do not fit", "is [4, 48], expected [4, 32]", "and 3 more"]),
        (change_rank, ["another rank", "(r = 4)", "is [5, 32], expected [4, 32]"]),
        (flatten, ["q_proj.lora_A.weight is [128], expected [4, 32]"]),
        (put_nan, ["layers.0.self_attn.q_proj.lora_B.weight", "1 of 128 values are not finite"]),
        (put_integers, ["unsupported dtype", "q_proj.lora_B.weight is I8"]),
        (put_changed_head, ["base_model.model.lm_head.weight", "differs from the weight"]),
        (adapt_tied_head, ["does not select", "lm_head"]),
        (dict.clear, ["holds no LoRA tensors"]),
    ],
)
def test_tensors_that_do_not_fit_are_errors(tmp_path, change, parts):
    folder, base = copy_golden("qv", tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder / "adapter_model.safetensors", *parts)


def test_copies_of_the_bases_own_embedding_are_accepted(tmp_path):
    folder, base = copy_golden("qv", tmp_path)
    table = np.asarray(base.params["embed_tokens"]["embedding"])

    def add(tensors):
        tensors["base_model.model.model.embed_tokens.weight"] = table
        tensors["base_model.model.lm_head.weight"] = table.copy()

    edit_tensors(folder, add)
    assert_same_adapter(load_adapter(folder, base), load_adapter(golden("qv")[0], base))


def test_another_width_is_told_in_one_line():
    with pytest.raises(UserError) as error:
        load_adapter(golden("all_linear")[0], BASE["llama3"])
    assert_one_line(error, "do not fit the base 'llama3'", "more", "made for another model")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"r": 10**9}, "r: must be at most 65,536, got 1000000000"),
        ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
        ({"r": "8"}, "r: expected a whole number of at least 1, got '8'"),
        ({"r": True}, "r: expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number, got 1000"),
        ({"lora_dropout": 1.5}, "lora_dropout: expected a probability in [0, 1), got 1.5"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"rank_pattern": {"q_proj": 5}}, "another rank"),
        ({"rank_pattern": {"(": 5}}, "rank_pattern: '(' is not a valid regex"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: expected a number"),
        ({"target_modules": ["q_proj"]}, "does not select"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no tensors for 3 modules"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "no tensors for 1 modules"),
        ({"target_modules": "(q_proj"}, "target_modules: '(q_proj' is not a valid regex"),
        ({"target_modules": 3}, "target_modules: expected a string or a list of strings, got 3"),
        ({"exclude_modules": ["v_proj"]}, "does not select"),
        ({"layers_to_transform": [0]}, "does not select"),
        ({"layers_to_transform": "0"}, "layers_to_transform: expected a whole number"),
        ({"peft_type": "POLY"}, "peft_type: 'POLY' is not supported; supported: "),
        ({"task_type": "SEQ_CLS"}, "task_type: only 'CAUSAL_LM' is supported"),
        ({"use_dora": True}, "magnitude"),
        (
            {"modules_to_save": ["lm_head"]},
            "1 tensors are missing: base_model.model.lm_head.weight",
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names"),
        ({"bias": "some"}, "bias: expected one of none, all, lora_only, got 'some'"),
        ({"lora_bias": True}, "6 tensors are missing: model.layers.0.self_attn.q_proj.lora_B.bias"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias: expected false with use_dora"),
        ({"layer_replication": [[0, 2]]}, "not supported yet: layer_replication"),
        ({"trainable_token_indices": [3]}, "embed_tokens.token_adapter.trainable_tokens_delta"),
        ({"ensure_weight_tying": True}, "not supported yet: ensure_weight_tying=true"),
        ({"target_parameters": ["w"]}, "not supported yet: target_parameters"),
        ({"fan_in_fan_out": True}, "not supported yet: fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, "not supported yet: alora_invocation_tokens"),
        ({"use_qalora": True, "arrow_config": {"a": 1}}, "arrow_config"),
        ({"warp_speed": 9}, "unknown settings: warp_speed=9"),
    ],
)
def test_configs_we_cannot_honour_are_errors(tmp_path, values, part):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(folder, **values)
    with pytest.raises(UserError) as error:
        load_adapter(folder, base)
    assert_one_line(error, folder, part)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    folder, base = copy_golden("qv", tmp_path)
    edit_config(
        folder,
        peft_version="0.9.0",
        revision="main",
        inference_mode=False,
        warp_speed=None,
        modules_to_save=[],
        init_lora_weights="gaussian",
        target_modules=["q_proj", "v_proj", "c_attn"],
    )
    assert_same_adapter(load_adapter(folder, base), load_adapter(golden("qv")[0], base))


@pytest.mark.parametrize(
    ("settings", "selected"),
    [
        ({"targets": ("0.self_attn.q_proj",)}, {0}),
        ({"targets": ("q_proj",), "layers": (1,)}, {1}),
        ({"targets": ("q_proj",), "layers": (1,), "layers_pattern": ("layers",)}, {1}),
        ({"targets": ("q_proj",), "layers": (1,), "layers_pattern": ("h",)}, set()),
        ({"targets": ("model.layers.2.self_attn.q_proj", "q_proj"), "layers": (0,)}, {0, 2}),
        ({"targets": r".*\.[02]\..*q_proj"}, {0, 2}),
        ({"targets": "q_proj"}, set()),
        ({"targets": ("q_proj",), "exclude": r".*\.1\..*"}, {0, 2}),
        ({"targets": "ALL-LINEAR", "exclude": ("2.self_attn.q_proj",)}, {0, 1}),
    ],
)
def test_targets_select_what_peft_selects(settings, selected):
    """Expected sets by hand from PEFT's ``check_target_module_exists``."""
    selection = Selection(**settings)
    layers = {i for i in range(3) if selection.selects(f"model.layers.{i}.self_attn.q_proj")}
    assert layers == selected
