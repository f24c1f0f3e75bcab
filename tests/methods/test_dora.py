"""DoRA against float64 NumPy, its laws, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import decoder, draw

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.binding import bind, init_adapter
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.lora.dora import DoRAKernel, base_norm
from jaxpeft.methods.lora.nodes import drop
from jaxpeft.methods.merging import merge

IDS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
MODULE, PARAMS = decoder()
apply = jax.jit(MODULE.apply)


def new(**values):
    return init_adapter(LoRA(rank=2, dora=True, **values), PARAMS, jax.random.key(0))


def moved(adapter):
    return adapter.replace(
        params=jax.tree.map(jnp.add, adapter.params, draw(adapter.params, seed=1, scale=0.2))
    )


def kernel(getkey, key=None, dropout=0.0):
    w, a, b = (jax.random.normal(getkey(), shape) for shape in ((8, 6), (8, 3), (3, 6)))
    m = 1 + jax.random.uniform(getkey(), (6,))
    return DoRAKernel(
        w, a, b, m, base_norm(w), scale=jnp.float32(0.5), rank=3, dropout=dropout, key=key
    )


def wide(node):
    w, a, b, m = (np.asarray(v, np.float64) for v in (node.base, node.a, node.b, node.m))
    return w, a, b, m / np.linalg.norm(w + 0.5 * a @ b, axis=0)


def test_the_product_is_that_of_float64_numpy(getkey):
    node, x = kernel(getkey), jax.random.normal(getkey(), (2, 5, 8))
    w, a, b, g = wide(node)
    expected = np.asarray(x, np.float64) @ (g * (w + 0.5 * a @ b))
    np.testing.assert_allclose(jax.jit(DoRAKernel.multiply)(node, x), expected, 1e-4, 1e-4)
    np.testing.assert_allclose(node.materialize(), g * (w + 0.5 * a @ b), 1e-5, 1e-5)


def test_with_dropout_the_base_answers_to_the_dropped_input_as_in_peft(getkey):
    key = getkey()
    node, x = kernel(getkey, key, jnp.float32(0.5)), jax.random.normal(getkey(), (5, 8))
    w, a, b, g = wide(node)
    dropped = np.asarray(drop(x, 0.5, key), np.float64)
    expected = np.asarray(x, np.float64) @ w + (g - 1) * (dropped @ w)
    expected += g * 0.5 * (dropped @ a @ b)
    np.testing.assert_allclose(node.multiply(x), expected, 1e-4, 1e-4)


def test_the_norm_is_a_constant_for_differentiation(getkey):
    node, x = kernel(getkey), jax.random.normal(getkey(), (5, 8))
    w, a, b, g = wide(node)
    actual = jax.grad(lambda n: n.multiply(x).sum())(node.replace(rank=jnp.float32(3)))
    seen = np.asarray(x, np.float64).sum(0)
    np.testing.assert_allclose(actual.a, 0.5 * np.outer(seen, b @ g), 1e-4, 1e-4)
    np.testing.assert_allclose(actual.b, 0.5 * np.outer(seen @ a, g), 1e-4, 1e-4)
    total = w + 0.5 * a @ b
    np.testing.assert_allclose(actual.m, seen @ total / np.linalg.norm(total, axis=0), 1e-4, 1e-4)


def test_a_new_adapter_leaves_the_logits_bit_for_bit_alone():
    np.testing.assert_array_equal(apply(bind(PARAMS, new()), IDS), apply(bind(PARAMS), IDS))


def test_a_trained_adapter_computes_the_same_merged():
    adapter = moved(new(rslora=True))
    merged = merge(PARAMS, adapter)
    actual, expected = apply(bind(PARAMS, adapter), IDS), apply({"params": merged}, IDS)
    assert np.abs(actual - apply(bind(PARAMS), IDS)).max() > 1e-2
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_adapted_stay_and_get_no_gradient():
    adapter = new(targets=("layers.1.self_attn.q_proj",))
    path = "layers/self_attn/q_proj/kernel"

    def loss(p):
        return jnp.square(MODULE.apply(bind(PARAMS, adapter.replace(params=p)), IDS)).sum()

    # B is zero, so at first only B and the magnitudes get a gradient.
    grads = paths.get(jax.jit(jax.grad(loss))(adapter.params), path)
    assert not any(np.asarray(leaf[0]).any() for leaf in grads.values())
    assert np.asarray(grads["b"][1]).any()
    assert np.asarray(grads["m"][1]).any()


def test_a_column_of_zeros_gives_no_nan():
    w = jnp.zeros((4, 2))
    node = DoRAKernel(
        w, jnp.ones((4, 1)), jnp.zeros((1, 2)), jnp.zeros(2), jnp.zeros(2), scale=1.0, rank=1
    )
    value, grads = jax.value_and_grad(lambda m: node.replace(m=m).multiply(jnp.ones(4)).sum())(
        node.m
    )
    assert value == 0
    assert np.isfinite(grads).all()


def test_it_is_refused_where_it_has_no_meaning():
    adapter = new(targets=("q_proj",))
    with pytest.raises(UserError, match="has no factor"):
        bind(PARAMS, [adapter], weights=[0.5])
    with pytest.raises(UserError, match="put this one first"):
        bind(PARAMS, [init_adapter(LoRA(rank=2), PARAMS, jax.random.key(0)), adapter])
    with pytest.raises(UserError, match="not their shapes"):
        init_adapter(LoRA(rank=2, dora=True), jax.eval_shape(lambda: PARAMS), jax.random.key(0))


def test_the_gradient_takes_the_norm_for_a_constant(getkey):
    """The paper's section 4.3, against the kernel written out."""
    node, x = kernel(getkey), jax.random.normal(getkey(), (5, 8))
    w, a, b, _ = wide(node)
    norm = jnp.asarray(np.linalg.norm(w + 0.5 * a @ b, axis=0), jnp.float32)

    def loss(leaves):
        return jnp.square(node.replace(**leaves).multiply(x)).sum()

    def written_out(leaves):
        total = leaves["m"] / norm * (node.base + 0.5 * leaves["a"] @ leaves["b"])
        return jnp.square(x @ total).sum()

    leaves = {"a": node.a, "b": node.b, "m": node.m}
    actual, expected = jax.grad(loss)(leaves), jax.grad(written_out)(leaves)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected
    )


def test_a_step_makes_no_array_of_the_kernels_size_but_the_product_with_the_base(getkey):
    w, a, b = (jax.random.normal(getkey(), shape) for shape in ((31, 37), (31, 2), (2, 37)))
    norm = base_norm(w)

    def loss(factors, x):
        node = DoRAKernel(w, *factors, norm, scale=jnp.float32(0.5), rank=2)
        return node.multiply(x).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))((a, b, norm), jnp.ones((5, 31))))
    assert [line for line in text.splitlines() if "f32[31,37] =" in line] == []
