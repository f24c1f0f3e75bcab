"""LoHa's product against float64 NumPy, in both of its forms, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.adapter import weigh_scales
from jaxpeft.methods.kernels.loha import LoHa, LoHaKernel
from jaxpeft.methods.kernels.lycoris import ranks_values
from jaxpeft.methods.registry import KINDS

RNG = np.random.default_rng(0)


def factors(d_in, d_out, rank):
    """Base, a1, b1, a2, b2."""
    shapes = [(d_in, d_out), (d_in, rank), (rank, d_out), (d_in, rank), (rank, d_out)]
    return [RNG.normal(size=shape) for shape in shapes]


def make(**values):
    return LoHa(**{"rank": 2} | values).init(decoder(CONFIG)[1], jax.random.key(0))


@pytest.mark.parametrize("rank", [1, 2, 5])  # the last one builds the change
def test_a_kernel_changes_by_the_product_of_two_products(rank):
    base, a1, b1, a2, b2 = wide = factors(12, 20, rank)
    x = RNG.normal(size=(2, 3, 12))
    expected = base + 0.7 * (a1 @ b1) * (a2 @ b2)
    node = LoHaKernel(*(jnp.asarray(v, jnp.float32) for v in wide), scale=jnp.float32(0.7))
    actual = jax.jit(node.multiply)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, x @ expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(node.materialize(), expected, rtol=1e-4, atol=1e-4)


def test_a_step_makes_no_array_of_the_kernels_size_where_the_product_is_smaller():
    base, *rest = (jnp.asarray(v, jnp.float32) for v in factors(31, 37, 2))

    def loss(rest, x):
        return LoHaKernel(base, *rest, scale=jnp.float32(0.7)).multiply(x).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(rest, jnp.ones((5, 31))))
    made = [line for line in text.splitlines() if "f32[31,37] =" in line]
    assert made == []


def test_layers_of_another_rank_and_alpha_come_from_patterns_and_go_back():
    params = decoder(CONFIG)[1]
    base = jp.Model(params, CONFIG, decoder(CONFIG)[0])
    adapter = make(alpha=3.0, targets=("q_proj",))
    path = "layers/self_attn/q_proj/kernel"
    ranks = {"rank": jnp.array([2, 1], jnp.int32), "scale": jnp.array([1.5, 4.0])}
    adapter = adapter.replace(buffers=paths.unflatten({path: ranks}))
    values = ranks_values(adapter, base)
    assert {values["r"], *values["rank_pattern"].values()} == {1, 2}
    assert {values["alpha"], *values["alpha_pattern"].values()} == {3, 4}
    with pytest.raises(jp.UserError, match="differ in rank, alpha"):
        KINDS["loha"].config_of(adapter)


def test_a_weight_multiplies_the_change():
    params = decoder(CONFIG)[1]
    adapter = make(targets=("q_proj",))
    adapter = adapter.replace(params=jax.tree.map(lambda v: v + 0.1, adapter.params))
    path = "layers/self_attn/q_proj/kernel"
    once, twice = (
        paths.get(jp.merge(params, one), path) for one in (adapter, weigh_scales(adapter, 2.0))
    )
    before = paths.get(params, path)
    np.testing.assert_allclose(twice - before, 2 * (once - before), rtol=1e-4, atol=1e-6)


def test_factors_start_within_the_bounds_of_peft_and_one_at_zero():
    leaf = paths.get(make(rank=4).params, "layers/mlp/up_proj/kernel")
    for name, fan_in in (("a1", CONFIG.d_model), ("b1", 4), ("b2", 4)):
        bound = fan_in**-0.5
        assert 0.8 * bound < np.abs(leaf[name]).max() <= bound
    assert not leaf["a2"].any()


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"LoHa\.rank must be a whole number"):
        LoHa(rank=0)
    with pytest.raises(ValueError, match=r"LoHa\.alpha must be finite and positive"):
        LoHa(alpha=float("nan"))
