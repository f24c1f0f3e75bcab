"""One small model with its parameters in every kind of tree that libraries use."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze

import jaxpeft as jp

SIZES = (8, 16, 8)


def layers():
    """The layers, the same values for every kind."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    pairs = itertools.pairwise(SIZES)
    return [{"kernel": draw(rows, columns), "bias": draw(columns)} for rows, columns in pairs]


def forward(each, x):
    """The model, from its layers."""
    for layer in each:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def nested():
    return {"blocks": {f"layer_{at}": layer for at, layer in enumerate(layers())}}


def of_nested(params, x):
    return forward([params["blocks"][f"layer_{at}"] for at in range(len(SIZES) - 1)], x)


class Net(nnx.Module):
    def __init__(self):
        made = layers()
        self.blocks = nnx.List([nnx.Linear(*one["kernel"].shape, rngs=nnx.Rngs(0)) for one in made])
        for block, one in zip(self.blocks, made, strict=True):
            block.kernel, block.bias = nnx.Param(one["kernel"]), nnx.Param(one["bias"])

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x


GRAPH, STATE = nnx.split(Net())

KINDS = {
    "nested dicts": (of_nested, nested()),
    "Linen's variables": (lambda tree, x: of_nested(tree["params"], x), {"params": nested()}),
    "FrozenDict": (of_nested, freeze(nested())),
    "FrozenDict of variables": (
        lambda tree, x: of_nested(tree["params"], x),
        freeze({"params": nested()}),
    ),
    "dict with a list": (lambda tree, x: forward(tree["layers"], x), {"layers": layers()}),
    "list": (forward, layers()),
    "tuple": (forward, tuple(layers())),
    "nnx.State": (lambda tree, x: nnx.merge(GRAPH, tree)(x), STATE),
}


def same_kind(one, other):
    """Whether two trees are of the same types with the same keys."""
    return jax.tree.structure(one) == jax.tree.structure(other) and type(one) is type(other)


def start(kind, method=None):
    """An adapter of a kind's tree."""
    function, params = KINDS[kind]
    roles = jp.describe(function, params, jnp.ones((1, SIZES[0])))
    method = method or jp.LoRA(rank=2, targets="all-linear")
    return jp.init_adapter(method, params, jax.random.key(0), roles=roles)


def lifted(kind, params, adapter, x, key=None):
    """The model with the adapter; with a key, inputs are dropped."""
    bound = jp.bind(params, adapter, dropout_key=key)
    plain = isinstance(bound, dict) and bound.keys() == {"params"} and "params" not in params
    return jp.lift(KINDS[kind][0])(bound["params"] if plain else bound, x)
