"""Every method trained from YAML by the program: it stops, goes on, and what it saved loads."""

import pathlib
import random
import shutil

import jax
import numpy as np
import optax
import pytest
from tiny_run import Files, make_row, training_lines, write_config, write_rows
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.methods.registry import METHODS
from jaxpeft.pretrained.load import load_model

LORA = {"name": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj", "layers.1.mlp.up_proj"]}
KERNELS = {"targets": LORA["targets"]}
SOFT = {"num_tokens": 3}
RUNS = {
    "lora plus": (LORA, {"lora_plus_ratio": 4.0}),
    "lora fa": (LORA, {"lora_fa": True}),
    "dora": ({**LORA, "dora": True}, {}),
    "pissa": ({**LORA, "init_weights": "pissa"}, {}),
    "adalora": ({"name": "adalora", "rank": 1, "initial_rank": 2, **KERNELS}, {}),
    "vera": ({"name": "vera", "rank": 4, **KERNELS}, {}),
    "oft": ({"name": "oft", "block_size": 4, **KERNELS}, {}),
    "ia3": ({"name": "ia3"}, {}),
    "loha": ({"name": "loha", "rank": 2, **KERNELS}, {}),
    "lokr": ({"name": "lokr", "rank": 2, **KERNELS}, {}),
    "ln_tuning": ({"name": "ln_tuning"}, {}),
    "bitfit": ({"name": "bitfit"}, {}),
    "trainable_tokens": ({"name": "trainable_tokens", "token_ids": [*range(100)]}, {}),
    "prompt_tuning": ({"name": "prompt_tuning", **SOFT}, {}),
    "p_tuning": ({"name": "p_tuning", **SOFT, "hidden_size": 8}, {}),
    "multitask": ({"name": "multitask_prompt_tuning", **SOFT, "num_tasks": 2}, {}),
    "prefix_tuning": ({"name": "prefix_tuning", **SOFT}, {}),
}
ALIKE = {
    "oft": "lokr",
    "ia3": "lokr",
    "loha": "lokr",
    "ln_tuning": "bitfit",
    "prompt_tuning": "p_tuning",
    "multitask": "p_tuning",
}
"""Methods whose state has the form of another one's, which stands for them in the default run."""


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with biases, and rows of two tasks."""
    folder = tmp_path_factory.mktemp("files")
    files = Files(folder / "model", folder / "train.jsonl", folder / "train.jsonl")
    jp.save_model(str(files.model), toy_model(jax.random.key(0), qkv_bias=True, out_bias=True))
    draw = random.Random(0)
    write_rows(files.train, [make_row(draw) | {"task": i % 2} for i in range(40)])
    return files


def train(files: Files, output: pathlib.Path, method: dict, steps: int = 2, **optim) -> None:
    program.main(
        [
            write_config(
                files,
                output,
                method=method,
                optim=optim,
                train={"steps": steps, "batch_size": 2},
                data={"eval": None},
                evaluation=None,
                checkpoint={"every": 1},
            )
        ]
    )


def exported(output: pathlib.Path) -> dict[str, bytes]:
    """What a run leaves behind: an adapter, or a model where the base was trained."""
    folder = next(p for p in (output / "adapter", output / "model") if p.exists())
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tokens_of(base: jp.Model) -> np.ndarray:
    """Tokens that the rows are made of."""
    ids = base.tokenizer("abcdefgh")["input_ids"]
    return np.array([ids[:4], ids[4:8]])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in RUNS]
)
def test_a_run_goes_on_to_the_same_bytes_and_its_adapter_loads(files, tmp_path, name, capsys):
    method, optim = RUNS[name]
    output = tmp_path / "run"
    train(files, output, method, steps=3, **optim)
    assert "no gradient reached" not in capsys.readouterr().err
    whole, losses = exported(output), [line["loss"] for line in training_lines(output)]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    for place in (output / "adapter", output / "checkpoints" / "3"):
        shutil.rmtree(place, ignore_errors=True)
    train(files, output, method, steps=3, **optim)  # goes on after the second step
    assert exported(output) == whole
    base = load_model(files.model)
    if method["name"] == "bitfit":  # a model of its own
        trained = load_model(output / "model")
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained.params, base.params)
        assert any(jax.tree.leaves(changed))
        return
    adapter = jp.load_adapter(output, base)
    assert adapter.spec.kind == method["name"]
    ids = tokens_of(base)
    assert np.abs(base(ids, adapter=adapter) - base(ids)).max() > 1e-3


def test_what_a_method_adds_to_the_update_rule_sees_clipped_gradients(files, tmp_path, monkeypatch):
    norms = []

    def spy(self, tx, steps):
        def update(grads, state, params=None):
            jax.debug.callback(lambda norm: norms.append(float(norm)), optax.tree.norm(grads))
            return grads, state

        look = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
        return optax.chain(look, tx)

    monkeypatch.setattr(METHODS["lora"], "wrap_optimizer", spy)
    train(files, tmp_path / "run", LORA, clip_norm=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("dora", {**LORA, "dora": True}),
        ("pissa", {**LORA, "rank": 4, "alpha": 8}),  # saved as a plain LoRA of twice the rank
        ("multitask", RUNS["multitask"][0]),
        ("p_tuning", {**RUNS["p_tuning"][0], "encoder": "none"}),  # the encoder is not saved
    ],
)
def test_a_run_begins_where_the_adapter_it_goes_on_from_ended(files, tmp_path, name, described):
    train(files, tmp_path / "first", RUNS[name][0])
    start = {**described, "init_from": str(tmp_path / "first" / "adapter")}
    train(files, tmp_path / "second", start, learning_rate=1e-12)
    base = load_model(files.model)
    before, after = (jp.load_adapter(tmp_path / run, base) for run in ("first", "second"))
    ids = tokens_of(base)
    logits = base(ids, adapter=before)
    np.testing.assert_allclose(base(ids, adapter=after), logits, rtol=1e-5, atol=1e-5)


def test_the_loss_that_is_logged_leaves_the_penalty_out(files, tmp_path):
    lines = {}
    for strength in (0.0, 0.5):
        method = RUNS["adalora"][0] | {"orthogonality": strength}
        train(files, tmp_path / str(strength), method)
        lines[strength] = training_lines(tmp_path / str(strength))[0]
    assert lines[0.5]["loss"] == pytest.approx(lines[0.0]["loss"], rel=1e-5)
    assert "penalty" not in lines[0.0]
    assert lines[0.5]["penalty"] > 0.1


def test_every_method_is_trained_here():
    assert {method["name"] for method, _ in RUNS.values()} == set(METHODS) - {"full"}
