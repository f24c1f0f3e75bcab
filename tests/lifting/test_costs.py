"""What a lifted model costs: as much as the same model with LoRA written by hand, and no more."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lifted_nodes import shapes_made

import jaxpeft as jp

D, WIDE, HEADS, LAYERS, ROWS, LENGTH, VOCAB, RANK = 128, 192, 4, 3, 4, 40, 96, 4
SCALE = 2.0
METHOD = jp.LoRA(rank=RANK, alpha=SCALE * RANK, targets="all-linear")
MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "dynamic_slice",
    "optimization_barrier",
    "reshape",
    "slice",
    "squeeze",
    "transpose",
}
"""What may have the shape of a kernel: the base itself, cast, cut or turned."""


class Dense(nn.Module):
    """A dense layer with LoRA written by hand."""

    features: int

    @nn.compact
    def __call__(self, x):
        d_in = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (d_in, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.param("a", nn.initializers.normal(), (d_in, RANK))
        b = self.param("b", nn.initializers.normal(), (RANK, self.features))
        return x @ kernel + ((x @ a) * SCALE) @ b + bias


class Layer(nn.Module):
    dense: Callable

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        q, k, v = (self.dense(D, name=name)(h).reshape(*h.shape[:2], HEADS, -1) for name in "qkv")
        mixed = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + self.dense(D, name="out")(mixed)
        h = self.dense(WIDE, name="up")(nn.LayerNorm()(x))
        return x + self.dense(D, name="down")(nn.gelu(h)), None


class Transformer(nn.Module):
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, ids):
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(self.dense, name="layers")(nn.Embed(VOCAB, D)(ids), None)
        return nn.LayerNorm()(x)


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, WIDE, rngs=rngs)
        self.down = nnx.Linear(WIDE, D, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def transformer():
    """A Linen model, lifted, by hand and with merged weights, and the factors and parameters."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)))
    params = jax.jit(Transformer().init)(jax.random.key(0), ids)["params"]
    roles = jp.describe(Transformer().apply, {"params": params}, ids)
    adapter = jp.init_adapter(METHOD, params, jax.random.key(1), roles=roles)

    def lifted(factors, params):
        tree = jp.bind({"params": params}, adapter.replace(params=factors))
        return jp.lift(Transformer().apply)(tree, ids)

    def by_hand(factors, params):
        layers = {
            name: {**place, **(factors["layers"][name]["kernel"] if "kernel" in place else {})}
            for name, place in params["layers"].items()
        }
        return Transformer(Dense).apply({"params": {**params, "layers": layers}}, ids)

    def merged(factors, params):
        whole = jp.merge({"params": params}, adapter.replace(params=factors))
        return Transformer().apply(whole, ids)

    return lifted, by_hand, merged, adapter.params, params


def perceptron():
    """The same of an NNX model."""
    graph, params, rest = nnx.split(Perceptron(nnx.Rngs(0)), nnx.Param, ...)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS * LENGTH, D)), jnp.float32)
    function = lambda params, rest, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    roles = jp.describe(function, params, rest, x)
    adapter = jp.init_adapter(METHOD, params, jax.random.key(1), roles=roles)

    def lifted(factors, params):
        return jp.lift(function)(jp.bind(params, adapter.replace(params=factors)), rest, x)

    def dense(x, params, factors):
        low = (x @ factors["kernel"]["a"] * SCALE) @ factors["kernel"]["b"]
        return x @ params["kernel"][...] + low + params["bias"][...]

    def by_hand(factors, params):
        h = jnp.tanh(dense(x, params["up"], factors["up"]))
        return dense(h, params["down"], factors["down"])

    def merged(factors, params):
        return function(jp.merge(params, adapter.replace(params=factors)), rest, x)

    return lifted, by_hand, merged, adapter.params, params


MAKERS = {"transformer": transformer, "perceptron": perceptron}
every_model = pytest.mark.parametrize("model", MAKERS)


@functools.cache
def measured(model):
    """Of both gradients: the jaxpr, the FLOPs, the temporaries in bytes, and the values."""
    lifted, by_hand, _, factors, params = MAKERS[model]()
    factors = jax.tree.map(
        lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), factors
    )
    found = []
    for function in (lifted, by_hand):
        gradient = jax.grad(lambda f, p, function=function: jnp.square(function(f, p)).mean())
        traced = jax.jit(gradient).trace(factors, params)
        compiled = traced.lower().compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        flops = jp.count_flops(gradient, factors, params)
        found.append((traced.jaxpr.jaxpr, flops, temporaries, compiled(factors, params)))
    return found


def kernel_shapes(model):
    """The shapes of kernels, stacked or not, and turned."""
    single = {"transformer": {(D, D), (D, WIDE)}, "perceptron": {(D, WIDE)}}[model]
    single |= {shape[::-1] for shape in single}
    return single | {(LAYERS, *shape) for shape in single}


@every_model
def test_it_computes_what_lora_by_hand_computes(model):
    ours, theirs = (gradients for *_, gradients in measured(model))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@every_model
def test_the_gradient_takes_the_operations_of_lora_by_hand(model):
    ours, theirs = (flops for _, flops, *_ in measured(model))
    assert abs(ours / theirs - 1) < 0.01


@every_model
def test_the_gradient_takes_the_memory_of_lora_by_hand(model):
    ours, theirs = (temporaries for _, _, temporaries, _ in measured(model))
    assert ours < 1.05 * theirs


@every_model
def test_no_sum_and_no_gradient_of_a_kernel_is_formed(model):
    """Nothing has the shape of a kernel but the base itself, cast, cut or turned."""
    ours, _ = (jaxpr for jaxpr, *_ in measured(model))
    made = [name for shape, name in shapes_made(ours) if shape in kernel_shapes(model)]
    assert set(made) <= MOVES


@every_model
def test_weights_that_are_merged_would_be_seen(model):
    """The checks above can fail."""
    *_, merged, factors, params = MAKERS[model]()
    gradient = jax.grad(lambda f, p: jnp.square(merged(f, p)).mean())
    made = shapes_made(jax.make_jaxpr(gradient)(factors, params).jaxpr)
    names = {name for shape, name in made if shape in kernel_shapes(model)}
    assert {"add", "dot_general"} <= names
    assert jp.count_flops(gradient, factors, params) > 1.2 * measured(model)[1][1]
