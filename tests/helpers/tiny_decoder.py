"""A small random decoder that is built once a configuration, and batches for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.models.config import ModelConfig
from jaxpeft.models.transformer import Transformer

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=48,
    d_model=16,
    d_ff=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    initializer_range=0.2,
)
WINDOWED = dataclasses.replace(
    CONFIG, tie_embeddings=False, qkv_bias=True, qk_norm=True, windows=(4, 0)
)
"""A window in every second layer, biases, norms of queries and keys, and a head of its own."""


@functools.cache
def decoder(config=CONFIG, remat="none", dtype=jnp.float32):
    """The module and its parameters; biases and norms are drawn, too. Nobody changes them."""
    with jax.ensure_compile_time_eval():  # a traced function may be the first to ask
        module = Transformer(config, dtype, remat)
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
        params = draw(shapes, seed=0, scale=0.2)
        leaves = paths.flatten(params)
        norms = {path: 1 + np.asarray(leaf) for path, leaf in leaves.items() if "norm" in path}
        return module, paths.put(params, jax.device_put(norms))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, *arguments, **options):
    """``module.apply`` as one program; outside of ``jax.jit`` each operation would be one."""
    return module.apply(variables, *arguments, **options)


def draw(shapes, seed, scale):
    """Normal numbers in the shapes of a tree, by NumPy: nothing is compiled.

    Unlike `jnp.asarray`, which is a program for every shape, `jax.device_put` only copies.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(scale * rng.standard_normal(x.shape, np.float32)), shapes
    )


@functools.cache
def make_adapter(method=LoRA(rank=2, alpha=4.0), config=CONFIG, trained=False):  # noqa: B008
    """An adapter as it starts, B at zero, or with all factors drawn as if it were trained."""
    init = functools.partial(init_adapter, method, decoder(config)[1])
    drawn = draw(jax.eval_shape(init, jax.random.key(0)).params, seed=1, scale=0.25)
    if not trained:
        leaves = paths.flatten(drawn)
        ends = {path: np.zeros_like(leaf) for path, leaf in leaves.items() if path.endswith("/b")}
        drawn = paths.put(drawn, jax.device_put(ends))
    buffers = jax.jit(lambda key: init(key).buffers)(jax.random.key(0))
    return Adapter(drawn, buffers, jax.eval_shape(init, jax.random.key(0)).spec)


def make_batch(rows, seq, seed=0, vocab=CONFIG.vocab_size):
    """Rows of random tokens with targets; row ``i`` supervises its last ``seq - 1 - i`` tokens."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, seq + 1))
    supervised = np.arange(seq)[None] > np.arange(rows)[:, None] % (seq - 1)
    batch = {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "weights": supervised.astype(np.float32),
        "segment_ids": np.ones((rows, seq), np.int32),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (rows, 1)),
    }
    return jax.device_put(batch)
