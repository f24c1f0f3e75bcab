"""LoKr's Kronecker product against float64 NumPy, and PEFT's rules for the shapes of factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.adapter import weigh_scales
from jaxpeft.methods.kernels.lokr import PEFT, LoKr, LoKrKernel, factor_shapes, read, split
from jaxpeft.methods.peft.values import Tensors, Values

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape)


def make(**values):
    return LoKr(**{"rank": 2} | values).init(decoder(CONFIG)[1], jax.random.key(0))


WHOLE = {"w1": draw(3, 2), "w2": draw(4, 5)}
LOW = {"w1_a": draw(3, 1), "w1_b": draw(1, 2), "w2_a": draw(4, 2), "w2_b": draw(2, 5)}


@pytest.mark.parametrize("factors", [WHOLE, LOW, WHOLE | {"w1": LOW["w1_a"] @ LOW["w1_b"]}])
def test_a_kernel_changes_by_a_kronecker_product(factors):
    base, x = draw(12, 10), draw(2, 3, 12)
    w1, w2 = (
        factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]
        for name in ("w1", "w2")
    )
    expected = base + 0.7 * np.kron(w1, w2)
    as_float = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (base, factors))
    node = LoKrKernel(*as_float, jnp.float32(0.7))
    actual = jax.jit(node.multiply)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, x @ expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(node.materialize(), expected, rtol=1e-5, atol=1e-5)


def test_a_step_makes_no_array_of_the_kernels_size():
    base, factors = jnp.ones((12, 10)), jax.tree.map(jnp.asarray, LOW)

    def loss(factors, x):
        return LoKrKernel(base, factors, jnp.float32(0.7)).multiply(x).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(factors, jnp.ones((5, 12))))
    assert "f32[12,10] =" not in text


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [  # made with PEFT 0.21: peft.tuners.lokr.layer.factorization
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (576, -1, (24, 24)),
        (128, 4, (4, 32)),
        (128, 64, (64, 2)),
        (48, 8, (8, 6)),
        (36, -1, (6, 6)),
        (60, 9, (6, 10)),
        (250, 16, (10, 25)),
        (12, 5, (3, 4)),
        (7, 3, (1, 7)),
    ],
)
def test_sides_are_split_as_in_peft(size, factor, expected):
    assert split(size, factor) == expected


def test_factors_are_products_where_the_rank_is_less_than_half_their_longer_side():
    assert factor_shapes(48, 32, 2, False, 8) == {"w1": (8, 8), "w2_a": (6, 2), "w2_b": (2, 4)}
    assert factor_shapes(48, 32, 3, True, 8) == {
        "w1_a": (8, 3),
        "w1_b": (3, 8),
        "w2": (6, 4),
    }


def test_the_first_factor_starts_at_zero_and_the_others_within_the_bounds_of_peft():
    leaf = paths.get(make(decompose_both=True, rank=1).params, "layers/mlp/down_proj/kernel")
    assert leaf["w1_a"].any()
    assert not leaf["w1_b"].any()
    rows = leaf["w2_a"].shape[-2]  # the inputs of the second factor
    assert 0.5 * rows**-0.5 < np.abs(leaf["w2_a"]).max() <= rows**-0.5


def test_a_weight_multiplies_the_change():
    params, path = decoder(CONFIG)[1], "layers/self_attn/q_proj/kernel"
    adapter = make(targets=("q_proj",))
    adapter = adapter.replace(params=jax.tree.map(lambda v: v + 0.1, adapter.params))
    once, twice = (
        paths.get(jp.merge(params, one), path) for one in (adapter, weigh_scales(adapter, 2.0))
    )
    before = paths.get(params, path)
    np.testing.assert_allclose(twice - before, 2 * (once - before), rtol=1e-4, atol=1e-6)


def test_layers_of_one_module_with_other_factors_are_refused():
    values = {
        "r": 1,
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 9},
    }
    base = jp.Model(decoder(CONFIG)[1], CONFIG, decoder(CONFIG)[0])
    none = Tensors("here", {}, {}, lambda key: np.zeros(0))
    with pytest.raises(jp.UserError, match="products in some layers and whole in others"):
        read(Values(values, "here", PEFT.defaults), none, base)


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"LoKr\.decompose_factor must be -1 or a whole"):
        LoKr(decompose_factor=0)
