"""Reads and writes ``config.json`` of a Hugging Face folder, without running its code.

Missing keys have the default of the transformers class of that ``model_type``. Both forms of rotary
settings (``rope_parameters`` of transformers 5, ``rope_theta`` and ``rope_scaling`` before it) are
read, and both are written.
"""

import dataclasses
import math
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.models.config import ModelConfig, RopeScaling
from jaxpeft.pretrained.hf.fields import Fields

# Defaults of the transformers classes, for keys that a file may leave out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architecture": "LlamaForCausalLM",
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "architecture": "MistralForCausalLM",
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "architecture": "Qwen2ForCausalLM",
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "architecture": "Qwen3ForCausalLM",
    },
}
SUPPORTED = tuple(DEFAULTS)
ROPE_TYPES = ("default", "linear", "llama3")


def config_from_hf(d: dict, where: str = "config.json") -> ModelConfig:
    """Reads the dict in a ``config.json``.

    Args:
        d: The parsed file; ``eos_token_id`` may be an id or a list of ids.
        where: File name for messages.

    Returns:
        The architecture, checked for consistency.

    Raises:
        UserError: Unsupported ``model_type`` or setting, a missing or inconsistent field.
    """
    model_type = d.get("model_type")
    if model_type not in SUPPORTED:
        raise UserError(
            f"{where}: model_type: {model_type!r:.60} is not supported; supported: "
            f"{', '.join(SUPPORTED)} (Llama 2/3 and SmolLM2 are llama, Qwen2.5 is qwen2)"
        )
    fields = Fields({**DEFAULTS[model_type], **d}, where)
    quantized = fields.get("quantization_config", fields.get("quantization"))
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        if isinstance(quantized, dict) and method is None and "bits" in quantized:
            method = "MLX"
        raise fields.error(
            "quantization_config",
            f"weights quantised by {method!r} are not read; give the unquantised model or a GGUF "
            "file",
        )
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    if d.get("head_dim") is None and model_type != "qwen3" and d_model % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {d_model}")
    act = fields.get("hidden_act", "silu")
    if act != "silu":
        raise fields.error("hidden_act", f"{act!r} is not supported; supported: silu")
    theta, scaling = _rope(fields)
    bias = model_type in ("llama", "qwen3") and fields.flag("attention_bias")
    return check_config(
        ModelConfig(
            model_type=model_type,
            vocab_size=fields.size("vocab_size"),
            d_model=d_model,
            d_ff=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.size("num_key_value_heads", heads),
            head_dim=fields.size("head_dim", d_model // heads),
            tie_embeddings=fields.flag("tie_word_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            qkv_bias=bias or model_type == "qwen2",
            out_bias=bias,
            mlp_bias=model_type == "llama" and fields.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
            windows=_windows(fields, model_type),
            max_positions=fields.size("max_position_embeddings"),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_ids=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            initializer_range=fields.number("initializer_range", 0.02),
        ),
        where,
        {
            "num_kv_heads": "num_key_value_heads",
            "num_heads": "num_attention_heads",
            "rms_eps": "rms_norm_eps",
        },
    )


def check_config(config: ModelConfig, where: str, names: dict[str, str]) -> ModelConfig:
    """Returns `config` if its numbers fit together.

    Args:
        config: The architecture.
        where: File name for messages.
        names: The file's name of a field, if it differs from that of `ModelConfig`.

    Raises:
        UserError: Numbers do not fit together; the message has the file's names.
    """

    def fail(field: str, text: str) -> UserError:
        return UserError(f"{where}: {names.get(field, field)}: {text}")

    if config.num_heads % config.num_kv_heads:
        raise fail(
            "num_kv_heads",
            f"{config.num_kv_heads} does not divide the {config.num_heads} attention heads",
        )
    if config.head_dim % 2:
        raise fail("head_dim", f"{config.head_dim} is odd; rotary embeddings need pairs")
    if not (config.rope_theta > 0 and math.isfinite(config.rope_theta)):
        raise fail("rope_theta", f"expected a positive number, got {config.rope_theta}")
    if not (config.rms_eps > 0 and math.isfinite(config.rms_eps)):
        raise fail("rms_eps", f"expected a positive number, got {config.rms_eps}")
    for field in ("bos_token_id", "pad_token_id"):
        token = getattr(config, field)
        if token is not None and token >= config.vocab_size:
            raise fail(field, f"{token} is outside the vocabulary of {config.vocab_size}")
    for token in config.eos_token_ids:
        if token >= config.vocab_size:
            raise fail("eos_token_id", f"{token} is outside the vocabulary of {config.vocab_size}")
    return config


def config_to_hf(config: ModelConfig) -> dict:
    """The ``config.json`` that transformers needs to load a folder with this `config`.

    Raises:
        UserError: transformers' class of this ``model_type`` cannot express the config.
    """
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"model_type: {config.model_type!r} has no Hugging Face class here; "
            f"supported: {', '.join(SUPPORTED)}"
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": config.rope_scaling.low_freq_factor,
                "high_freq_factor": config.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": config.rope_scaling.original_max_positions,
            }
    eos = list(config.eos_token_ids)
    d = {
        "architectures": [DEFAULTS[config.model_type]["architecture"]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "attention_dropout": 0.0,
    }
    if config.model_type in ("llama", "qwen3"):
        d["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        d["mlp_bias"] = config.mlp_bias
    d |= _windows_to_hf(config)
    back = config_from_hf(d, "config.json to be written")
    config = dataclasses.replace(config, windows=config.windows if any(config.windows) else ())
    if back != config:
        differing = [
            name
            for name in ModelConfig.__dataclass_fields__
            if getattr(back, name) != getattr(config, name)
        ]
        raise UserError(
            f"config: {', '.join(differing)}: transformers' {config.model_type!r} models cannot "
            "have these values; choose the model_type that can"
        )
    return d


def _windows(fields: "Fields", model_type: str) -> tuple[int, ...]:
    layers, window = fields.size("num_hidden_layers"), fields.get("sliding_window")
    if model_type == "llama":
        return ()
    if model_type == "mistral":
        return () if window is None else (fields.size("sliding_window"),) * layers
    if not fields.flag("use_sliding_window") or window is None:
        return ()
    window = fields.size("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.size("max_window_layers", least=0)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list):
        raise fields.error("layer_types", f"expected a list, got {kinds!r}")
    if len(kinds) != layers:
        raise fields.error("layer_types", f"{len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"{kind!r} is not supported")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _windows_to_hf(config: ModelConfig) -> dict:
    windows = config.windows if any(config.windows) else ()
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": windows[0] if windows else None}
    kinds = ["sliding_attention" if w else "full_attention" for w in windows]
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": max(windows) if windows else None,
        "max_window_layers": config.num_layers - len([w for w in windows if w]),
        "layer_types": kinds or ["full_attention"] * config.num_layers,
    }


def _rope(fields: "Fields") -> tuple[float, RopeScaling | None]:
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    d = fields.get(key) or {}
    if not isinstance(d, dict):
        raise fields.error(key, f"expected an object, got {d!r}")
    rope = Fields({"rope_theta": fields.get("rope_theta", 10000.0), **d}, fields.where, f"{key}.")
    theta = rope.number("rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise rope.error(
            "rope_type", f"{kind!r} is not supported; supported: default, linear, llama3"
        )
    for holder in (fields, rope):
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise rope.error("high_freq_factor", f"{high:g} is not above low_freq_factor, {low:g}")
    return theta, RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=rope.size(
            "original_max_position_embeddings", fields.size("max_position_embeddings")
        ),
    )
