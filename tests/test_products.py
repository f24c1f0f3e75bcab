"""Products of bfloat16 on CPU, against float64, and the step that is compiled with them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, draw

import jaxpeft as jp
from jaxpeft import backend
from jaxpeft.losses import make_lm_loss
from jaxpeft.methods import Full
from jaxpeft.models.transformer import Transformer
from jaxpeft.products import chain_dtype, kept, product, scores
from jaxpeft.train_step import adapter_only, init_train_state, make_train_step

RNG = np.random.default_rng(0)
HALF_STEP = 2.0**-8
"""How far bfloat16, with 8 significant bits, may be from what it rounds, as a share of it."""

FORMULAS = {
    product: lambda x, w: x @ w,
    scores: lambda x, w: x @ np.swapaxes(w, -1, -2),
}


def inputs(function, *lead):
    x = jnp.asarray(RNG.standard_normal((*lead, 5, 12)), jnp.bfloat16)
    shape = (12, 7) if function is product else (7, 12)
    return x, jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)


def exact(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def assert_rounded(actual, expected, size):
    """Rounded once: off by half a step of the result, and by float32's own sums of that size."""
    actual, *_ = exact(actual)
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) <= HALF_STEP * np.abs(expected) + 1e-6 * size).all()


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("function", FORMULAS)
def test_products_and_their_gradients_are_rounded_once(function, lead):
    x, w = inputs(function, *lead)
    formula = FORMULAS[function]
    y, back = jax.vjp(function, x, w)
    assert y.dtype == (jnp.bfloat16 if function is product else jnp.float32)
    assert_rounded(y, formula(*exact(x, w)), 12)
    slope = jnp.asarray(RNG.standard_normal(y.shape), jnp.bfloat16)
    of_x, of_w = back(slope.astype(y.dtype))
    assert of_x.dtype == of_w.dtype == jnp.bfloat16
    flat_x, flat_slope = (a.reshape(-1, a.shape[-1]) for a in exact(x, slope))
    expected = flat_x.T @ flat_slope
    if function is scores:
        expected = expected.T
    assert_rounded(of_w, expected, 10)
    other = exact(w)[0] if function is scores else exact(w)[0].T
    assert_rounded(of_x, exact(slope)[0] @ other, 7)


@pytest.mark.parametrize("function", FORMULAS)
def test_only_gradients_that_are_asked_for_are_multiplied(function):
    x, w = inputs(function)

    def products(argnums):
        total = jax.grad(lambda x, w: function(x, w).astype(jnp.float32).sum(), argnums)
        return jax.jit(total).lower(x, w).as_text().count("dot_general")

    assert products((0, 1)) == products(0) + 1 == products(1) + 1


@pytest.mark.parametrize("function", FORMULAS)
def test_a_product_for_every_adapter_of_a_batch_is_that_of_each(function):
    x, w = inputs(function, 3)
    many = jnp.stack([w, 2 * w, -w])
    actual = jax.jit(jax.vmap(function))(x, many)
    expected = [function(a, b) for a, b in zip(x, many, strict=True)]
    np.testing.assert_array_equal(exact(actual), exact(jnp.stack(expected)))


def test_kept_numbers_are_kept_as_bits_and_have_their_own_gradient():
    x = jnp.asarray([1.5, -0.0, np.inf, 2.0**-130], jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def square(x):
        return jnp.square(kept(3 * x, "kept").astype(jnp.float32))

    run = jax.checkpoint(square, policy=policy)

    again = jax.jit(kept, static_argnums=1)(x, "kept")
    np.testing.assert_array_equal(*(np.asarray(a).view(np.uint16).tolist() for a in (again, x)))
    x = jnp.asarray([0.5, -2.0], jnp.bfloat16)
    held = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(run, x)[1], x))
    assert [leaf.dtype for leaf in held] == [jnp.uint16]
    (slope,) = jax.jit(lambda x: jax.vjp(run, x)[1](jnp.ones(2)))(x)
    np.testing.assert_array_equal(np.asarray(slope, np.float32), 18 * np.asarray(x, np.float32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_are_given_bfloat16_as_it_is(platform):
    x, w = inputs(product)
    with backend.traced_for(platform):
        assert chain_dtype(x) == jnp.bfloat16
        program = jax.jit(lambda x, w: kept(product(x, w), "kept")).trace(x, w).lower().as_text()
    assert "ui16" not in program
    assert "f32" not in program.replace("bf16", "")
    assert chain_dtype(x) == jnp.float32


def step_in(dtype, remat, method=jp.LoRA(rank=2, alpha=4.0)):  # noqa: B008
    """A compiled step of three layers over 2 x 256 tokens, and what it takes."""
    config = dataclasses.replace(CONFIG, num_layers=3, d_model=32, d_ff=48)
    module = Transformer(config, dtype, remat)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = draw(jax.eval_shape(module.init, jax.random.key(0), ids)["params"], 0, 0.2)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = jp.masked(optax.sgd(1.0), adapter_only)
    adapter = jp.init_adapter(method, params, jax.random.key(0))
    if not isinstance(method, Full):  # B is zero at the start, and with it the gradient of A
        adapter = dataclasses.replace(adapter, params=draw(adapter.params, 1, 0.1))
    state = init_train_state(params, adapter, tx, jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(48, size=(2, 256)))
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(256), tokens.shape),
        "weights": jnp.ones(tokens.shape),
    }
    step = make_train_step(make_lm_loss(module, head_frozen=False), tx)
    return step.lower(state, params, batch).compile(), (state, params, batch)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_the_step_multiplies_bfloat16_and_stacks_no_float32(remat):
    program = step_in(jnp.bfloat16, remat)[0].as_text()
    shapes = dict(re.findall(r"%([\w.-]+) = (\w+\[[\d,]*\])", program))
    products = [
        (shapes[x], shapes[y]) for x, y in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", program)
    ]
    kernels = [pair for pair in products if re.fullmatch(r".*\[(32,48|48,32|32,32)\]", pair[1])]
    assert len(kernels) >= 9
    assert all("bf16" in x and "bf16" in y for x, y in kernels), products
    assert "u16[3,2,256,32]" in program
    assert not re.findall(r"f32\[3,2,256,\d+\]", program.replace("bf16", "narrow"))


@pytest.mark.parametrize("method", [jp.LoRA(rank=2, alpha=4.0), Full()])
@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(remat, method):
    def change(dtype):
        RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state
        step, (state, params, batch) = step_in(dtype, remat, method)
        before = exact(*jax.tree.leaves(state.adapter.params))
        after = exact(*jax.tree.leaves(step(state, params, batch)[0].adapter.params))
        return [b - a for a, b in zip(before, after, strict=True)]

    for narrow, wide in zip(change(jnp.bfloat16), change(jnp.float32), strict=True):
        cosine = (narrow * wide).sum() / np.linalg.norm(narrow) / np.linalg.norm(wide)
        assert cosine > 0.99
