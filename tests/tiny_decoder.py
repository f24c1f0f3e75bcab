"""A small random decoder that is built once a configuration, and batches for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.methods import LoRA, init_adapter
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


@functools.cache
def decoder(config=CONFIG, remat="none", dtype=jnp.float32):
    """The module and its parameters; biases and norms are drawn, too. Nobody changes them."""
    module = Transformer(config, dtype, remat)

    @jax.jit
    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return jax.tree.map(jnp.add, params, jax.tree.map(lambda x: 0.1 * x, noise(params, key)))

    return module, init(jax.random.key(0))


def noise(tree, key):
    """Normal numbers in the shapes of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@functools.cache
def make_adapter(method=LoRA(rank=2, alpha=4.0), config=CONFIG, trained=False):  # noqa: B008
    """A new adapter, or one with all factors drawn as if it were trained."""
    params = decoder(config)[1]

    @jax.jit
    def init(key):
        new = init_adapter(method, params, key)
        if not trained:
            return new
        return new.replace(params=jax.tree.map(lambda x: x / 4, noise(new.params, key)))

    return init(jax.random.key(2))


def make_batch(rows, seq, seed=0, vocab=CONFIG.vocab_size):
    """Rows of random tokens with targets; row ``i`` supervises its last ``seq - 1 - i`` tokens."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, seq + 1))
    supervised = np.arange(seq)[None] > np.arange(rows)[:, None] % (seq - 1)
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.asarray(supervised, jnp.float32),
        "segment_ids": jnp.ones((rows, seq), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(seq), (rows, seq)),
    }
