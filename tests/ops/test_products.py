"""Products of bfloat16 on CPU, against float64, and the step that is compiled with them."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, draw

import jaxpeft as jp
from jaxpeft.core import backend
from jaxpeft.core.flops import count_flops
from jaxpeft.methods.leaves.full import Full
from jaxpeft.models.transformer import Transformer
from jaxpeft.ops.products import chain_dtype, kept, product, scores
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.step import adapter_only, init_train_state, make_train_step

LORA = jp.LoRA(rank=2, alpha=4.0)
RNG = np.random.default_rng(0)
HALF_STEP = 2.0**-8
"""How far bfloat16, with 8 significant bits, may be from what it rounds, as a share of it."""

FORMULAS = {
    product: lambda x, w: x @ w,
    scores: lambda x, w: x @ np.swapaxes(w, -1, -2),
}


def inputs(function, *lead):
    x = jnp.asarray(RNG.standard_normal((*lead, 12)), jnp.bfloat16)
    shape = (12, 7) if function is product else (7, 12)
    return x, jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)


def exact(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def assert_rounded(actual, expected, size):
    """Rounded once to bfloat16, if it is that; and off by float32's own sums of that size."""
    step = HALF_STEP if actual.dtype == jnp.bfloat16 else 0.0
    (numbers,) = exact(actual)
    assert numbers.shape == expected.shape
    assert (np.abs(numbers - expected) <= step * np.abs(expected) + 1e-6 * size).all()


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
@pytest.mark.parametrize("function", FORMULAS)
def test_products_and_their_gradients_are_rounded_once(function, lead):
    x, w = inputs(function, *lead)
    y, back = jax.vjp(function, x, w)
    assert y.dtype == (jnp.bfloat16 if function is product else jnp.float32)
    assert_rounded(y, FORMULAS[function](*exact(x, w)), 12)
    slope = jnp.asarray(RNG.standard_normal(y.shape), jnp.bfloat16)
    of_x, of_w = back(slope.astype(y.dtype))
    assert of_x.dtype == of_w.dtype == jnp.bfloat16
    flat_x, flat_slope = (a.reshape(-1, a.shape[-1]) for a in exact(x, slope))
    turned, (wide,) = flat_x.T @ flat_slope, exact(w)
    assert_rounded(of_w, turned.T if function is scores else turned, 10)
    assert_rounded(of_x, exact(slope)[0] @ (wide if function is scores else wide.T), 7)


@pytest.mark.parametrize("function", FORMULAS)
def test_only_gradients_that_are_asked_for_are_multiplied(function):
    x, w = inputs(function, 5)

    def products(argnums):
        total = jax.grad(lambda x, w: function(x, w).astype(jnp.float32).sum(), argnums)
        return jax.jit(total).lower(x, w).as_text().count("dot_general")

    assert products((0, 1)) == products(0) + 1 == products(1) + 1


