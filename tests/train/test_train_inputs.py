"""Data and configs that are bad, said before anything is loaded or written."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_run import (
    read_lines,
    settings,
    write_config,
    write_rows,
)

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core.errors import UserError
from jaxpeft.mesh import layouts
from jaxpeft.pretrained.load import load_model, load_model_config
from jaxpeft.training.rows import steps_of_epochs
from jaxpeft.training.run import Run


def test_held_out_rows_that_are_trained_on_are_counted(files, tmp_path, capsys):
    rows = read_lines(files.train)[:3] + read_lines(files.eval)[:2]
    write_rows(tmp_path / "eval.jsonl", rows)
    config = jp.load_config(
        write_config(files, tmp_path / "run", data={"eval": str(tmp_path / "eval.jsonl")})
    )
    read = program.read_data(config, load_model_config(files.model))
    assert read.shared == 3
    run = Run(config, load_model(files.model), read, layouts.make_mesh())
    assert ("note", "3 of 5 rows of data.eval are trained on") in run.describe()[0]


def test_bad_rows_are_dropped_from_held_out_data_too(files, tmp_path):
    rows = read_lines(files.eval)
    write_rows(tmp_path / "eval.jsonl", [{"promt": "typo"}, *rows, {"text": 3}])
    changes = {"eval": str(tmp_path / "eval.jsonl"), "on_bad_row": "drop"}
    config = jp.load_config(write_config(files, tmp_path / "run", data=changes))
    read = program.read_data(config, load_model_config(files.model))
    assert read.eval_examples.rows == rows
    assert read.eval_examples is not None
    assert len(read.eval_examples) == len(rows)


def bad_row(files, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": None}])
    return {"data": {"train": str(tmp_path / "bad.jsonl")}}


def no_answers(files, tmp_path):
    write_rows(tmp_path / "eval.jsonl", [{"text": "abc"}])
    return {"data": {"eval": str(tmp_path / "eval.jsonl")}, "evaluation": {"exact_match": True}}


def output_in_a_file(files, tmp_path):
    (tmp_path / "file").write_text("")
    return {"output_dir": str(tmp_path / "file" / "run")}


def output_is_a_file(files, tmp_path):
    (tmp_path / "file").write_text("")
    return {"output_dir": str(tmp_path / "file")}


BAD = {
    "epochs that make too many steps": (
        {"train": {"steps": None, "epochs": 1e6, "batch_size": 1}, "mesh": {"data": 1}},
        "train.epochs: 1000000.0 epochs make steps, which must be at most 10,000,000, got ",
    ),
    "missing data": ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "missing held-out data": ({"data": {"eval": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "bad row": (bad_row, r'bad\.jsonl:1: "completion": expected text, got null'),
    "nothing to match": (no_answers, "evaluation.exact_match: .* has plain text only"),
    "model typo": ({"model": {"path": "./modle"}}, "modle"),
    "unknown key": ({"optim": {"learning_rat": 1}}, r"run\.yaml:\d+: .*learning_rate"),
    "no such target": ({"method": {"targets": ["q_prj"]}}, "targets pattern 'q_prj'"),
    "rank too large": ({"method": {"rank": 33}}, "LoRA.rank 33 exceeds"),
    "a rule for no base leaf": ({"mesh": {"rules": {"nrm/scale": "-"}}}, "mesh.rules: 'nrm/scale'"),
    "no such base leaf": ({"optim": {"trainable": ["nrm/scale"]}}, "optim.trainable: 'nrm/scale'"),
    "adafactor on ragged layers": (
        {"optim": {"name": "adafactor"}, "method": {"targets": r".*layers\.0\..*q_proj"}},
        "optim.name: adafactor",
    ),
    "wandb missing": ({"track": {"wandb": "project"}}, "track.wandb: the package wandb"),
    "output in a file": (output_in_a_file, "output_dir: .*file"),
    "output is a file": (output_is_a_file, "output_dir: .*file"),
    "too few rows": ({"train": {"batch_size": 64}}, "train.batch_size"),
    "long warm-up": (
        {"optim": {"warmup_steps": 99}, "train": {"steps": None, "epochs": 1}},
        "optim.warmup_steps: 99",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_anything_is_loaded_or_written(files, tmp_path, monkeypatch, name):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: 1 / 0)
    changes, text = BAD[name]
    if callable(changes):
        changes = changes(files, tmp_path)
    config = write_config(files, tmp_path / "run", **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=text) as error:
        program.main([config])
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    files, tmp_path, monkeypatch
):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(program, "load_model", lambda *_, **__: 1 / 0)
    config = write_config(files, tmp_path / "run")
    monkeypatch.setattr(pathlib.Path, "mkdir", denied)
    with pytest.raises(UserError, match="cannot be written to: Permission denied; make it"):
        program.main([config])


def test_bad_profile_or_config_is_told_first(files, tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        program.main([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(UserError, match="unknown option"):
        program.main([write_config(files, tmp_path / "run"), "--overwrit"])


def test_eight_devices_want_batches_that_divide(files, tmp_path):
    config = jp.load_config(write_config(files, tmp_path / "run"))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), layouts.AXES)
    small = settings(files, tmp_path / "run", train={"batch_size": 6})
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(small))
    program.check_batches(config, mesh)
    with pytest.raises(UserError, match=r"train\.batch_size: 6 .* 4 devices .* nearest: 4 or 8"):
        program.check_batches(jp.load_config(str(path)), mesh)


def test_overwriting_with_a_base_that_cannot_be_read_keeps_the_old_run(files, tmp_path):
    output = tmp_path / "run"
    config = write_config(files, output)
    program.main([config])
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(files.model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        program.main([config, "--model.path", str(broken), "--overwrite"])
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before
    program.main([config])  # says that it is finished


def test_exact_match_asks_every_row_of_an_array_on_one_line(files, tmp_path):
    rows = [json.loads(line) for line in pathlib.Path(files.eval).read_text().splitlines()]
    array = tmp_path / "eval.json"
    array.write_text(json.dumps(rows))
    config = write_config(
        files, tmp_path / "run", data={"eval": str(array)}, evaluation={"exact_match": True}
    )
    program.main([config])
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    asked = [line["reference"] for line in samples if line["step"] == 0]
    assert asked == [row["completion"].strip() for row in rows]


def test_overwriting_what_the_run_itself_reads_is_refused(files, plain, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(plain, output)
    inside = output / "model"
    shutil.copytree(files.model, inside)
    config = write_config(files, output, model={"path": str(inside)})
    with pytest.raises(UserError, match="would discard what this run reads"):
        program.main([config, "--overwrite"])
    assert (inside / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("epochs", "sequences", "batch_size", "steps"),
    [
        (1, 9, 4, 3),  # 2 would leave a row out
        (1, 8, 4, 2),
        (1, 3, 4, 1),
        (0.5, 3, 1, 2),
        (0.1, 30, 1, 3),  # 0.1 is a little more in binary
        (0.7, 10, 7, 1),
        (1.1, 10, 1, 11),
        (3.0, 119, 8, 45),
        (1e-9, 119, 8, 1),
    ],
)
def test_steps_of_epochs_are_rounded_up(epochs, sequences, batch_size, steps):
    assert steps_of_epochs(epochs, sequences, batch_size) == steps


def test_one_epoch_sees_every_row(files, tmp_path):
    write_rows(tmp_path / "rows.jsonl", read_lines(files.train)[:9])
    changes = {"train": str(tmp_path / "rows.jsonl"), "packing": False}
    path = write_config(
        files,
        tmp_path / "run",
        data=changes,
        train={"epochs": 1, "steps": None, "batch_size": 4},
    )
    read = program.read_data(jp.load_config(path), load_model_config(files.model))
    seen = {line for step in range(read.steps) for line in read.plan.rows_of(step)}
    assert seen == set(range(1, 10))
