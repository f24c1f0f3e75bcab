"""The node protocol, on plain kernels: scan, remat, vmap, grad, jit and a sharded base.

``tests/methods/test_methods.py`` runs every method's nodes in a whole model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.methods.lora.nodes import LoRAKernel
from jaxpeft.models.layers import weight
from jaxpeft.ops.linear import attend, dtype_of, embed, linear, materialize, shape_of

LAYERS, D_IN, D_OUT, RANK = 8, 16, 24, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make one kind of weight, and what it stands for.

    Attributes:
        trained: ``trained(key, stack)``: the arrays that are trained, for a base with that stack.
        build: ``build(base, trained)``: the weight.
        dense: ``dense(base, trained)``: the matrix it stands for, by its formula.
    """

    trained: Callable[[Any, tuple], dict]
    build: Callable[[Any, dict], Any]
    dense: Callable[[Any, dict], Any]


def lora_trained(key, stack):
    a, b, scale = jax.random.split(key, 3)
    return {
        "a": jax.random.normal(a, (*stack, D_IN, RANK)) / 4,
        "b": jax.random.normal(b, (*stack, RANK, D_OUT)) / 4,
        "scale": jax.random.uniform(scale, stack, minval=0.5, maxval=2.0),
    }


def lora_node(base, t):
    return LoRAKernel(base, t["a"], t["b"], t["scale"], dropout=jnp.zeros_like(t["scale"]))


def lora_delta(t):
    return t["scale"][..., None, None] * (t["a"] @ t["b"])


NODES = {
    "array": Case(
        lambda key, stack: {}, lambda base, t: base, lambda base, t: base.astype("float32")
    ),
    "lora": Case(
        lora_trained,
        lora_node,
        lambda base, t: base.astype("float32") + lora_delta(t),
    ),
    "lora on lora": Case(
        lambda key, stack: {i: lora_trained(jax.random.fold_in(key, int(i)), stack) for i in "12"},
        lambda base, t: lora_node(lora_node(base, t["1"]), t["2"]),
        lambda base, t: base.astype("float32") + lora_delta(t["1"]) + lora_delta(t["2"]),
    ),
}

every_node = pytest.mark.parametrize("case", NODES.values(), ids=NODES.keys())


def make(case, getkey, stack=(LAYERS,), dtype=jnp.float32):
    base = (jax.random.normal(getkey(), (*stack, D_IN, D_OUT)) / 4).astype(dtype)
    return base, case.trained(getkey(), stack)


def numpy_dense(case, base, trained):
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), trained)
    return case.dense(np.asarray(base, np.float64), wide).astype(np.float64)


class Layer(nn.Module):
    """Multiplies and cuts back to the width of the input, as a layer that can be scanned."""

    @nn.compact
    def __call__(self, x, _):
        kernel = weight(self, "kernel", (D_IN, D_OUT), nn.initializers.zeros)
        return jnp.tanh(linear(x, kernel)[..., :D_IN]), None


def run_scanned(kernel, x, remat):
    layer = nn.remat(Layer, prevent_cse=False) if remat else Layer
    scanned = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )
    return scanned().apply({"params": {"kernel": kernel}}, x, None)[0]


def run_looped(dense, x):
    for layer in range(LAYERS):
        x = jnp.tanh((x @ dense[layer])[..., :D_IN])
    return x


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected
    )


@every_node
def test_the_node_multiplies_with_the_matrix_it_stands_for(case, getkey):
    base, trained = make(case, getkey, stack=())
    x = jax.random.normal(getkey(), (2, 5, D_IN))
    node, dense = case.build(base, trained), numpy_dense(case, base, trained)
    np.testing.assert_allclose(linear(x, node), np.asarray(x) @ dense, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(materialize(node), dense, rtol=1e-6, atol=1e-5)


@every_node
@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["one layer", "stacked"])
def test_logical_shape_and_dtype_are_those_of_the_base(case, getkey, stack):
    base, trained = make(case, getkey, stack, jnp.bfloat16)
    node = case.build(base, trained)
    assert shape_of(node) == (*stack, D_IN, D_OUT)
    assert dtype_of(node) == jnp.bfloat16
    whole = materialize(node)
    assert (whole.shape, whole.dtype) == ((*stack, D_IN, D_OUT), jnp.bfloat16)


