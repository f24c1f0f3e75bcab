"""``method.init_from``: a run goes on from a saved adapter, or says why it cannot."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny_run import evaluation_lines, make_files, training_lines, write_config

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_file
from jaxpeft.pretrained import adapters
from jaxpeft.updates.losses import make_lm_loss
from jaxpeft.updates.step import init_train_state, make_train_step

METHOD = {"name": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def first(files, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished run; look at it, don't change it."""
    output = tmp_path_factory.mktemp("first") / "run"
    train(files, output)
    return output


def train(files, output, method=(), **changes):
    section = METHOD | dict(method)
    program.main([write_config(files, output, method=section, **changes)])


def test_the_first_metrics_are_those_of_the_saved_adapter(files, first, tmp_path):
    train(files, tmp_path / "run", {"init_from": str(first), "dropout": 0.2}, train={"steps": 1})
    before, after = evaluation_lines(first)[-1], evaluation_lines(tmp_path / "run")[0]
    assert after["step"] == 0
    for name in ("eval_loss", "eval_token_accuracy"):
        assert after[name] == pytest.approx(before[name], rel=1e-6)
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0.2


def test_going_on_is_training_the_saved_adapter_with_a_fresh_optimizer(files, first, tmp_path):
    """The other way there: `make_train_step` by hand, from the folder, on the same batches."""
    steps, method = 3, {"init_from": str(first / "adapter")}
    optim = {"learning_rate": 0.01, "schedule": "constant", "clip_norm": None}
    train(files, tmp_path / "run", method, train={"steps": steps}, optim=optim)
    base = jp.load_model(files.model)
    examples = encode_file(
        str(files.train), base.tokenizer, max_length=32, vocab_size=base.config.vocab_size
    )
    plan = jp.Plan(examples, batch_size=8, max_length=32, pad_id=base.config.pad_token_id)
    tx = jp.make_optimizer(jp.OptimConfig(**optim), steps)
    adapter = jp.load_adapter(first, base)
    state = init_train_state(
        base.params, adapter, jp.masked(tx, jp.adapter_only), jax.random.key(1)
    )
    step = make_train_step(
        make_lm_loss(base.module, head_frozen=True), jp.masked(tx, jp.adapter_only)
    )
    losses = []
    for index in range(steps):
        state, metrics = step(state, base.params, plan.batch(index))
        losses.append(float(metrics["loss"]))
    actual = [line["loss"] for line in training_lines(tmp_path / "run")]
    np.testing.assert_allclose(actual, losses, rtol=1e-5)
    assert state.adapter is not None
    trained = jp.load_adapter(tmp_path / "run", base)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        trained.params,
        state.adapter.params,
    )


