"""BitFit: which biases, and models that have none."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.methods.binding import bind
from jaxpeft.methods.leaves.bitfit import BitFit
from jaxpeft.models.config import ModelConfig
from jaxpeft.training.output.result import export_path

BIASED = ModelConfig(**{**dataclasses.asdict(CONFIG), "model_type": "qwen2", "qkv_bias": True})


def start(config=BIASED, **values):
    return BitFit(**values).init(decoder(config)[1], jax.random.key(0))


def test_every_bias_of_the_model_is_trained_and_nothing_else():
    biases = {p for p in paths.flatten(decoder(BIASED)[1]) if p.endswith("/bias")}
    assert len(biases) == 3
    assert set(start().spec.paths) == biases


def test_biases_of_other_layers_follow_the_base():
    params, place = decoder(BIASED)[1], "layers/self_attn/q_proj/bias"
    adapter = start(targets=("layers.0.self_attn.q_proj",))
    assert adapter.spec.paths == (place,)
    moved = adapter.replace(params=jax.tree.map(lambda x: x + 1.0, adapter.params))
    bound = paths.get(bind(params, moved)["params"], place)
    expected = np.asarray(paths.get(params, place)) + np.float32([[1.0], [0.0]])
    np.testing.assert_array_equal(bound, expected)


def test_a_model_without_biases_is_refused_with_the_names_of_models_that_have_them():
    with pytest.raises(jp.UserError, match="this model has none; Qwen2 and"):
        start(CONFIG)


def test_peft_has_no_folders_for_it(tmp_path):
    with pytest.raises(jp.UserError, match="no folders for adapters of kind 'bitfit'"):
        jp.save_adapter(tmp_path / "out", start(), toy_model(jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "place"), [("bitfit", "model"), ("full", "model"), ("lora", "adapter")]
)
def test_a_run_leaves_a_whole_model_where_peft_has_no_folder(tmp_path, name, place):
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: base}}\nmethod: {{name: {name}}}\ndata: {{train: rows.jsonl}}\n"
        "train: {steps: 1}\noutput_dir: out\n"
    )
    assert export_path(jp.load_config(str(tmp_path / "run.yaml"))).name == place
