"""IA3's vectors against float64 NumPy, and which modules they scale on which side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.binding import bind, check_fit
from jaxpeft.methods.kernels.ia3 import IA3, IA3Kernel, feedforward_paths, write
from jaxpeft.ops.linear import materialize

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 5, 6)), RNG.normal(size=(6, 4))
DOWN = "layers/mlp/down_proj/kernel"


def make(**values):
    return IA3(**values).init(decoder(CONFIG)[1], jax.random.key(0))


@pytest.mark.parametrize("feedforward", [True, False])
def test_a_vector_scales_inputs_or_outputs(feedforward):
    scale = RNG.normal(size=6 if feedforward else 4)
    expected = (X * scale) @ W if feedforward else scale * (X @ W)
    as_float = [jnp.asarray(v, jnp.float32) for v in (X, W, scale)]
    node = IA3Kernel(*as_float[1:], jnp.int32(1), feedforward=feedforward)
    np.testing.assert_allclose(jax.jit(node.multiply)(as_float[0]), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(X @ np.asarray(materialize(node)), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_behind_a_scaled_output_is_scaled_and_one_behind_a_scaled_input_is_not():
    config = dataclasses.replace(CONFIG, qkv_bias=True, mlp_bias=True)
    params = decoder(config)[1]
    adapter = IA3(targets=("k_proj", "down_proj")).init(params, jax.random.key(0))
    adapter = adapter.replace(params=jax.tree.map(lambda v: 3.0 * v, adapter.params))
    bound = bind(params, adapter)["params"]
    key, down = "layers/self_attn/k_proj/bias", "layers/mlp/down_proj/bias"
    np.testing.assert_allclose(paths.get(bound, key), 3.0 * paths.get(params, key))
    assert paths.get(bound, down) is paths.get(params, down)


def test_layers_that_are_not_adapted_keep_their_bias_and_kernel():
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    params = decoder(config)[1]
    method = IA3(targets=("layers.1.self_attn.k_proj",), feedforward=())
    adapter = method.init(params, jax.random.key(0))
    merged = jp.merge(params, adapter.replace(params=jax.tree.map(lambda v: 5 * v, adapter.params)))
    for leaf in ("kernel", "bias"):
        before = paths.get(params, f"layers/self_attn/k_proj/{leaf}")
        after = paths.get(merged, f"layers/self_attn/k_proj/{leaf}")
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_allclose(after[1], 5 * before[1], rtol=1e-6)


def test_defaults_are_those_of_peft_for_llama():
    adapter = make()
    assert adapter.spec.paths == (
        DOWN,
        "layers/self_attn/k_proj/kernel",
        "layers/self_attn/v_proj/kernel",
    )
    assert dict(adapter.spec.options) == {"feedforward": (DOWN,)}
    assert paths.get(adapter.params, f"{DOWN}/l").shape == (CONFIG.num_layers, CONFIG.d_ff)


def test_a_new_adapter_is_the_base_to_the_last_bit_also_in_half_precision():
    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    node = IA3Kernel(w, jnp.ones(4), jnp.int32(1))
    np.testing.assert_array_equal(jax.jit(node.multiply)(x), jax.jit(jnp.matmul)(x, w))


def test_feedforward_modules_are_written_as_a_part_of_the_targets():
    """PEFT refuses other lists; the targets are full names where some layers are left out."""
    adapter = make(targets=("k_proj", "layers.1.mlp.down_proj"))
    values, tensors = write(adapter, jp.Model(decoder(CONFIG)[1], CONFIG, decoder(CONFIG)[0]))
    assert values["feedforward_modules"] == ["model.layers.1.mlp.down_proj"]
    assert set(values["feedforward_modules"]) < set(values["target_modules"])
    shapes = {key.rpartition("layers.")[2]: value.shape for key, value in tensors.items()}
    kv = CONFIG.num_kv_heads * CONFIG.head_dim
    assert shapes == {
        "0.self_attn.k_proj.ia3_l": (kv, 1),
        "1.self_attn.k_proj.ia3_l": (kv, 1),
        "1.mlp.down_proj.ia3_l": (1, CONFIG.d_ff),
    }


def test_a_feedforward_module_that_is_no_target_is_refused():
    with pytest.raises(jp.UserError, match=r"'down_proj',\) matches none of the targets"):
        make(targets=("k_proj",))


def test_a_module_on_both_sides_in_different_layers_is_refused():
    sites = paths.module_names(decoder(CONFIG)[1])
    down = {name: site for name, site in sites.items() if site.path == DOWN}
    with pytest.raises(jp.UserError, match="the same side"):
        feedforward_paths(down, {"model.layers.0.mlp.down_proj"}, "here")


def test_an_adapter_of_another_width_is_refused():
    wide = dataclasses.replace(CONFIG, d_ff=32)
    with pytest.raises(jp.UserError, match="belongs to another model"):
        check_fit(decoder(wide)[1], make())
