"""Tiny models written the way other programs write them, from a list kept apart from ours."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

D, FF, LAYERS, HEADS, KV, HEAD, VOCAB = 16, 24, 2, 4, 2, 6, 40

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": {**BASE, "model_type": "llama"},
    "llama-tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {**BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 8},
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**BASE, "model_type": "qwen3"},
    "qwen3-biased": {**BASE, "model_type": "qwen3", "attention_bias": True},
}
QKV_BIASED = ("llama-biased", "qwen2", "qwen3-biased")
O_BIASED = ("llama-biased", "qwen3-biased")


def hf_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as transformers saves them."""
    q, kv = HEADS * HEAD, KV * HEAD
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not CONFIGS[kind]["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, D)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (D,),
            at + "post_attention_layernorm.weight": (D,),
            at + "self_attn.q_proj.weight": (q, D),
            at + "self_attn.k_proj.weight": (kv, D),
            at + "self_attn.v_proj.weight": (kv, D),
            at + "self_attn.o_proj.weight": (D, q),
            at + "mlp.gate_proj.weight": (FF, D),
            at + "mlp.up_proj.weight": (FF, D),
            at + "mlp.down_proj.weight": (D, FF),
        }
        if kind in QKV_BIASED:
            shapes |= {
                at + "self_attn.q_proj.bias": (q,),
                at + "self_attn.k_proj.bias": (kv,),
                at + "self_attn.v_proj.bias": (kv,),
            }
        if kind in O_BIASED:
            shapes[at + "self_attn.o_proj.bias"] = (D,)
        if kind == "llama-biased":
            shapes |= {
                at + "mlp.gate_proj.bias": (FF,),
                at + "mlp.up_proj.bias": (FF,),
                at + "mlp.down_proj.bias": (D,),
            }
        if kind.startswith("qwen3"):
            shapes |= {
                at + "self_attn.q_norm.weight": (HEAD,),
                at + "self_attn.k_norm.weight": (HEAD,),
            }
    return shapes


def hf_tensors(kind: str, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in hf_shapes(kind).items()
    }


def write_hf(
    folder: pathlib.Path, kind: str, tensors: dict[str, np.ndarray], shards: int = 1, **changes
) -> pathlib.Path:
    """Writes config.json and safetensors with the safetensors package."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], **changes}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def expected_params(kind: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our tree by "/"-joined path, from torch-layout tensors, spelled out."""
    found = {
        "embed_tokens/embedding": tensors["model.embed_tokens.weight"],
        "norm/scale": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors and not CONFIGS[kind]["tie_word_embeddings"]:
        found["lm_head/kernel"] = tensors["lm_head.weight"].T
    for name in hf_shapes(kind):
        if not name.startswith("model.layers.0."):
            continue
        module, leaf = name.removeprefix("model.layers.0.").rsplit(".", 1)
        values = [tensors[name.replace("layers.0.", f"layers.{i}.")] for i in range(LAYERS)]
        if "norm" in module:
            leaf = "scale"
        elif leaf == "weight":
            leaf, values = "kernel", [value.T for value in values]
        found[f"layers/{module.replace('.', '/')}/{leaf}"] = np.stack(values)
    return found


BF16 = ml_dtypes.bfloat16
