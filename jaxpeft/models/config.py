"""The architecture of a decoder: one frozen record for every supported family."""

import dataclasses
import math


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

    def __post_init__(self):
        for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"RopeScaling.{field} must be positive and finite, got {value!r}.")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeScaling.high_freq_factor must be above low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer. Sizes count elements, not bytes.

    Attributes:
        model_type: The name in Hugging Face's ``config.json``, e.g. "llama".
        vocab_size: Rows of the embedding table.
        d_model: Width of the residual stream.
        d_ff: Inner width of the MLP.
        num_layers: How many blocks are stacked.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Channels of a head; not always ``d_model / num_heads``.
        tie_embeddings: Whether the embedding table is the head, too.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched; None leaves them.
        rms_eps: Added to the mean square in norms.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether attention's output projection has one.
        mlp_bias: Whether the MLP's projections have one.
        qk_norm: Whether queries and keys are normalised, head by head.
        windows: Sliding window of every layer in tokens; 0 means full attention.
        max_positions: Longest sequence the model was made for.
        bos_token_id: Begins a text, if anything does.
        eos_token_ids: All ids that end a turn, in the order of the files.
        pad_token_id: Fills rows up, if the files name one.
        initializer_range: Standard deviation of newly drawn weights.
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
