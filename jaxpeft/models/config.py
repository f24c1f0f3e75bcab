"""What shapes a decoder: one frozen record for every supported architecture."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies.

    Attributes:
        kind: "linear" (positions divided by `factor`) or "llama3" (section 3.2 of the
            Llama 3 report: long wavelengths divided, short ones kept, smooth between).
        factor: How far the context is stretched.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        original_max_positions: llama3 only: context length before stretching.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer. Sizes count elements, not bytes.

    Attributes:
        model_type: The name in Hugging Face's ``config.json``, e.g. "llama".
        windows: Sliding window of every layer in tokens; 0 means full attention.
        eos_token_ids: All ids that end a turn, in the order of the files.
    """

    model_type: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    max_positions: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
