"""LoRA's patterns, layers, biases and saved modules: laws, and what PEFT's files say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from places import GOLDEN
from safetensors.numpy import load_file
from tiny_decoder import CONFIG, decoder, draw
from tiny_run import make_files, settings, training_lines

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.config.run_config import load_config
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh import layouts
from jaxpeft.methods.binding import bind, init_adapter
from jaxpeft.methods.lora.config import LoRA, config_of
from jaxpeft.methods.merging import head_is_frozen, merge
from jaxpeft.methods.peft.modules import modules_of
from jaxpeft.methods.registry import KINDS
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.adapters import load_adapter, save_adapter
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model
from jaxpeft.updates.lora_rules import lora_plus_groups

IDS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
BIASED = dataclasses.replace(CONFIG, qkv_bias=True)
UNTIED = dataclasses.replace(BIASED, tie_embeddings=False)
PARAMS = decoder(BIASED)[1]
PATTERNS = {
    "rank_pattern": {"down_proj": 4, "layers.1.self_attn.q_proj": 1},
    "alpha_pattern": {"0.mlp.down_proj": 7},
    "targets": ("q_proj", "down_proj"),
}


def new(params=PARAMS, **fields):
    method = LoRA(**{"rank": 2, "targets": ("q_proj", "v_proj"), **fields})
    return init_adapter(method, params, jax.random.key(0))


def trained(adapter, seed=1):
    return adapter.replace(
        params=jax.tree.map(jnp.add, adapter.params, draw(adapter.params, seed, 0.2))
    )


def logits(params, adapter=None, config=BIASED):
    return jax.jit(decoder(config)[0].apply)(bind(params, adapter), IDS)


def golden_base(name):
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / name)
    return Model(params, config, Transformer(config), tokenizer, fingerprint, name)


def numbers(adapter):
    """Rank and scale of every adapted module."""
    return {
        (name, path.rpartition("/")[2], key): float(array[at])
        for name, path, at in modules_of(adapter)
        for key, array in paths.get(adapter.buffers, path).items()
        if key in ("rank", "scale")
    }


# Ranks, alphas and layers.


@pytest.mark.parametrize(
    ("golden", "base", "fields"),
    [
        (
            "lora_patterns",
            "llama3",
            {
                "rank": 3,
                "alpha": 5,
                "rslora": True,
                "targets": ("q_proj", "up_proj", "down_proj", "model.layers.1.self_attn.v_proj"),
                "layers": (0, 2),
                "layers_pattern": "layers",
                "rank_pattern": {"q_proj": 2, "2.mlp.down_proj": 4, "down_proj": 1},
                "alpha_pattern": {"^model.layers.0.mlp.up_proj": 7, ".*v_proj": 2.5},
            },
        ),
        (
            "lora_bias",
            "llama_bias",
            {
                "rank": 2,
                "alpha": 3,
                "bias": "lora_only",
                "lora_bias": True,
                "targets": ("q_proj", "down_proj"),
                "layers": (0, 2),
            },
        ),
        (
            "lora_bias_all",
            "llama_bias",
            {
                "rank": 2,
                "alpha": 8,
                "bias": "all",
                "lora_bias": True,
                "targets": ("q_proj", "up_proj", "down_proj"),
                "save_modules": ("up_proj", "norm"),
                "rank_pattern": {"0.self_attn.q_proj": 3},
            },
        ),
    ],
)
def test_a_config_means_what_the_same_config_of_peft_means(golden, base, fields):
    base = golden_base(base)
    theirs = load_adapter(GOLDEN / "methods" / golden, base)
    ours = init_adapter(LoRA(**fields), base, jax.random.key(0))
    assert ours.spec == theirs.spec
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6)
    assert jax.tree.map(jnp.shape, ours.params) == jax.tree.map(jnp.shape, theirs.params)


@pytest.mark.slow
def test_mixed_ranks_train_like_separate_adapters_of_those_ranks():
    mixed = trained(new(**PATTERNS, alpha=3.0))
    leaves = jax.tree.map(np.array, paths.flatten(mixed.params))
    for name, path, at in modules_of(mixed):  # training starts with zeros beyond the rank
        rank = int(paths.get(mixed.buffers, f"{path}/rank")[at])
        leaves[f"{path}/a"][at][:, rank:] = 0
        leaves[f"{path}/b"][at][rank:] = 0
        assert name.endswith(PATTERNS["targets"])
    mixed = mixed.replace(params=jax.tree.map(jnp.asarray, paths.unflatten(leaves)))
    parts = {  # what each module has, written out: rank and alpha
        "model.layers.0.self_attn.q_proj": (2, 3.0),
        "model.layers.1.self_attn.q_proj": (1, 3.0),
        "model.layers.0.mlp.down_proj": (4, 7.0),
        "model.layers.1.mlp.down_proj": (4, 3.0),
    }
    several = []
    for name, (rank, alpha) in parts.items():
        one = init_adapter(LoRA(rank=rank, alpha=alpha, targets=(name,)), PARAMS, jax.random.key(0))
        _, path, at = next(modules_of(one))
        a, b = (leaves[f"{path}/{k}"][at] for k in "ab")
        place = {k: np.zeros(v.shape, np.float32) for k, v in paths.get(one.params, path).items()}
        place["a"][at], place["b"][at] = a[:, :rank], b[:rank]
        several.append(one.replace(params=paths.unflatten({path: jax.tree.map(jnp.array, place)})))
    tx = optax.adamw(0.05, weight_decay=0.1)

    def train(trees, adapters):
        @jax.jit
        def step(trees, state):
            def loss(trees):
                put = [one.replace(params=p) for one, p in zip(adapters, trees, strict=True)]
                return jnp.square(decoder(BIASED)[0].apply(bind(PARAMS, put), IDS)).mean()

            updates, state = tx.update(jax.grad(loss)(trees), state, trees)
            return optax.apply_updates(trees, updates), state

        state = tx.init(trees)
        for _ in range(3):
            trees, state = step(trees, state)
        return trees

    together = train([mixed.params], [mixed])[0]
    apart = train([one.params for one in several], several)
    for one, params, rank in zip(several, apart, (2, 1, 4, 4), strict=True):
        _, path, at = next(modules_of(one))
        wide, narrow = paths.get(together, path), paths.get(params, path)
        np.testing.assert_allclose(wide["a"][at][:, :rank], narrow["a"][at], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(wide["b"][at][:rank], narrow["b"][at], rtol=1e-4, atol=1e-5)
        assert not wide["a"][at][:, rank:].any()
        assert not wide["b"][at][rank:].any()


@pytest.mark.parametrize("start", ["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"])
def test_every_start_follows_the_patterns(start):
    ranks = {"down_proj": 4, "layers.1.self_attn.q_proj": 6}
    adapter = new(**{**PATTERNS, "rank_pattern": ranks}, alpha=3.0, init_weights=start, rslora=True)
    alphas = {"model.layers.0.mlp.down_proj": 7.0}
    for name, path, at in modules_of(adapter):
        rank = 4 if "down" in name else 6 if ".1." in name else 2
        scale = alphas.get(name, 3.0) / rank**0.5
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{k}")[at], np.float64) for k in "ab")
        assert not a[:, rank:].any()
        assert not b[rank:].any()
        assert a[:, :rank].any(axis=0).all()
        if start == "pissa":
            u, s, vt = np.linalg.svd(np.asarray(paths.get(PARAMS, path)[at], np.float64))
            best = u[:, :rank] * s[:rank] @ vt[:rank]
            np.testing.assert_allclose(scale * a @ b, best, rtol=1e-4, atol=1e-5)
    if start != "loftq":
        np.testing.assert_allclose(logits(PARAMS, adapter), logits(PARAMS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_the_config_of_mixed_ranks_is_rebuilt(dora):
    adapter = new(**PATTERNS, alpha=3.0, dropout=0.1, rslora=True, dora=dora)
    again = config_of(adapter)
    assert (again.rank, again.alpha) == (4, 3.0)
    rebuilt = init_adapter(again, PARAMS, jax.random.key(0))
    assert rebuilt.spec == adapter.spec
    jax.tree.map(np.testing.assert_array_equal, rebuilt.buffers, adapter.buffers)


# Biases and saved modules.


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "lora_only", "lora_bias": True},
        {"bias": "all", "lora_bias": True, "save_modules": ("norm", "layers.1.mlp", "v_proj")},
        {"save_modules": ("lm_head",)},
        {"save_modules": ("embed_tokens",)},
        {"save_modules": ("embed_tokens", "lm_head"), "dora": True},
    ],
    ids=lambda fields: "+".join(fields),
)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_bound(fields, tied):
    config = BIASED if tied else UNTIED
    params = decoder(config)[1]
    adapter = trained(new(params, **fields))
    merged = merge(params, adapter)
    bound = logits(params, adapter, config)
    np.testing.assert_allclose(logits(merged, None, config), bound, rtol=1e-4, atol=1e-4)
    assert np.abs(bound - logits(params, None, config)).max() > 0.1
    apart = "save_modules" in fields and {"embed_tokens", "lm_head"} & {*fields["save_modules"]}
    assert (paths.get(merged, paths.HEAD) is not None) == (bool(apart) or not tied)


def test_a_saved_table_of_a_tied_model_leaves_the_head_and_a_saved_head_the_table():
    value = draw(PARAMS["embed_tokens"], seed=3, scale=1.0)["embedding"]
    table, head = new(save_modules=("embed_tokens",)), new(save_modules=("lm_head",))
    untied = {**PARAMS, "lm_head": {"kernel": PARAMS["embed_tokens"]["embedding"].T}}
    table = table.replace(params=paths.put(table.params, {f"{paths.EMBEDDING}/value": value}))
    expected = logits(paths.put(untied, {paths.EMBEDDING: value}))
    np.testing.assert_allclose(logits(PARAMS, table), expected, rtol=1e-5, atol=1e-5)
    head = head.replace(params=paths.put(head.params, {f"{paths.HEAD}/value": value.T}))
    expected = logits(paths.put(untied, {paths.HEAD: value.T}))
    np.testing.assert_allclose(logits(PARAMS, head), expected, rtol=1e-5, atol=1e-5)
    assert head_is_frozen(PARAMS, table)
    assert not head_is_frozen(PARAMS, head)
    untied_table = new(untied, save_modules=("embed_tokens",))
    assert head_is_frozen(untied, untied_table)


def test_saved_modules_are_not_adapted_and_start_as_the_base():
    adapter = new(save_modules=("self_attn.q_proj", "model.norm"), bias="lora_only")
    attention = [f"model.layers.{i}.self_attn." for i in range(2)]
    assert {(name, path.rpartition("/")[2]) for name, path, _ in modules_of(adapter)} == {
        ("model.norm", "scale"),
        *((at + "q_proj", leaf) for at in attention for leaf in ("kernel", "bias")),
        *((at + "v_proj", leaf) for at in attention for leaf in ("kernel", "bias")),
    }
    assert set(paths.get(adapter.params, "layers/self_attn/q_proj/kernel")) == {"value"}
    assert set(paths.get(adapter.params, "layers/self_attn/v_proj/kernel")) == {"a", "b"}
    np.testing.assert_array_equal(logits(PARAMS, adapter), logits(PARAMS))


def test_the_bias_of_b_counts_times_the_scale_and_needs_a_bias_to_merge_into():
    adapter = new(lora_bias=True, alpha=6.0, targets=("q_proj",))
    path = "layers/self_attn/q_proj/kernel"
    bias = draw({"x": jax.ShapeDtypeStruct((2, 32), jnp.float32)}, 4, 1.0)["x"]
    moved = adapter.replace(params=paths.put(adapter.params, {f"{path}/bias": bias}))
    place = "layers/self_attn/q_proj/bias"
    expected = logits(paths.put(PARAMS, {place: paths.get(PARAMS, place) + 3.0 * bias}))
    np.testing.assert_allclose(logits(PARAMS, moved), expected, rtol=1e-5, atol=1e-5)
    free = trained(new(lora_bias=True, targets=("down_proj",)))
    with pytest.raises(UserError, match=r"down_proj.*merged into a module without a bias"):
        merge(PARAMS, free)


def test_sums_of_adapters_with_whole_modules_are_refused():
    adapter = trained(new(bias="lora_only"))
    with pytest.raises(UserError, match="trained biases or tokens, or saved modules has no factor"):
        bind(PARAMS, [adapter], weights=[0.5])
    with pytest.raises(UserError, match="is no sum of products"):
        jp.combine([adapter], [1.0])
    with pytest.raises(UserError, match="with more than factors needs rank= or energy="):
        jp.to_lora(adapter, PARAMS)
    with pytest.raises(UserError, match="cannot differ from row to row"):
        bind(PARAMS, jp.stack_adapters([adapter, adapter]), index=jnp.array([0, 1]))


def test_a_table_of_ones_own_differs_from_row_to_row():
    one, other = (trained(new(save_modules=("embed_tokens",)), seed) for seed in (1, 2))
    variables = bind(PARAMS, jp.stack_adapters([one, other]), index=jnp.array([1, -1, 0]))
    mixed = jax.jit(decoder(BIASED)[0].apply)(variables, jnp.tile(IDS, (3, 1)))
    for row, adapter in zip(mixed, (other, None, one), strict=True):
        np.testing.assert_allclose(row, logits(PARAMS, adapter)[0], rtol=1e-4, atol=1e-4)


def test_lora_plus_puts_new_leaves_into_the_groups_of_peft():
    modules = ("embed_tokens", "lm_head", "norm")
    adapter = new(save_modules=modules, bias="lora_only", lora_bias=True, targets=("q_proj",))
    groups = paths.flatten(lora_plus_groups({"adapter": adapter.params}, KINDS["lora"].arrays))
    q = "adapter/layers/self_attn/q_proj/"
    assert groups == {
        "adapter/embed_tokens/embedding/value": "a",
        "adapter/lm_head/kernel/value": "a",
        "adapter/norm/scale/value": "b",
        q + "kernel/a": "a",
        q + "kernel/b": "b",
        q + "kernel/bias": "b_no_decay",
        q + "bias/value": "b_no_decay",
    }


def test_a_loose_name_of_peft_saves_what_it_meant_there(tmp_path):
    """PEFT's "norm" is every module whose name ends so."""
    base = golden_base("llama3")
    norms = ("input_layernorm", "post_attention_layernorm", "model.norm")
    adapter = trained(init_adapter(LoRA(rank=2, save_modules=norms), base, jax.random.key(0)))
    save_adapter(tmp_path / "out", adapter, base)
    file = tmp_path / "out" / "adapter_config.json"
    values = json.loads(file.read_text())
    assert values["modules_to_save"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    (tmp_path / "out" / "jaxpeft.json").unlink()
    file.write_text(json.dumps(values | {"modules_to_save": ["norm"]}))
    again = load_adapter(tmp_path / "out", base)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, r"LoRA.rank_pattern values must be whole numbers"),
        ({"rank_pattern": {"(": 2}}, r"LoRA.rank_pattern: '\(' is not a valid regex"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "LoRA.alpha_pattern values must be finite"),
        ({"layers": (-1,)}, "LoRA.layers must be whole numbers"),
        ({"layers": (0,), "targets": ".*q_proj"}, "LoRA.layers must be empty with a regex"),
        ({"layers_pattern": "layers"}, "LoRA.layers_pattern must be empty without layers"),
        ({"init_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, "LoRA.rank must be even"),
        ({"bias": "some"}, "LoRA.bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"lora_bias": True, "dora": True}, "LoRA.lora_bias must be false with dora"),
        ({"lora_bias": True, "init_weights": "pissa"}, "LoRA.lora_bias must be false with init"),
        ({"save_modules": ""}, "LoRA.save_modules must be names of modules"),
    ],
)
def test_nonsense_in_the_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank_pattern": {"q_prj": 3}},
            "rank_pattern: 'q_prj' matches no .*names: q_proj",
        ),
        ({"rank_pattern": {"k_proj": 3}}, "rank_pattern: 'k_proj' matches no adapted module"),
        ({"alpha_pattern": {"v_prj": 3}}, "alpha_pattern: 'v_prj' matches no .*names: v_proj"),
        ({"rank_pattern": {"v_proj": 17}}, r"LoRA.rank_pattern 17 exceeds .*v_proj.*at most 16"),
        ({"layers": (1, 2)}, "LoRA.layers: the model has no layer 2; its layers are 0 to 1"),
        ({"layers": 1, "layers_pattern": "h"}, "layers_pattern: 'h' is the name of no list"),
        ({"layers": 1, "targets": ("0.mlp.up_proj",)}, r"LoRA.layers \(1,\) hold no module"),
        ({"save_modules": ("lm_hed",)}, "save_modules: 'lm_hed' is no module.*names: lm_head"),
        ({"save_modules": ("proj",)}, "save_modules: 'proj' is no module of this model"),
        ({"save_modules": ("layers.1.self_attn.q_proj",)}, "q_proj/kernel: some of its layers are"),
        ({"save_modules": ("self_attn",)}, "every module of targets is saved whole"),
        ({"bias": "lora_only", "targets": ("up_proj",)}, "LoRA.bias 'lora_only': no adapted mod"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message) as error:
        new(**fields)
    assert "\n" not in str(error.value)


