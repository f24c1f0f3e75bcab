"""config.json in and out: transformers' own classes are the reference for what a file means."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BASE, CONFIGS

from jaxpeft.core.errors import UserError
from jaxpeft.models.config import ModelConfig, RopeScaling
from jaxpeft.pretrained.hf.config import config_from_hf, config_to_hf
from jaxpeft.pretrained.weights.names import param_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def transformers_config(d: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return transformers.AutoConfig.for_model(**d)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fields_mean_what_transformers_says(kind):
    d = CONFIGS[kind]
    ours, theirs = config_from_hf(d), transformers_config(d)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.d_model, ours.d_ff) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.num_heads, ours.num_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert ours.head_dim == theirs.head_dim
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.out_bias == bool(getattr(theirs, "attention_bias", False))
    assert ours.mlp_bias == bool(getattr(theirs, "mlp_bias", False))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_left_out_keys_take_the_defaults_of_transformers(model_type):
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    d = {"model_type": model_type, "num_attention_heads": 32, **{k: BASE[k] for k in needed}}
    d["hidden_size"] = 64
    ours, theirs = config_from_hf(d), transformers_config(d)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    window = theirs.sliding_window if model_type == "mistral" else None
    assert ours.windows == ((window,) * 2 if window else ())


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
def test_windows_of_qwen_are_those_of_transformers(model_type, changes):
    d = {**BASE, "model_type": model_type, "num_hidden_layers": 3, **changes}
    theirs = transformers_config(d)
    expected = tuple(
        theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types
    )
    assert config_from_hf(d).windows == (expected if any(expected) else ())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            1e4,
            RopeScaling(kind="linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            5e5,
            RopeScaling(kind="llama3", factor=8.0, original_max_positions=32),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, None),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 7e4}, "rope_scaling": None},
            7e4,
            RopeScaling(kind="llama3", factor=8.0, original_max_positions=32),
        ),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}},
            1e4,
            RopeScaling(kind="llama3", factor=8.0, original_max_positions=64),
        ),
    ],
)
def test_rotary_settings_are_read_in_both_spellings(model_type, changes, theta, scaling):
    d = {**BASE, "model_type": model_type, **changes}
    config = config_from_hf(d)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    theirs = transformers_config(d).rope_parameters
    assert theirs["rope_theta"] == theta
    assert theirs["rope_type"] == (scaling.kind if scaling else "default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type: 'gpt2' .*supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type: None is not supported"),
        ({"hidden_size": None}, "hidden_size: expected a positive whole number, got None"),
        ({"vocab_size": 10**12}, "vocab_size: at most 16,777,216 is supported, got 1000000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 4 attention"),
        ({"num_attention_heads": 5, "head_dim": None}, "5 does not divide hidden_size 16"),
        ({"head_dim": 5}, "head_dim: 5 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; supported: silu"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"eos_token_id": 40}, "eos_token_id: 40 is outside the vocabulary of 40"),
        ({"eos_token_id": "2"}, "eos_token_id: expected a token id"),
        ({"bos_token_id": 40}, "bos_token_id: 40 is outside"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope_scaling\.rope_type: 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.rope_type: 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: expected a positive"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
            r"rope_scaling\.factor: expected a positive number, got inf",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": float("nan")}}, r"factor: .* number, got nan"),
        ({"rope_scaling": {**LLAMA3, "factor": 10**400}}, r"factor: expected a positive number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": float("inf")}}, r"low_freq_factor: exp"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            r"rope_scaling\.high_freq_factor: 4 is not above low_freq_factor, 4",
        ),
        (
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 0.5}},
            r"rope_parameters\.high_freq_factor: 0\.5 is not above low_freq_factor, 1",
        ),
        ({"initializer_range": float("inf")}, "initializer_range: expected a positive number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ({"quantization_config": {}}, "quantization_config: weights quantised by None"),
        ({"quantization_config": "gptq"}, "quantization_config: weights quantised by 'gptq'"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(changes, message):
    with pytest.raises(UserError, match=message) as error:
        config_from_hf({**CONFIGS["llama"], **changes}, "m/config.json")
    assert str(error.value).startswith("m/config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": 3}, "layer_types: expected a list, got 3"),
        ({"layer_types": "full_attention"}, "layer_types: expected a list, got 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 entries for 2 layers"),
        ({"layer_types": ["full_attention", {}]}, r"layer_types: \{\} is not supported"),
        ({"layer_types": ["chunked", 3]}, "layer_types: 'chunked' is not supported"),
        ({"max_window_layers": "x"}, "max_window_layers: expected a whole number of at least 0"),
        ({"max_window_layers": -1}, "max_window_layers: expected a whole number of at least 0"),
        ({"max_window_layers": 1.5}, "max_window_layers: expected a whole number of at least 0"),
        ({"sliding_window": "x"}, "sliding_window: expected a positive whole number, got 'x'"),
    ],
)
def test_windows_that_do_not_fit_are_refused_by_field(changes, message):
    d = {**CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 8, **changes}
    with pytest.raises(UserError, match=f"^m/config.json: {message}"):
        config_from_hf({**d, "num_hidden_layers": 2}, "m/config.json")


def test_a_negative_token_id_means_none():
    assert config_from_hf({**CONFIGS["llama"], "pad_token_id": -1}).pad_token_id is None


SCALINGS = [
    None,
    RopeScaling(kind="linear", factor=2.0),
    RopeScaling(kind="llama3", factor=4.0, high_freq_factor=3.0, original_max_positions=16),
]
sizes = st.integers(1, 8)


@st.composite
def config_fields(draw):
    model_type = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    layers, kv, vocab = draw(sizes), draw(sizes), draw(st.integers(3, 99))
    bias = model_type in ("llama", "qwen3") and draw(st.booleans())
    if model_type == "mistral":
        windows = draw(st.sampled_from([(), (4,) * layers]))
    elif model_type == "llama":
        windows = ()
    else:
        windows = tuple(draw(st.lists(st.sampled_from([0, 4]), min_size=layers, max_size=layers)))
        windows = windows if any(windows) else ()
    return {  # built in the test: checking shapes draws random numbers of its own
        "model_type": model_type,
        "vocab_size": vocab,
        "d_model": draw(sizes),
        "d_ff": draw(sizes),
        "num_layers": layers,
        "num_heads": kv * draw(sizes),
        "num_kv_heads": kv,
        "head_dim": 2 * draw(sizes),
        "tie_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.floats(1.0, 1e7)),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
        "rms_eps": draw(st.floats(1e-8, 1e-3)),
        "qkv_bias": bias or model_type == "qwen2",
        "out_bias": bias,
        "mlp_bias": model_type == "llama" and draw(st.booleans()),
        "qk_norm": model_type == "qwen3",
        "windows": windows,
        "max_positions": draw(sizes),
        "bos_token_id": draw(st.none() | st.integers(0, vocab - 1)),
        "eos_token_ids": tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3, unique=True))),
        "pad_token_id": draw(st.none() | st.integers(0, vocab - 1)),
    }


@given(config_fields())
@settings(max_examples=100, deadline=None)
def test_written_then_read_is_the_same_config(fields):
    config = ModelConfig(**fields)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("field", [{"qk_norm": True}, {"windows": (4, 4)}])
def test_a_config_transformers_cannot_express_is_not_written(field):
    import dataclasses

    config = dataclasses.replace(config_from_hf(CONFIGS["llama"]), **field)
    with pytest.raises(UserError, match=rf"{next(iter(field))}: transformers' 'llama' models"):
        config_to_hf(config)


def test_param_shapes_of_a_tied_biased_model_are_these():
    config = config_from_hf(
        {**CONFIGS["qwen2"], "num_hidden_layers": 3, "vocab_size": 11, "intermediate_size": 7}
    )
    assert param_shapes(config) == {
        "embed_tokens/embedding": (11, 16),
        "layers/input_layernorm/scale": (3, 16),
        "layers/self_attn/q_proj/kernel": (3, 16, 24),
        "layers/self_attn/q_proj/bias": (3, 24),
        "layers/self_attn/k_proj/kernel": (3, 16, 12),
        "layers/self_attn/k_proj/bias": (3, 12),
        "layers/self_attn/v_proj/kernel": (3, 16, 12),
        "layers/self_attn/v_proj/bias": (3, 12),
        "layers/self_attn/o_proj/kernel": (3, 24, 16),
        "layers/post_attention_layernorm/scale": (3, 16),
        "layers/mlp/gate_proj/kernel": (3, 16, 7),
        "layers/mlp/up_proj/kernel": (3, 16, 7),
        "layers/mlp/down_proj/kernel": (3, 7, 16),
        "norm/scale": (16,),
    }
