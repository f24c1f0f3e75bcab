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
BIASES = {"targets": ("out",)}
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
    "full": jp.Full(),
    "lora with bias of B": jp.LoRA(rank=2, lora_bias=True, **BIASES),
    "lora with biases": jp.LoRA(rank=2, bias="lora_only", **BIASES),
    "lora with a module": jp.LoRA(rank=2, targets=("query",), save_modules=("out",)),
    "norms": jp.LNTuning(),
    "table": jp.LoRA(rank=2, targets=("Embed_0",)),
    "dora of a table": jp.LoRA(rank=2, dora=True, targets="**/embedding"),
    "tokens": jp.TrainableTokens(token_ids=(1, 4)),
    "columns": jp.TrainableTokens(token_ids=(1, 4), targets=("head",)),
    "lora with tokens": jp.LoRA(rank=2, targets=("query",), token_ids=(1, 4)),
    "prompt": jp.PromptTuning(num_tokens=2),
    "p-tuning": jp.PTuning(num_tokens=2),
    "prompts of tasks": jp.MultitaskPromptTuning(num_tokens=2, num_tasks=2),
    "convolutions": jp.LoRA(rank=2, targets=lambda row: row.role == "convolution"),
    "dora of convolutions": jp.LoRA(rank=2, dora=True, targets=("Conv_0", "Conv_1")),
    "ia3 of convolutions": jp.IA3(targets=("Conv_0", "Conv_1"), feedforward=("Conv_1",)),
    "loha of convolutions": jp.LoHa(rank=2, targets="**/Conv_*/kernel"),
    "lokr of convolutions": jp.LoKr(rank=2, targets="Conv_*/kernel"),
    "vera of convolutions": jp.VeRA(rank=4, targets=("Conv_0", "Conv_1")),
    "oft of convolutions": jp.OFT(block_size=3, targets=("Conv_0", "Conv_1")),
    "adalora of convolutions": jp.AdaLoRA(rank=2, targets=("Conv_0", "Conv_1")),
}
KERNELS = ("lora", "rslora of some", "dora", "pissa", "adalora", "ia3", "loha", "lokr", "vera")
PROMPTS = ("prompt", "p-tuning", "prompts of tasks")
BY_MODEL = {
    "linen": [
        *(*KERNELS, "oft", "bitfit", "full", "lora with bias of B", "lora with biases", "norms"),
        *("lora with a module", "table", "dora of a table", "tokens", "lora with tokens"),
        *PROMPTS,
    ],
    "nnx": [*KERNELS, "oft", "bitfit", "full", "lora with bias of B", "lora with biases", "norms"],
    "deep": ["lora", "dora", "ia3", "norms", "lora with bias of B"],
    "unrolled": [*KERNELS, "oft", "bitfit", "full", "lora with a module"],
    "scanned": [*KERNELS, "oft", "bitfit", "full", "lora with bias of B", "lora with a module"],
    "tables": ["lora", "table", "dora of a table", "tokens", "columns", *PROMPTS],
    "vision": [
        *("lora", "norms", "full", "bitfit"),
        *(name for name in METHODS if name.endswith("convolutions")),
    ],
    "pixels": ["lora", "convolutions"],
}
"""The methods that are tested with each model."""


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        h = nn.Dense(12)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(h)), None


class Stacked(nn.Module):
    vocab: int = 11

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(self.vocab, 8)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(table(ids), None)
        return table.attend(nn.LayerNorm()(x))


class Vision(nn.Module):
    """Patches by a convolution with strides, one with dilation, attention, and a classifier."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=(2, 2), padding="VALID")(x)
        x = nn.gelu(nn.Conv(6, (3, 3), kernel_dilation=2, use_bias=False)(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = x + self.param("positions", nn.initializers.normal(0.1), x.shape[1:])
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class Pixels(nnx.Module):
    """A convolutional net whose rows are classified, with a one-dimensional convolution first."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3,), padding="CIRCULAR", rngs=rngs)
        self.second = nnx.Conv(8, 6, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        rows = jax.vmap(self.first, in_axes=1, out_axes=1)(x)
        return self.head(nnx.relu(self.second(nnx.relu(rows))).mean((1, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, deterministic=True, rngs=rngs)
        self.last = nnx.LinearGeneral((8,), (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.last(self.attention(self.norm(nnx.relu(self.first(x)))))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, deterministic=True, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Deep(nnx.Module):
    """An NNX transformer whose layers are stacked, and run by its own scan and remat."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(in_axes=0, out_axes=0)(Layer))
        self.layers = make(rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x, layer):
            return layer(x)

        return self.head(through(x, self.layers))


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


def deep():
    graph, params, rest = nnx.split(Deep(nnx.Rngs(0)), nnx.Param, ...)
    function = lambda params, rest, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    return function, params, lambda params: params, (rest, drawn(8)(2, 5, 8))


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


def tables():
    """Two tables that are looked up, and a head of its own, turned."""

    def function(params, ids):
        x = (
            params["Embed_0"]["embedding"][ids]
            + params["places"]["embedding"][jnp.arange(ids.shape[1])]
        )
        return jnp.tanh(x @ params["query"]["kernel"]) @ params["head"]["kernel"].T

    draw = drawn(5)
    params = {
        "Embed_0": {"embedding": draw(9, 8)},
        "places": {"embedding": draw(6, 8)},
        "query": {"kernel": draw(8, 8)},
        "head": {"kernel": draw(9, 8)},
    }
    return function, params, lambda params: params, (np.array([[1, 2, 8], [4, 5, 0]]),)


def vision():
    """The function, its variables, and a batch of small pictures."""
    module, x = Vision(), drawn(6)(2, 8, 8, 3)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return module.apply, variables["params"], lambda params: {"params": params}, (x,)


def pixels():
    graph, params, rest = nnx.split(Pixels(nnx.Rngs(0)), nnx.Param, ...)
    function = lambda params, rest, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    return function, params, lambda params: params, (rest, drawn(7)(2, 8, 8, 3))


def drawn(seed):
    """A function that draws an array of a shape."""
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


MODELS = {
    "linen": linen(),
    "nnx": nnx_model(),
    "deep": deep(),
    "unrolled": unrolled(),
    "scanned": scanned(),
    "tables": tables(),
    "vision": vision(),
    "pixels": pixels(),
}
ROLES = {
    name: jp.describe(function, variables(params), *inputs)
    for name, (function, params, variables, inputs) in MODELS.items()
}
TABLES = ("table", "dora of a table", "tokens", "lora with tokens")
every_model = pytest.mark.parametrize("model", MODELS)
every_pair = pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model, names in BY_MODEL.items() for name in names]
)


def start(model, name):
    """A new adapter. The table of one model is also its head, and one model has two tables."""
    params, roles = MODELS[model][1], ROLES[model]
    options = {"tied": True} if model == "linen" and name in TABLES else {}
    if model == "tables" and name in (*PROMPTS, "tokens"):
        options["embedding"] = "Embed_0/embedding"
    method = METHODS[name]
    init = jax.jit(lambda key: jp.init_adapter(method, params, key, roles=roles, **options))
    return init(jax.random.key(1))


def moved(adapter, scale=0.1):
    """An adapter moved away from where it starts, as by training."""
    rng = np.random.default_rng(0)
    shift = lambda x: x + scale * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return dataclasses.replace(adapter, params=jax.tree.map(shift, adapter.params))


def bound(model, params, adapter, **options):
    """The first argument of the lifted function."""
    tree = jp.bind(params, adapter, **options)
    return tree if model in ("linen", "nnx", "deep", "vision", "pixels") else tree["params"]
