"""The decoder against a float64 NumPy forward pass, and the laws of packing, cache and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder, make_adapter

from jaxpeft.core import paths
from jaxpeft.methods.binding import bind
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.merging import merge
from jaxpeft.models.cache import init_cache

RICH = dataclasses.replace(
    CONFIG,
    tie_embeddings=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    windows=(3, 0),
)
CONFIGS = {
    "llama": CONFIG,
    "windows": dataclasses.replace(CONFIG, windows=(3, 0)),
    "everything": RICH,
    "one group": dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=6, d_model=20),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 10))


def apply(config, params, ids, remat="none", **kwargs):
    module, _ = decoder(config, remat)
    run = jax.jit(lambda p, ids, kw: module.apply({"params": p}, ids, **kw))
    return run(params, jnp.asarray(ids), {k: jnp.asarray(v) for k, v in kwargs.items()})


def reference(c, params, ids):
    """Logits of one row: Llama 2, section 2.2, with the variants of Mistral and Qwen."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = np.arange(len(ids))
    half = c.head_dim // 2
    turn = positions[:, None] * c.rope_theta ** (-np.arange(half) / half)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_eps) * scale

    def rotate(x):
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = p["embed_tokens"]["embedding"][ids]
    for layer in range(c.num_layers):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], p["layers"])

        def linear(x, module):
            return x @ module["kernel"] + module.get("bias", 0.0)

        attn, h = w["self_attn"], norm(x, w["input_layernorm"]["scale"])
        q = linear(h, attn["q_proj"]).reshape(len(ids), c.num_heads, c.head_dim)
        k = linear(h, attn["k_proj"]).reshape(len(ids), c.num_kv_heads, c.head_dim)
        v = linear(h, attn["v_proj"]).reshape(len(ids), c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = norm(q, attn["q_norm"]["scale"]), norm(k, attn["k_norm"]["scale"])
        q, k = rotate(q), rotate(k)
        out = np.zeros_like(q)
        for i, head in np.ndindex(q.shape[:2]):
            window = c.windows[layer] if c.windows else 0
            seen = slice(max(0, i - window + 1) if window else 0, i + 1)
            kv = head * c.num_kv_heads // c.num_heads
            scores = np.exp(k[seen, kv] @ q[i, head] / np.sqrt(c.head_dim))
            out[i, head] = scores / scores.sum() @ v[seen, kv]
        x = x + linear(out.reshape(len(ids), -1), attn["o_proj"])
        h, mlp = norm(x, w["post_attention_layernorm"]["scale"]), w["mlp"]
        gate = linear(h, mlp["gate_proj"])
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, mlp["up_proj"]), mlp["down_proj"])
    x = norm(x, p["norm"]["scale"])
    return x @ (p["embed_tokens"]["embedding"].T if c.tie_embeddings else p["lm_head"]["kernel"])


@every_config
def test_logits_equal_a_float64_forward_pass(config):
    _, params = decoder(config)
    actual = apply(config, params, IDS)
    assert actual.dtype == jnp.float32
    for row, ids in enumerate(IDS):
        np.testing.assert_allclose(
            actual[row], reference(config, params, ids), rtol=1e-4, atol=1e-4
        )


def test_adapted_logits_equal_a_float64_forward_pass_with_the_sum():
    module, params = decoder(RICH)
    adapter = make_adapter(LoRA(rank=2), RICH, trained=True)
    actual = jax.jit(module.apply)(bind(params, adapter), jnp.asarray(IDS))
    expected = reference(RICH, merge(params, adapter), IDS[0])
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [True, False], ids=["restarting", "running on"])
def test_packed_rows_give_the_logits_of_unpacked_rows(positions):
    """Rotary scores depend on distances: positions may restart or run on."""
    _, params = decoder(RICH)
    first, second = IDS[0, :6], IDS[1, :3]
    row = np.concatenate([first, second, [0]])[None]
    given = {"segment_ids": np.int32([[1] * 6 + [2] * 3 + [0]])}
    if positions:
        given["positions"] = np.int32([[*range(6), *range(3), 0]])
    packed = apply(RICH, params, row, **given)[0]
    np.testing.assert_allclose(packed[:6], reference(RICH, params, first), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[6:9], reference(RICH, params, second), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, RICH], ids=["llama", "everything"])
