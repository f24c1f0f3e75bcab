"""Prefixes: the law that one from a prompt is that prompt, the projection, and what is refused.

Attention to trained prefixes is compared with HF PEFT in ``test_golden_methods.py``, their
gradients with finite differences in ``test_methods.py``.
"""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from places import GOLDEN
from tiny_decoder import CONFIG, WINDOWED, apply, decoder, draw, make_batch
from tiny_run import make_files, training_lines, write_config
from toy_tokenizer import VOCAB_SIZE, toy_tokenizer

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.methods.binding import bind
from jaxpeft.methods.method import Context
from jaxpeft.methods.prompts.prefix import PrefixTuning, prefix_from_prompt, project
from jaxpeft.models.attention import Prefix, attention
from jaxpeft.models.cache import init_cache
from jaxpeft.pretrained.load import load_model
from jaxpeft.pretrained.model import Model
from jaxpeft.updates.losses import make_lm_loss

IDS = [7, 3, 40, 11, 5]
N = len(IDS)
both_configs = pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["llama", "windows"])


def model(config=CONFIG, remat="none", dtype=jnp.float32):
    module, params = decoder(config, remat, dtype)
    return Model(params, config, module, name="tiny")


def drawn(method, seed=0):
    adapter = method.init(decoder()[1], jax.random.key(0), Context(config=CONFIG))
    return adapter.replace(params=draw(adapter.params, seed, 0.5))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@both_configs
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_prefix_from_a_prompt_gives_the_logits_behind_that_prompt(config, remat):
    base = model(config, remat)
    tokens = np.asarray(make_batch(2, 9)["tokens"])
    expected = base(np.concatenate([np.tile(IDS, (2, 1)), tokens], axis=1))[:, N:]
    assert_close(base(tokens, adapter=prefix_from_prompt(base, IDS)), expected)
    assert np.abs(base(tokens) - expected).max() > 0.1


def test_the_law_holds_for_more_queries_than_one_block():
    base, tokens = model(), np.asarray(make_batch(1, 150)["tokens"])
    expected = base(np.concatenate([[IDS], tokens], axis=1))[:, N:]
    assert_close(base(tokens, adapter=prefix_from_prompt(base, IDS)), expected)


@both_configs
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no positions"])
def test_every_packed_segment_sees_the_prefix(config, given):
    base = model(config)
    adapter = prefix_from_prompt(base, IDS)
    tokens = np.asarray(make_batch(1, 9)["tokens"])
    segments, positions = [[1, 1, 1, 1, 2, 2, 2, 0, 0]], [[0, 1, 2, 3, 0, 1, 2, 0, 0]]
    packed = base(
        tokens,
        adapter=adapter,
        segment_ids=np.array(segments),
        positions=np.array(positions) if given else None,
    )
    assert np.isfinite(packed).all()
    for part in (slice(0, 4), slice(4, 7)):
        alone = base(np.concatenate([IDS, tokens[0, part]])[None])[0, N:]
        assert_close(packed[0, part], alone)


def test_generation_continues_as_behind_the_real_prompt():
    base = model()
    prompts = [[5, 6, 7], [9], [3, 4, 3, 4, 8]]
    adapter = prefix_from_prompt(base, IDS)
    actual = generate_ids(base, prompts, adapter=adapter, max_new_tokens=6)
    assert actual == generate_ids(base, [[*IDS, *ids] for ids in prompts], max_new_tokens=6)
    assert actual != generate_ids(base, prompts, max_new_tokens=6)


def test_cached_steps_give_the_logits_of_one_pass():
    base, adapter = model(WINDOWED), prefix_from_prompt(model(WINDOWED), IDS)
    tokens = make_batch(2, 8)["tokens"]
    variables, cache, seen = bind(base.params, adapter), init_cache(WINDOWED, 2, 8, jnp.float32), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 8)):
        logits, cache = apply(base.module, variables, tokens[:, part], cache=cache)
        seen.append(logits)
    assert_close(np.concatenate(seen, axis=1), base(tokens, adapter=adapter))


def test_a_prefix_counts_in_the_positions_of_a_model():
    base = dataclasses.replace(model(), config=dataclasses.replace(CONFIG, max_positions=8))
    generate_ids(base, [[5, 6, 7, 8]], max_new_tokens=4)
    adapter = prefix_from_prompt(model(), IDS)
    with pytest.raises(jp.UserError, match="5 virtual tokens, its 4 tokens"):
        generate_ids(base, [[5, 6, 7, 8]], adapter=adapter, max_new_tokens=4)


def test_a_prefix_stands_beside_a_lora():
    base = model()
    lora = jp.init_adapter(jp.LoRA(rank=2), base.params, jax.random.key(0))
    lora = dataclasses.replace(lora, params=draw(lora.params, seed=3, scale=0.2))
    merged = dataclasses.replace(base, params=jp.merge(base.params, lora))
    prefix, ids = drawn(PrefixTuning(num_tokens=2)), make_batch(2, 6)["tokens"]
    actual = apply(base.module, bind(base.params, [lora, prefix]), ids)
    np.testing.assert_allclose(actual, merged(ids, adapter=prefix), rtol=1e-4, atol=1e-5)