@pytest.mark.parametrize("function", FORMULAS)
def test_a_product_for_every_adapter_of_a_batch_is_that_of_each(function):
    x, w = inputs(function, 3, 5)
    many = jnp.stack([w, 2 * w, -w])

    def both(x, w):
        y, back = jax.vjp(function, x, w)
        return y, *back(jnp.ones_like(y))

    for actual, single in zip(jax.jit(jax.vmap(both))(x, many), both(x[1], many[1]), strict=True):
        np.testing.assert_allclose(exact(actual[1])[0], exact(single)[0], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("function", FORMULAS)
def test_an_answer_that_nothing_depends_on_has_no_gradient(function):
    @jax.custom_vjp
    def second(a, b):
        del a
        return b

    second.defvjp(lambda a, b: (b, None), lambda _, slope: (None, slope))
    x, w = inputs(function, 5)
    value = lambda x: second(function(x, w), x).astype(jnp.float32).sum()  # noqa: E731
    np.testing.assert_array_equal(exact(jax.grad(value)(x)), np.ones((1, *x.shape)))


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


@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_a_second_derivative_through_bits_is_refused_and_not_zero(outer):
    def cube(x):
        return (kept(x, "kept").astype(jnp.float32) ** 3).sum()

    def slope(x):
        return jax.grad(cube)(x).astype(jnp.float32).sum()

    assert slope(jnp.full(2, 2.0, jnp.bfloat16)) == 24
    with pytest.raises(jp.UserError, match='load it with compute_dtype="float32"'):
        outer(slope)(jnp.full(2, 2.0, jnp.bfloat16))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_are_given_bfloat16_as_it_is(platform):
    with backend.traced_for(platform):
        step, shapes = step_in(jnp.bfloat16, "dots")
        program = step.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        assert chain_dtype(jnp.zeros(2, jnp.bfloat16)) == jnp.bfloat16
    assert "ui16" not in program
    assert "-> tensor<2x256x48xbf16>" in program
    assert chain_dtype(jnp.zeros(2, jnp.bfloat16)) == jnp.float32


def test_a_jitted_product_is_traced_again_for_another_platform():
    x, w = inputs(product, 5)
    traced = []

    @jax.jit
    def run(x, w):
        traced.append(backend.platform())
        return product(x, w)

    for platform, sums in (("cpu", "float32"), ("cuda", "bfloat16"), ("cpu", "float32")):
        with backend.traced_for(platform):
            assert f"preferred_element_type={sums}" in str(run.trace(x, w).jaxpr)
            assert_rounded(run(x, w), FORMULAS[product](*exact(x, w)), 12)
    assert traced == ["cpu", "cuda"]


def test_another_thread_traces_for_the_platform_that_is_there():
    with backend.traced_for("tpu"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(backend.platform).result() == "cpu"
        assert backend.platform() == "tpu"


def step_in(dtype, remat, method=LORA):
    """A step of three layers over 2 x 256 tokens, and what it takes."""
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
    tokens = jnp.asarray(np.random.default_rng(1).integers(48, size=(2, 256)))
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(256), tokens.shape),
        "weights": jnp.ones(tokens.shape),
    }
    return make_train_step(make_lm_loss(module, head_frozen=False), tx), (state, params, batch)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_the_step_stacks_bits_and_no_float32(remat):
    step, given = step_in(jnp.bfloat16, remat)
    program = step.lower(*given).compile().as_text()
    assert "u16[3,2,256,32]" in program
    assert not re.findall(r"f32\[3,2,256,\d+\]", program.replace("bf16", "narrow"))


def test_every_product_with_a_kernel_takes_bfloat16_and_gives_float32():
    step, given = step_in(jnp.bfloat16, "dots")
    program = step.lower(*given).as_text()
    found = re.findall(
        r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", program
    )
    sizes = re.compile(r"(32x32|32x16|32x48|48x32)xb?f(16|32)")
    kernels = [each for each in found if "x256x" in each[0] and sizes.fullmatch(each[1])]
    assert len(kernels) == 2 * 7  # forward and backward
    for x, kernel, y in kernels:
        assert x.endswith("xbf16"), (x, kernel)
        assert kernel.endswith("xbf16"), (x, kernel)
        assert y.endswith("xf32"), (x, kernel, y)


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_nothing_is_computed_more_often_than_in_float32(remat):
    narrow, wide = (step_in(dtype, remat) for dtype in (jnp.bfloat16, jnp.float32))
    assert count_flops(narrow[0], *narrow[1]) == count_flops(wide[0], *wide[1])


@pytest.mark.parametrize(
    ("remat", "method"),
    [
        ("dots", LORA),
        ("full", Full()),
        pytest.param("full", LORA, marks=pytest.mark.slow),
        pytest.param("none", LORA, marks=pytest.mark.slow),
        pytest.param("dots", Full(), marks=pytest.mark.slow),
        pytest.param("none", Full(), marks=pytest.mark.slow),
    ],
)
def test_gradients_in_bfloat16_are_near_those_in_float32(remat, method):
    def change(dtype):
        step, (state, params, batch) = step_in(dtype, remat, method)
        before = exact(*jax.tree.leaves(state.adapter.params))
        after = exact(*jax.tree.leaves(step(state, params, batch)[0].adapter.params))
        return [b - a for a, b in zip(before, after, strict=True)]

    for narrow, wide in zip(change(jnp.bfloat16), change(jnp.float32), strict=True):
        assert np.linalg.norm(narrow - wide) < 0.1 * np.linalg.norm(wide)