@pytest.mark.slow
def test_adalora_goes_on_with_all_its_triplets_and_a_schedule_of_its_own(files, tmp_path):
    section = {"name": "adalora", "rank": 1, "initial_rank": 3, "targets": ["q_proj"]}
    first, second = tmp_path / "first", tmp_path / "second"
    train(files, first, section, train={"steps": 3})
    ours = {"rank": 3, "orthogonality": 0.25, "every": 2, "init_from": str(first)}
    train(files, second, section | ours, train={"steps": 4})
    before, after = evaluation_lines(first)[-1], evaluation_lines(second)[0]
    assert after["step"] == 0
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    base = jp.load_model(files.model)
    old, new = (
        np.asarray(
            jp.load_adapter(folder, base).params["layers"]["self_attn"]["q_proj"]["kernel"]["e"]
        )
        for folder in (first, second)
    )
    assert (old == 0).sum() == 2 * len(old)
    assert (new != 0).all()
    was, saved = (
        json.loads((folder / "adapter" / "adapter_config.json").read_text())
        for folder in (first, second)
    )
    keys = ("target_r", "orth_reg_weight", "deltaT", "total_step")
    assert [was[key] for key in keys] == [1, 0.5, 1, 3]
    assert [saved[key] for key in keys] == [3, 0.25, 2, 4]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ({"rank": 2, "alpha": 4}, ["its rank is 4, not 2"]),
        ({"alpha": 16}, ["q_proj/kernel/scale is 2, not 4"]),
        ({"targets": ["q_proj"]}, ["it adapts layers/mlp/down_proj/kernel, the section does not"]),
        ({"targets": "all-linear"}, ["it does not adapt layers/mlp/gate_proj/kernel"]),
        ({"targets": r".*\.0\..*(q|down)_proj"}, ["kernel/rank is 4, not 0"]),
        ({"rslora": True}, ["q_proj/kernel/rslora is False, not True"]),
    ],
)
def test_an_adapter_that_the_section_does_not_describe_is_refused(
    files, first, tmp_path, method, parts
):
    with pytest.raises(UserError) as error:
        train(files, tmp_path / "run", {"init_from": str(first)} | method)
    text = str(error.value)
    assert text.startswith(f"method.init_from: {first} is not what the method section describes: ")
    assert all(part in text for part in parts)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ({"init_from": "./gone"}, "method.init_from: ./gone: no such folder"),
        ({"init_from": "{model}"}, "method.init_from: {model}: a model, not an adapter"),
        ({"name": "full", "init_from": "{first}"}, "give that as model.path"),
    ],
)
def test_no_adapter_to_go_on_from_is_told_before_the_model_loads(
    files, first, tmp_path, monkeypatch, method, part
):
    def fill(text):
        return text.replace("{model}", str(files.model)).replace("{first}", str(first))

    monkeypatch.setattr(program, "load_model", None)
    method = {key: fill(value) for key, value in method.items()}
    section = method if "name" in method else METHOD | method
    config = write_config(files, tmp_path / "run", method=section)
    with pytest.raises(UserError) as error:
        program.main([config])
    assert fill(part) in str(error.value)


def test_an_adapter_of_another_kind_is_told_before_the_model_loads(
    files, first, tmp_path, monkeypatch
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    values = json.loads((first / "adapter" / "adapter_config.json").read_text())
    monkeypatch.setattr(program, "load_model", None)
    for kind, part in (("XLORA", "peft_type: 'XLORA' is not supported"),):
        (folder / "adapter_config.json").write_text(json.dumps(values | {"peft_type": kind}))
        with pytest.raises(UserError, match=rf"method\.init_from: .*{part}"):
            train(files, tmp_path / "run", {"init_from": str(folder)})


def test_overwriting_the_folder_one_goes_on_from_is_refused(files, tmp_path):
    train(files, tmp_path / "run", train={"steps": 1})
    config = write_config(
        files, tmp_path / "run", method={**METHOD, "init_from": str(tmp_path / "run")}
    )
    with pytest.raises(UserError, match="--overwrite would discard what this run reads"):
        program.main([config, "--overwrite"])
    assert (tmp_path / "run" / "adapter").is_dir()


def test_other_tokens_than_those_of_the_saved_adapter_are_refused(files, tmp_path):
    method = {"name": "trainable_tokens", "token_ids": [1, 2]}
    program.main([write_config(files, tmp_path / "first", method=method, train={"steps": 1})])
    method |= {"token_ids": [5, 6], "init_from": str(tmp_path / "first")}
    with pytest.raises(UserError, match=r"embedding/ids is 1, not 5"):
        program.main([write_config(files, tmp_path / "run", method=method)])


def test_a_run_that_has_begun_needs_the_adapter_it_began_with_no_more(files, first, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(first / "adapter", source)
    method, output = {"init_from": str(source)}, tmp_path / "run"
    train(files, output, method, train={"steps": 4})
    tensors = output / "adapter" / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for place in (source, output / "adapter", output / "checkpoints" / "4"):
        shutil.rmtree(place)
    train(files, output, method, train={"steps": 4})  # goes on after the third step
    assert tensors.read_bytes() == whole


def test_a_hub_id_may_name_a_revision(files, first, tmp_path, monkeypatch):
    asked = []

    def locate(path, revision, names):
        asked.append((str(path), revision))
        return first / "adapter"

    monkeypatch.setattr(adapters, "locate_adapter", locate)
    train(files, tmp_path / "run", {"init_from": "some/adapter@v1"}, train={"steps": 1})
    assert set(asked) == {("some/adapter", "v1")}