def test_rows_may_have_prefixes_of_their_own():
    base, tokens = model(), make_batch(2, 6)["tokens"]
    several = [drawn(PrefixTuning(num_tokens=3), seed) for seed in (1, 2)]
    k, v = (jnp.stack([a.params["prefix"][x] for a in several], axis=1) for x in "kv")
    variables = {"params": {**base.params, "prefix": Prefix(k, v)}}
    actual = apply(base.module, variables, tokens)
    for row, adapter in enumerate(several):
        assert_close(actual[row], base(tokens[row : row + 1], adapter=adapter)[0])


def test_attention_to_a_prefix_equals_float64_softmax_over_both():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, 1, 6)) for _ in range(3))
    first_k, first_v = (rng.standard_normal((3, 1, 6)) for _ in range(2))
    places, segments = jnp.array([[3, 4, 3, 0]]), jnp.array([[1, 1, 2, 0]])
    actual = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_positions=places,
        k_positions=places,
        q_segments=segments,
        k_segments=segments,
        prefix=Prefix(jnp.asarray(first_k), jnp.asarray(first_v)),
    )
    for query, keys in ((0, [0]), (1, [0, 1]), (2, [2])):
        all_k = np.concatenate([first_k[:, 0], k[0, keys, 0]])
        all_v = np.concatenate([first_v[:, 0], v[0, keys, 0]])
        weights = np.exp(all_k @ q[0, query, 0] / np.sqrt(6))
        assert_close(actual[0, query, 0], weights @ all_v / weights.sum())


def test_activations_in_bfloat16_stay_near_those_in_float32():
    adapter, ids = drawn(PrefixTuning(num_tokens=3)), np.asarray(make_batch(2, 6)["tokens"])
    expected = model()(ids, adapter=adapter)
    actual = model(dtype=jnp.bfloat16)(ids, adapter=adapter)
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


# Where it starts.


def test_a_text_starts_from_its_keys_and_values():
    config = dataclasses.replace(CONFIG, vocab_size=VOCAB_SIZE)
    base = dataclasses.replace(model(config), tokenizer=toy_tokenizer())
    method = PrefixTuning(num_tokens=4, initial="prompt", text="Sort it: ")
    adapter = jp.init_adapter(method, base, jax.random.key(0))
    expected = prefix_from_prompt(base, base.tokenizer("Sort")["input_ids"])
    jax.tree.map(np.testing.assert_array_equal, adapter.params, expected.params)
    assert adapter.spec == expected.spec
    context = Context(config=config, tokenizer=base.tokenizer)  # as a run's check has it
    shapes = jax.eval_shape(lambda p: method.init(p, jax.random.key(0), context), base.params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, adapter)


def test_plain_prefixes_start_standard_normal_or_zero():
    context = Context(config=CONFIG)
    random, zero = PrefixTuning(num_tokens=100), PrefixTuning(num_tokens=100, initial="zero")
    for method, spread in ((random, 1.0), (zero, 0.0)):
        params = method.init(decoder()[1], jax.random.key(0), context).params["prefix"]
        assert {key: x.shape for key, x in params.items()} == dict.fromkeys("kv", (2, 100, 2, 8))
        assert np.std(params["k"]) == pytest.approx(spread, abs=0.05)
    method = PrefixTuning(num_tokens=5, projection=True, initial="zero")
    params = method.init(decoder()[1], jax.random.key(0), context).params["prefix"]
    assert all((x == 0).all() for x in project(params))


# Projection.


def test_a_projection_equals_float64_numpy():
    """PEFT's layout: the last layer gives, layer by layer, the keys and then the values."""
    params = drawn(PrefixTuning(num_tokens=3, projection=True, hidden_size=6)).params["prefix"]
    p = {key: np.asarray(x, np.float64) for key, x in params.items()}
    hidden = np.tanh(p["embedding"] @ p["mlp_0_kernel"] + p["mlp_0_bias"])
    flat = hidden @ p["mlp_1_kernel"].reshape(6, -1) + p["mlp_1_bias"].reshape(-1)
    assert flat.shape == (3, 2 * 2 * 16)
    k, v = project(params)
    for layer in range(2):
        start = layer * 32
        assert_close(k[layer], flat[:, start : start + 16].reshape(3, 2, 8))
        assert_close(v[layer], flat[:, start + 16 : start + 32].reshape(3, 2, 8))


def test_every_array_of_a_projection_is_trained():
    adapter = drawn(PrefixTuning(num_tokens=3, projection=True, hidden_size=6))
    module, base = decoder()

    def loss(params):
        variables = bind(base, adapter.replace(params=params))
        logits: Any = module.apply(variables, make_batch(2, 6)["tokens"])
        return jnp.square(logits).mean()

    gradients = jax.jit(jax.grad(loss))(adapter.params)
    assert all((x != 0).any() for x in jax.tree.leaves(gradients))


