"""A small random model with the toy tokenizer, and adapters that change what it says."""

import jax
import jax.numpy as jnp
from toy_tokenizer import VOCAB_SIZE, toy_tokenizer

import jaxpeft as jp
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


def toy_model(key, tokenizer=True, **changes):
    """A model whose weights are large enough for its likeliest tokens to change with the text."""
    config = jp.ModelConfig(**{**CONFIG, **changes})
    module = Transformer(config, jnp.float32)
    params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    return jp.Model(
        params=params,
        config=config,
        module=module,
        tokenizer=toy_tokenizer() if tokenizer is True else tokenizer or None,
        fingerprint="0" * 64,
        name="toy",
    )


def toy_adapter(key, base, **changes):
    """LoRA with both factors drawn at random."""
    adapter = jp.init_adapter(jp.LoRA(**{"rank": 2, "alpha": 4.0, **changes}), base.params, key)
    leaves, tree = jax.tree.flatten(adapter.params)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape) / 2 for k, x in zip(keys, leaves, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(tree, drawn))
