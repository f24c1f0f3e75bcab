"""The keys and values that a base computes for a prompt, from which a prefix may start."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpeft.core.errors import UserError


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Checks the ids of a prompt.

    Raises:
        UserError: There are no ids, or one is outside the vocabulary.
    """
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if not ids:
        raise UserError("prompt: it has no tokens.")
    if outside:
        raise UserError(
            f"prompt: token id {outside[0]} is outside the model's vocabulary of {vocab_size}; "
            "tokenizer and model do not belong together."
        )


def keys_and_values(config: Any, module: Any, params: dict, ids: Sequence[int]) -> dict[str, Any]:
    """Keys and values of a prompt in every layer, in float32."""
    from jaxpeft.models.cache import init_cache
    from jaxpeft.models.transformer import Transformer

    module = module or Transformer(config)

    @jax.jit
    def run(params: dict, ids: Int[Array, "1 n"]) -> dict[str, Any]:
        empty = init_cache(config, 1, ids.shape[1], module.compute_dtype)
        _, cache = module.apply({"params": params}, ids, cache=empty, return_hidden=True)
        heads = {"k": cache.k[:, 0], "v": cache.v[:, 0]}
        return {name: x.swapaxes(1, 2).astype(jnp.float32) for name, x in heads.items()}

    return run(params, jnp.asarray([ids], jnp.int32))