def test_biases_of_a_model_without_any_and_shapes_are_refused():
    with pytest.raises(UserError, match=r"LoRA.bias 'all': this model has no biases"):
        new(decoder()[1], bias="all")
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(UserError, match="start from the base's values; pass parameters"):
        new(shapes, save_modules=("norm",))


# A run.


def test_a_run_from_yaml_trains_and_saves_all_of_it(tmp_path):
    files = make_files(tmp_path)
    method = {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"0.mlp.down_proj": 3.5},
        "layers": [0, 1],
        "save_modules": ["lm_head", "norm"],
    }
    train = {"steps": 2}
    config = settings(files, tmp_path / "run", method=method, train=train)
    config |= {"evaluation": None, "data": {**config["data"], "eval": None}}
    place = tmp_path / "run.yaml"
    place.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        mesh = layouts.make_mesh(devices=jax.devices()[:1])
        patch.setattr(layouts, "make_mesh", lambda **sizes: mesh)
        program.main([str(place)])
    assert load_config(str(tmp_path / "run" / "config.yaml")).method.rank_pattern == {"q_proj": 2}
    assert len(training_lines(tmp_path / "run")) == 2
    base = jp.load_model(str(files.model))
    adapter = jp.load_adapter(str(tmp_path / "run"), base)
    again = config_of(adapter)
    assert again.save_modules == ("lm_head", "model.norm")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = saved["base_model.model.lm_head.weight"]
    assert (head != np.asarray(paths.get(base.params, paths.HEAD)).T).any()
    assert saved["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape[0] == 2
