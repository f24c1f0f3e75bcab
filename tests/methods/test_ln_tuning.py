"""LayerNorm tuning: which norms, what stays, and PEFT's choice of names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.binding import bind
from jaxpeft.methods.leaves.ln_tuning import LNTuning
from jaxpeft.methods.merging import merge

PARAMS = decoder(CONFIG)[1]


def start(**values):
    return LNTuning(**values).init(PARAMS, jax.random.key(0))


def test_by_default_the_two_norms_of_a_layer_and_the_last_one_are_trained():
    assert start().spec.paths == (
        "layers/input_layernorm/scale",
        "layers/post_attention_layernorm/scale",
        "norm/scale",
    )


def test_layers_that_are_not_chosen_follow_the_base():
    adapter = start(targets=("layers.1.input_layernorm",))
    place = "layers/input_layernorm/scale"
    np.testing.assert_array_equal(paths.get(adapter.buffers, f"{place}/rank"), [0, 1])
    base = paths.get(PARAMS, place)
    moved = adapter.replace(params=jax.tree.map(lambda x: x + 1.0, adapter.params))
    bound = paths.get(bind(PARAMS, moved)["params"], place)
    np.testing.assert_array_equal(bound, np.asarray(base) + np.float32([[0.0], [1.0]]))
    np.testing.assert_array_equal(paths.get(merge(PARAMS, moved), place), bound)


def test_scales_of_a_half_precision_base_are_trained_in_float32_and_merged_back():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapter = LNTuning().init(half, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.params)} == {jnp.dtype("float32")}
    assert paths.get(merge(half, adapter), "norm/scale").dtype == jnp.bfloat16


def test_a_target_that_is_no_norm_is_refused_by_name():
    with pytest.raises(jp.UserError, match="'q_proj' matches no norm of this model"):
        start(targets=("q_proj",))


@pytest.mark.parametrize("targets", [(), "all-linear"])
def test_targets_must_name_norms(targets):
    with pytest.raises(ValueError, match=r"LNTuning\.targets must name norms"):
        LNTuning(targets=targets)