def test_a_projection_is_saved_as_the_prefix_it_computes(tmp_path):
    base = model()
    adapter = drawn(PrefixTuning(num_tokens=3, projection=True, hidden_size=6))
    jp.save_adapter(tmp_path / "out", adapter, base)
    again = jp.load_adapter(tmp_path / "out", base)
    assert set(again.params["prefix"]) == {"k", "v"}
    ids = np.asarray(make_batch(2, 6)["tokens"])
    assert_close(base(ids, adapter=again), base(ids, adapter=adapter))


def golden_folder(tmp_path, **changes):
    folder = shutil.copytree(GOLDEN / "methods/prefix_tuning", tmp_path / "prefix")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder, load_model(GOLDEN / "models/llama3")


def test_a_folder_of_a_projected_prefix_gives_the_plain_one(tmp_path):
    folder, base = golden_folder(tmp_path, prefix_projection=True, encoder_hidden_size=6)
    expected = jp.load_adapter(GOLDEN / "methods/prefix_tuning", base)
    actual = jp.load_adapter(folder, base)
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


# Training.


def test_packed_gradients_equal_unpacked_ones():
    module, base = decoder()
    adapter, loss = drawn(PrefixTuning(num_tokens=3)), make_lm_loss(module, head_frozen=True)

    @jax.jit
    def gradient(batch):
        return jax.grad(lambda p: loss(base, adapter.replace(params=p), batch)[0])(adapter.params)

    rows = make_batch(2, 4)
    packed = {key: value.reshape(1, 8) for key, value in rows.items()}
    packed["segment_ids"] = jnp.array([[1] * 4 + [2] * 4])
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        gradient(packed),
        gradient(rows),
    )


def test_a_run_trains_a_prefix_from_a_text(tmp_path):
    files = make_files(tmp_path)
    method = {"name": "prefix_tuning", "num_tokens": 3, "initial": "prompt", "text": "Sort it"}
    changes = {"method": method, "optim": {"learning_rate": 0.1}}
    program.main([write_config(files, tmp_path / "run", **changes)])
    losses = [line["loss"] for line in training_lines(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]
    base = load_model(files.model)
    adapter = jp.load_adapter(tmp_path / "run", base)
    c = base.config
    numbers = 3 * 2 * c.num_layers * c.num_kv_heads * c.head_dim
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter.params)) == numbers


# What is refused.


def test_a_folder_for_other_heads_is_refused(tmp_path):
    folder, base = golden_folder(tmp_path, num_attention_heads=4)
    with pytest.raises(jp.UserError, match="num_attention_heads: this base has 2, got 4"):
        jp.load_adapter(folder, base)


def test_a_prefix_for_another_model_is_refused():
    adapter = drawn(PrefixTuning(num_tokens=3))
    for changes in ({"num_layers": 3}, {"head_dim": 4}):
        other = decoder(dataclasses.replace(CONFIG, **changes))[1]
        with pytest.raises(jp.UserError, match="made for 2 layers with keys of width 16, this"):
            bind(other, adapter)
    config = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=4)
    with pytest.raises(ValueError, match=r"prefix has heads \(2, 8\), the config asks for \(4, 4"):
        model(config)(np.array([[1, 2]]), adapter=adapter)


def test_two_prefixes_are_refused():
    one = drawn(PrefixTuning(num_tokens=3))
    with pytest.raises(jp.UserError, match="two prefixes cannot stand in front of one base"):
        bind(decoder()[1], [one, one])


def test_a_prefix_cannot_start_without_what_it_needs():
    key, params = jax.random.key(0), decoder()[1]
    with pytest.raises(jp.UserError, match="pass the model itself"):
        jp.init_adapter(PrefixTuning(), params, key)
    method = PrefixTuning(num_tokens=9, initial="prompt", text="Sort")
    with pytest.raises(jp.UserError, match="needs a tokenizer"):
        jp.init_adapter(method, model(), key)
    large = dataclasses.replace(
        model(dataclasses.replace(CONFIG, vocab_size=VOCAB_SIZE)), tokenizer=toy_tokenizer()
    )
    with pytest.raises(jp.UserError, match="has 4 tokens, num_tokens is 9; lower it"):
        jp.init_adapter(method, large, key)
    for ids, message in (([], "no tokens"), ([1, 48], "48 is outside the model")):
        with pytest.raises(jp.UserError, match=message):
            prefix_from_prompt(model(), ids)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"initial": "sampled"}, "initial"),
        ({"initial": "prompt"}, "text"),
        ({"text": "Sort"}, "text"),
        ({"initial": "prompt", "text": "Sort", "projection": True}, "projection"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match=rf"PrefixTuning\.{field} must be"):
        PrefixTuning(**values)