def test_cached_steps_give_the_logits_of_one_pass(config):
    """Rows of length 6 and 3 are read at once, padded, then three tokens one by one."""
    module, params = decoder(config)
    run = jax.jit(lambda ids, **kw: module.apply({"params": params}, ids, **kw))
    lengths, seq = np.array([6, 3]), 6
    inside = np.arange(seq) < lengths[:, None]
    cache = init_cache(config, batch=2, slots=12, dtype=jnp.float32)
    logits, cache = run(
        jnp.asarray(np.where(inside, IDS[:, :seq], 0)),
        segment_ids=jnp.asarray(inside, jnp.int32),
        positions=jnp.asarray(np.where(inside, np.arange(seq), 0), jnp.int32),
        cache=cache,
    )
    seen = [[logits[row, : lengths[row]]] for row in range(2)]
    for step in range(3):
        at = lengths + step
        ids = jnp.asarray(IDS[np.arange(2), at][:, None])
        logits, cache = run(ids, positions=jnp.asarray(at[:, None]), cache=cache)
        for row in range(2):
            seen[row].append(logits[row])
    assert int(cache.used) == seq + 3
    for row in range(2):
        expected = reference(config, params, IDS[row, : lengths[row] + 3])
        np.testing.assert_allclose(np.concatenate(seen[row]), expected, rtol=1e-4, atol=1e-4)


def test_positions_go_on_where_the_cache_ends():
    module, params = decoder(CONFIG)
    run = jax.jit(lambda ids, cache: module.apply({"params": params}, ids, cache=cache))
    first, cache = run(jnp.asarray(IDS[:, :7]), init_cache(CONFIG, 2, 10, jnp.float32))
    second, _ = run(jnp.asarray(IDS[:, 7:]), cache)
    expected = reference(CONFIG, params, IDS[0])
    actual = np.concatenate([first[0], second[0]])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@functools.cache
def adapter_gradient(remat):
    module, params = decoder(CONFIG, remat)
    adapter = make_adapter(trained=True)

    @jax.jit
    @jax.value_and_grad
    def value(factors):
        variables = bind(params, adapter.replace(params=factors))
        return jnp.square(module.apply(variables, jnp.asarray(IDS))).mean()

    return value(adapter.params)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialised_layers_have_the_same_gradients(remat):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7),
        adapter_gradient(remat),
        adapter_gradient("none"),
    )


def test_rematerialised_layers_keep_less_for_the_backward_pass():
    def kept(remat):
        module, params = decoder(CONFIG, remat)
        ids = jnp.zeros((4, 64), jnp.int32)

        def run(params):
            return jax.vjp(lambda p: module.apply({"params": p}, ids, return_hidden=True), params)

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run, params)[1]))

    assert kept("full") < 0.3 * kept("none")
    assert kept("full") < kept("dots") < kept("none")


def test_hidden_states_times_the_head_are_the_logits():
    module, params = decoder(CONFIG)
    hidden = jax.jit(module.apply, static_argnames="return_hidden")(
        {"params": params}, jnp.asarray(IDS), return_hidden=True
    )
    table = params["embed_tokens"]["embedding"]
    np.testing.assert_allclose(
        np.asarray(hidden) @ np.asarray(table).T, apply(CONFIG, params, IDS), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_activations_stay_near_the_float32_logits():
    module, params = decoder(CONFIG, dtype=jnp.bfloat16)
    actual = jax.jit(module.apply)({"params": params}, jnp.asarray(IDS))
    expected = reference(CONFIG, params, IDS[0])
    assert actual.dtype == jnp.float32
    assert np.abs(actual[0] - expected).max() < 0.05 * np.abs(expected).max()


def test_the_parameters_are_named_like_the_modules_of_hugging_face():
    assert {path: leaf.shape for path, leaf in paths.flatten(decoder(RICH)[1]).items()} == {
        "embed_tokens/embedding": (48, 16),
        "layers/input_layernorm/scale": (2, 16),
        "layers/self_attn/q_proj/kernel": (2, 16, 32),
        "layers/self_attn/q_proj/bias": (2, 32),
        "layers/self_attn/k_proj/kernel": (2, 16, 16),
        "layers/self_attn/k_proj/bias": (2, 16),
        "layers/self_attn/v_proj/kernel": (2, 16, 16),
        "layers/self_attn/v_proj/bias": (2, 16),
        "layers/self_attn/o_proj/kernel": (2, 32, 16),
        "layers/self_attn/o_proj/bias": (2, 16),
        "layers/self_attn/q_norm/scale": (2, 8),
        "layers/self_attn/k_norm/scale": (2, 8),
        "layers/post_attention_layernorm/scale": (2, 16),
        "layers/mlp/gate_proj/kernel": (2, 16, 24),
        "layers/mlp/gate_proj/bias": (2, 24),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/mlp/up_proj/bias": (2, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
        "layers/mlp/down_proj/bias": (2, 16),
        "norm/scale": (16,),
        "lm_head/kernel": (16, 48),
    }


def test_a_weight_of_another_shape_is_refused_by_name():
    _, params = decoder(CONFIG)
    wrong = {**params, "norm": {"scale": jnp.ones(17)}}
    with pytest.raises(ValueError, match=r"norm/scale has shape \(17,\), the config asks for"):
        apply(CONFIG, wrong, IDS)
