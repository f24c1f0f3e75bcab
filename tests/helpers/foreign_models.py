"""Models that are not of this package, their roles, and adapters of every method for them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp

ALL = {"targets": "all-linear"}
METHODS = {
    "lora": jp.LoRA(rank=3, **ALL),
    "rslora of some": jp.LoRA(rank=2, rslora=True, targets=("query", "out")),
    "dora": jp.LoRA(rank=3, dora=True, **ALL),
    "pissa": jp.LoRA(rank=2, init_weights="pissa", **ALL),
    "adalora": jp.AdaLoRA(rank=2, **ALL),
    "ia3": jp.IA3(feedforward=("out",), **ALL),
    "loha": jp.LoHa(rank=2, **ALL),
    "lokr": jp.LoKr(rank=2, **ALL),
    "vera": jp.VeRA(rank=4, **ALL),
    "oft": jp.OFT(block_size=4, **ALL),
    "bitfit": jp.BitFit(),
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        h = nn.Dense(12)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(h)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(table(ids), None)
        return table.attend(nn.LayerNorm()(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, deterministic=True, rngs=rngs)
        self.last = nnx.LinearGeneral((8,), (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.last(self.attention(self.norm(nnx.relu(self.first(x)))))


def linen():
    """The function, its variables, how parameters are put into them, and other arguments."""
    module, ids = Stacked(), np.array([[1, 2, 10], [4, 5, 0]])
    variables = jax.jit(module.init)(jax.random.key(0), ids)
    return module.apply, variables["params"], lambda params: {"params": params}, (ids,)


def nnx_model():
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)), jnp.float32)
    return (
        lambda params, rest, x: nnx.merge(graph, params, rest)(x),
        params,
        lambda params: params,
        (rest, x),
    )


def unrolled():
    """Layers in a list, under the name that stacked layers have in models of this package."""

    def function(params, x):
        for layer in params["layers"]:
            h = jnp.tanh(x @ layer["query"]["kernel"])
            x = h @ layer["out"]["kernel"] + layer["out"]["bias"]
        return x

    draw = drawn(3)
    layers = [
        {"query": {"kernel": draw(8, 8)}, "out": {"kernel": draw(8, 8), "bias": draw(8)}}
        for _ in range(2)
    ]
    return function, {"layers": layers}, lambda params: params, (draw(3, 8),)


def scanned():
    """Stacked layers under another name, some on the second axis."""

    def function(params, x):
        query, out = params["blocks"]["query"]["kernel"], params["blocks"]["out"]
        step = lambda y, w: (jnp.tanh(y @ w[0]) @ w[1] + w[2] + y, None)  # noqa: E731
        stacks = jnp.moveaxis(query, 1, 0), out["kernel"], out["bias"]
        return jax.lax.scan(jax.checkpoint(step), x, stacks)[0]

    draw = drawn(4)
    out = {"kernel": draw(3, 8, 8), "bias": draw(3, 8)}
    blocks = {"query": {"kernel": draw(8, 3, 8)}, "out": out}
    return function, {"blocks": blocks}, lambda params: params, (draw(2, 8),)


def drawn(seed):
    """A function that draws an array of a shape."""
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


MODELS = {"linen": linen(), "nnx": nnx_model(), "unrolled": unrolled(), "scanned": scanned()}
ROLES = {
    name: jp.describe(function, variables(params), *inputs)
    for name, (function, params, variables, inputs) in MODELS.items()
}
every_model = pytest.mark.parametrize("model", MODELS)
every_method = pytest.mark.parametrize("name", METHODS)


def start(model, name):
    params = MODELS[model][1]
    init = jax.jit(lambda key: jp.init_adapter(METHODS[name], params, key, roles=ROLES[model]))
    return init(jax.random.key(1))


def moved(adapter, scale=0.1):
    """An adapter moved away from where it starts, as by training."""
    rng = np.random.default_rng(0)
    shift = lambda x: x + scale * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return dataclasses.replace(adapter, params=jax.tree.map(shift, adapter.params))


def bound(model, params, adapter, **options):
    """The first argument of the lifted function."""
    tree = jp.bind(params, adapter, **options)
    return tree if model in ("linen", "nnx") else tree["params"]
