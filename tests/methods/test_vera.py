"""VeRA's branch against float64 NumPy, its shared matrices, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, apply, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.binding import bind, check_fit
from jaxpeft.methods.kernels.vera import PEFT, VeRA, VeRAKernel, read, weigh, write
from jaxpeft.methods.peft.values import Tensors, Values
from jaxpeft.ops.linear import SHARED

RNG = np.random.default_rng(0)
QUERY, DOWN = "layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel"


def make(**values):
    return VeRA(**{"rank": 3} | values).init(decoder(CONFIG)[1], jax.random.key(0))


def moved(adapter):
    return adapter.replace(params=jax.tree.map(lambda v: v + 0.3, adapter.params))


def test_a_kernel_changes_by_its_cut_of_the_shared_matrices():
    x, base, d, b = (RNG.normal(size=s) for s in ((2, 5, 4), (4, 6), 3, 6))
    shared = {"a": RNG.normal(size=(9, 3)), "b": RNG.normal(size=(3, 8))}
    expected = base + (shared["a"][:4] * d) @ shared["b"][:, :6] * b
    x32, base, d, b, shared = jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32), (x, base, d, b, shared)
    )
    node = VeRAKernel(base, d, b, shared=shared)
    np.testing.assert_allclose(jax.jit(node.multiply)(x32), x @ expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(node.materialize(), expected, rtol=1e-4, atol=1e-4)


def test_the_matrices_are_stored_once_in_the_size_of_the_largest_kernel():
    adapter = make(targets=("q_proj", "down_proj"))
    shapes = {name: adapter.buffers[SHARED][name].shape for name in "ab"}
    assert shapes == {"a": (CONFIG.d_ff, 3), "b": (3, CONFIG.num_heads * CONFIG.head_dim)}
    variables = bind(decoder(CONFIG)[1], adapter)
    kernel = paths.get(variables["params"], DOWN)
    assert kernel.shared is None
    (shared,) = paths.get(variables[SHARED], DOWN)
    assert shared["a"] is adapter.buffers[SHARED]["a"]
    assert SHARED not in adapter.params


def test_a_new_adapter_starts_as_in_peft():
    adapter = make(rank=64, d_initial=0.2)
    for name in "ab":
        matrix = adapter.buffers[SHARED][name]
        bound = (6 / matrix.shape[0]) ** 0.5
        assert 0.9 * bound < np.abs(matrix).max() <= bound, name
    leaf = paths.get(adapter.params, QUERY)
    np.testing.assert_array_equal(leaf["d"], np.float32(0.2))
    assert not leaf["b"].any()


def test_dropout_drops_inputs_of_the_branch_and_keeps_its_mean():
    d = b = jnp.ones(1)
    shared = {"a": jnp.ones((4000, 1)) / 4000, "b": jnp.ones((1, 1))}
    node = VeRAKernel(jnp.zeros((4000, 1)), d, b, jnp.float32(0.25), jax.random.key(1), shared)
    value = float(node.multiply(jnp.ones(4000))[0])
    assert value == pytest.approx(1.0, abs=0.05)
    assert value != 1.0


def test_a_weight_multiplies_the_change():
    params, adapter = decoder(CONFIG)[1], moved(make(targets=("q_proj",)))
    once, twice = (
        paths.get(jp.merge(params, one), QUERY) for one in (adapter, weigh(adapter, 2.0))
    )
    before = paths.get(params, QUERY)
    np.testing.assert_allclose(twice - before, 2 * (once - before), rtol=1e-4, atol=1e-6)


def test_two_adapters_with_matrices_of_their_own_add_up():
    module, params = decoder(CONFIG)
    other = VeRA(rank=5, targets=("q_proj",)).init(params, jax.random.key(7))
    both = [moved(make(targets=("q_proj",))), moved(other)]
    ids = jnp.arange(6)[None]
    changes = [paths.get(jp.merge(params, one), QUERY) - paths.get(params, QUERY) for one in both]
    summed = paths.put(params, {QUERY: paths.get(params, QUERY) + sum(changes)})
    actual, expected = (apply(module, tree, ids) for tree in (bind(params, both), bind(summed)))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_without_its_matrices_is_refused_and_ours_holds_them():
    base = jp.Model(decoder(CONFIG)[1], CONFIG, decoder(CONFIG)[0])
    values, tensors = write(make(targets=("down_proj",)), base)
    assert tensors["base_model.vera_A"].shape == (3, CONFIG.d_ff)
    nothing = Tensors("here", {}, {}, lambda key: np.zeros(0))
    without = Values(values | {"save_projection": False}, "here", PEFT.defaults)
    with pytest.raises(jp.UserError, match="torch's random generator, which cannot be reproduced"):
        read(without, nothing, base)
    with pytest.raises(jp.UserError, match=r"are missing: base_model\.vera_A"):
        read(Values(values, "here", PEFT.defaults), nothing, base)


def test_an_adapter_of_another_width_is_refused():
    wide = dataclasses.replace(CONFIG, d_ff=32)
    with pytest.raises(jp.UserError, match="belongs to another model"):
        check_fit(decoder(wide)[1], make())


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"d_initial": 0.0}])
def test_nonsense_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=rf"VeRA\.{next(iter(bad))} must be"):
        VeRA(**bad)
