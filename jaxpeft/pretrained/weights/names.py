"""The table of names: parameter paths, Hugging Face's tensor names, and GGUF's tensor names.

The parameter tree has Hugging Face's module names, with the layers stacked on axis 0. So a row of
the table stands for one parameter and, if it is stacked, for one tensor per layer in a file. Files
hold linear weights as ``(out, in)``; kernels here are ``(in, out)``. In its "llama" architecture
llama.cpp reorders the rows of q and k so that the two halves of the rotary pairs interleave;
`Entry.heads` is the number of heads that those rows form.
"""

import dataclasses

from jaxpeft.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter, and its place in files.

    Attributes:
        path: "/"-joined path in the parameter tree.
        hf: Hugging Face's tensor name, with ``{layer}`` if stacked.
        gguf: GGUF's tensor name, with ``{layer}`` if stacked.
        shape: Shape of one layer of the parameter.
        transposed: Whether files hold the transpose.
        stacked: Whether the parameter has a layer axis in front.
        heads: Heads whose rows a GGUF file of architecture "llama" interleaves; 0 for none.
    """

    path: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    transposed: bool = False
    stacked: bool = True
    heads: int = 0

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in a file."""
        return self.shape[::-1] if self.transposed else self.shape

    def file_names(self, style: str, num_layers: int) -> list[str]:
        """The names of the tensors that make this parameter, in layer order.

        Args:
            style: "hf" or "gguf".
            num_layers: Layers of the model.
        """
        pattern = self.hf if style == "hf" else self.gguf
        return [pattern.format(layer=i) for i in range(num_layers)] if self.stacked else [pattern]


def name_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every parameter of a model of this `config`, in the order files are read and written."""
    d, q = config.d_model, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim

    rows = [
        Entry(
            path="embed_tokens/embedding",
            hf="model.embed_tokens.weight",
            gguf="token_embd.weight",
            shape=(config.vocab_size, d),
            stacked=False,
        ),
        _scale("input_layernorm", "attn_norm", d),
        *_linear("self_attn/q_proj", "attn_q", d, q, config.qkv_bias, config.num_heads),
        *_linear("self_attn/k_proj", "attn_k", d, kv, config.qkv_bias, config.num_kv_heads),
        *_linear("self_attn/v_proj", "attn_v", d, kv, config.qkv_bias),
        *_linear("self_attn/o_proj", "attn_output", q, d, config.out_bias),
    ]
    if config.qk_norm:
        rows.append(_scale("self_attn/q_norm", "attn_q_norm", config.head_dim))
        rows.append(_scale("self_attn/k_norm", "attn_k_norm", config.head_dim))
    rows += [
        _scale("post_attention_layernorm", "ffn_norm", d),
        *_linear("mlp/gate_proj", "ffn_gate", d, config.d_ff, config.mlp_bias),
        *_linear("mlp/up_proj", "ffn_up", d, config.d_ff, config.mlp_bias),
        *_linear("mlp/down_proj", "ffn_down", config.d_ff, d, config.mlp_bias),
        Entry(
            path="norm/scale",
            hf="model.norm.weight",
            gguf="output_norm.weight",
            shape=(d,),
            stacked=False,
        ),
    ]
    if not config.tie_embeddings:
        rows.append(
            Entry(
                path="lm_head/kernel",
                hf="lm_head.weight",
                gguf="output.weight",
                shape=(d, config.vocab_size),
                transposed=True,
                stacked=False,
            )
        )
    return tuple(rows)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its "/"-joined path, layer axis included."""
    return {
        entry.path: ((config.num_layers,) if entry.stacked else ()) + entry.shape
        for entry in name_table(config)
    }


def _scale(module: str, gguf: str, width: int) -> Entry:
    return Entry(
        path=f"layers/{module}/scale",
        hf=f"model.layers.{{layer}}.{module.replace('/', '.')}.weight",
        gguf=f"blk.{{layer}}.{gguf}.weight",
        shape=(width,),
    )


def _linear(
    module: str, gguf: str, d_in: int, d_out: int, bias: bool, heads: int = 0
) -> list[Entry]:
    hf = f"model.layers.{{layer}}.{module.replace('/', '.')}"
    rows = [
        Entry(
            path=f"layers/{module}/kernel",
            hf=f"{hf}.weight",
            gguf=f"blk.{{layer}}.{gguf}.weight",
            shape=(d_in, d_out),
            transposed=True,
            heads=heads,
        )
    ]
    if bias:
        rows.append(
            Entry(
                path=f"layers/{module}/bias",
                hf=f"{hf}.bias",
                gguf=f"blk.{{layer}}.{gguf}.bias",
                shape=(d_out,),
                heads=heads,
            )
        )
    return rows