@every_node
def test_every_leaf_of_a_stacked_node_has_the_layer_axis(case, getkey):
    leaves = jax.tree.leaves(case.build(*make(case, getkey)))
    assert all(leaf.shape[0] == LAYERS for leaf in leaves)


@every_node
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_have_the_dtype_of_the_activations(case, getkey, dtype):
    node = case.build(*make(case, getkey, stack=()))
    assert linear(jnp.ones((2, D_IN), dtype), node).dtype == dtype


@every_node
@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan and remat"])
def test_values_and_gradients_under_scan_are_those_of_a_loop_over_dense_matrices(
    case, getkey, remat
):
    base, trained = make(case, getkey)
    x = jax.random.normal(getkey(), (2, D_IN)) / 4

    def scanned(trained, x):
        return jnp.sin(run_scanned(case.build(base, trained), x, remat)).sum()

    def looped(trained, x):
        return jnp.sin(run_looped(case.dense(base, trained), x)).sum()

    actual = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(trained, x)
    expected = jax.value_and_grad(looped, argnums=(0, 1))(trained, x)
    assert_close(actual, expected)


@every_node
def test_adapters_stacked_under_vmap_share_the_base(case, getkey):
    base, _ = make(case, getkey)
    several = [case.trained(getkey(), (LAYERS,)) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    x = jax.random.normal(getkey(), (2, D_IN)) / 4

    def run(trained):
        return run_scanned(case.build(base, trained), x, remat=True)

    actual = jax.jit(jax.vmap(run, axis_size=3))(stacked)
    for i, trained in enumerate(several):
        expected = run_looped(case.dense(base, trained), x)
        np.testing.assert_allclose(actual[i], expected, rtol=1e-4, atol=1e-5)


@every_node
def test_a_node_is_an_argument_of_a_compiled_function(case, getkey):
    base, _ = make(case, getkey, stack=())
    x = jax.random.normal(getkey(), (2, D_IN))
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(linear, n=1))
    for _ in range(2):
        trained = case.trained(getkey(), ())
        expected = np.asarray(x) @ numpy_dense(case, base, trained)
        np.testing.assert_allclose(
            run(x, case.build(base, trained)), expected, rtol=1e-4, atol=1e-5
        )


@every_node
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["layers", "d_in", "d_out"])
def test_a_base_sharded_over_eight_devices_gives_the_same(case, getkey, axis):
    base, trained = make(case, getkey)
    x = jax.random.normal(getkey(), (2, D_IN)) / 4
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(*["model" if i == axis else None for i in range(3)])
    placed = jax.device_put(base, NamedSharding(mesh, spec))
    assert placed.addressable_shards[0].data.size == base.size // 8

    @jax.jit
    @jax.value_and_grad
    def run(trained, base):
        return jnp.sin(run_scanned(case.build(base, trained), x, remat=False)).sum()

    actual, expected = run(trained, placed), run(trained, base)
    assert_close(actual, expected)


def test_a_table_is_looked_up_and_attended(getkey):
    table = jax.random.normal(getkey(), (7, 4))
    np.testing.assert_array_equal(embed(jnp.array([[0, 6]]), table), table[np.array([[0, 6]])])
    x = jax.random.normal(getkey(), (2, 4)).astype(jnp.bfloat16)
    scores = attend(x, table)
    rounded = np.asarray(table.astype(jnp.bfloat16), np.float64)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.asarray(x, np.float64) @ rounded.T, rtol=1e-5, atol=1e-5)


def test_an_operation_that_a_node_lacks_is_named(getkey):
    node = NODES["lora"].build(*make(NODES["lora"], getkey, stack=()))
    with pytest.raises(TypeError, match="LoRAKernel does not support 'lookup'"):
        embed(jnp.zeros((1,), jnp.int32), node)
    with pytest.raises(TypeError, match="LoRAKernel does not support 'attend'"):
        attend(jnp.zeros((1, D_OUT)), node)


def test_a_node_of_another_logical_shape_is_refused_by_name(getkey):
    base, trained = make(NODES["lora"], getkey)
    wrong = NODES["lora"].build(base[:, :, :-1], {**trained, "b": trained["b"][..., :-1]})
    with pytest.raises(ValueError, match=r"kernel has shape \(16, 23\), the config asks for"):
        run_scanned(wrong, jnp.ones((2, D_IN)), remat=False)
