"""GGUF files written by the gguf package, with the names and row order of llama.cpp."""

import pathlib

import gguf
import numpy as np
from tiny_models import CONFIGS

Type = gguf.GGMLQuantizationType
NAMES = {  # llama.cpp's names, as its converter writes them
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k of llama models."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: pathlib.Path,
    kind: str,
    tensors: dict[str, np.ndarray],
    quant: Type = Type.F32,
    metadata=None,
    extra=None,
) -> pathlib.Path:
    d = CONFIGS[kind]
    arch = "llama" if d["model_type"] == "mistral" else d["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(d["num_hidden_layers"])
    writer.add_context_length(d["max_position_embeddings"])
    writer.add_embedding_length(d["hidden_size"])
    writer.add_feed_forward_length(d["intermediate_size"])
    writer.add_head_count(d["num_attention_heads"])
    writer.add_head_count_kv(d["num_key_value_heads"])
    writer.add_key_length(d["head_dim"])
    writer.add_value_length(d["head_dim"])
    writer.add_rope_freq_base(d["rope_theta"])
    writer.add_layer_norm_rms_eps(d["rms_norm_eps"])
    writer.add_bos_token_id(d["bos_token_id"])
    writer.add_eos_token_id(d["eos_token_id"])
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in tensors.items():
        if arch == "llama" and "q_proj" in name:
            value = llama_cpp_permute(value, d["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            value = llama_cpp_permute(value, d["num_key_value_heads"])
        chosen = quant if value.ndim == 2 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(value, chosen), raw_dtype=chosen)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
