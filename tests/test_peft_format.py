"""PEFT folders: those HF PEFT wrote give PEFT's logits; what we write says the same; faults.

The golden folders and logits were made with torch and PEFT by ``scripts/make_golden.py``.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft import paths
from jaxpeft.errors import ResourceError, UserError
from jaxpeft.methods import Full, LoRA, init_adapter, lora_peft_config, merge
from jaxpeft.methods.exchange import Values
from jaxpeft.methods.lora import config_of
from jaxpeft.methods.lora_nodes import LoRAKernel
from jaxpeft.methods.selection import Selection
from jaxpeft.model import Model
from jaxpeft.models.load import load_params
from jaxpeft.models.transformer import Transformer
from jaxpeft.peft_format import load_adapter, save_adapter

GOLDEN = pathlib.Path(__file__).parent / "golden"
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
    mask = jnp.asarray(expected["attention_mask"])
    logits = base(jnp.asarray(expected["input_ids"]), adapter=adapter, segment_ids=mask)
    return np.asarray(logits)[expected["attention_mask"].astype(bool)]


def assert_one_line(error, *parts):
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


# Adapters that PEFT wrote.


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
    merged = np.asarray(kernel.materialise().T)
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


def saved(tmp_path, name="qv"):
    folder, base = golden(name)
    save_adapter(tmp_path / "out", load_adapter(folder, base), base)
    return tmp_path / "out", base


def test_another_base_is_an_error_that_names_both(tmp_path):
    folder, base = saved(tmp_path)
    other = base.replace(fingerprint="f" * 64, name="other/model")
    with pytest.raises(UserError) as error:
        load_adapter(folder, other)
    assert_one_line(
        error, "llama3", base.fingerprint[:12], "other/model", "ffff", "allow_other_base"
    )
    adapter = load_adapter(folder, other, allow_other_base=True)
    assert_same_adapter(adapter, load_adapter(folder, base))


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
        ({"r": 10**9}, "(r = 1000000000)"),
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
        ({"init_lora_weights": "pissa"}, "changes the base model"),
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
