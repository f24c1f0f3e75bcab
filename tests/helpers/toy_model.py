"""A small random model with the toy tokenizer, and adapters that change what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from toy_tokenizer import VOCAB_SIZE, toy_tokenizer

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.models.transformer import Transformer

CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "tie_embeddings": False,
    "max_positions": 128,
    "initializer_range": 0.6,
}
# One for all: a model's tokenizer is a static part of it, another one compiles anew.
TOKENIZER = functools.cache(toy_tokenizer)


def toy_model(key, tokenizer=True, **changes):
    """A model whose weights are large enough for its likeliest tokens to change with the text."""
    config = jp.ModelConfig(**{**CONFIG, **changes})
    module = Transformer(config, jnp.float32)
    params = draw(key, shapes_of(module), config.initializer_range)
    leaves = paths.flatten(params)
    norms = {path: np.ones_like(leaf) for path, leaf in leaves.items() if "norm" in path}
    return jp.Model(
        params=paths.put(params, jax.device_put(norms)),
        config=config,
        module=module,
        tokenizer=TOKENIZER() if tokenizer is True else tokenizer or None,
        fingerprint="0" * 64,
        name="toy",
    )


@functools.cache
def shapes_of(module):
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def toy_adapter(key, base, **changes):
    """LoRA with both factors drawn at random."""
    method = jp.LoRA(**{"rank": 2, "alpha": 4.0, **changes})
    init = functools.partial(jp.init_adapter, method, base.params)
    shapes = jax.eval_shape(init, key)
    buffers = jax.jit(lambda key: init(key).buffers)(key)
    return jp.Adapter(draw(key, shapes.params, 0.5), buffers, shapes.spec)


def draw(key, shapes, scale):
    """Normal numbers in the shapes of a tree, by NumPy: nothing is compiled.

    Unlike `jnp.asarray`, which is a program for every shape, `jax.device_put` only copies.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jax.tree.map(
        lambda x: jax.device_put(scale * rng.standard_normal(x.shape, np.float32)), shapes
    )


def random_prompts(lengths, seed=0):
    """Token ids of the toy vocabulary, one list a length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths]
