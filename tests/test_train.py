"""The training program, called in this process on a tiny model."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh
from safetensors.numpy import load_file
from tiny_run import (
    STEPS,
    evaluation_lines,
    make_files,
    read_lines,
    settings,
    training_lines,
    write_config,
    write_rows,
)
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft import data, paths, sharding
from jaxpeft import train as program
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.errors import DivergedError, InterruptedRunError, UserError
from jaxpeft.evaluate import evaluate_loss
from jaxpeft.models.load import load_config, load_model
from jaxpeft.run import Run

NO_EVAL = {"data": {"eval": None}, "evaluation": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Most facts hold on one device, and in code compiled in a hurry; tests are quicker so."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda **sizes: mesh)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The config of a run that was done once; look at it, don't change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    evaluation = {"exact_match": True, "max_new_tokens": 3}
    config = write_config(files, output, evaluation=evaluation)
    program.main([config])
    return config


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The folder of a run without evaluations, the reference of many tests."""
    output = tmp_path_factory.mktemp("plain") / "run"
    losses(files, output)
    return output


def output_of(config: str) -> pathlib.Path:
    return pathlib.Path(yaml.safe_load(pathlib.Path(config).read_text())["output_dir"])


def adapter_bytes(output: pathlib.Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_of(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines]


def losses(files, output, **changes) -> list[float]:
    """The loss of every step of a run without evaluations."""
    program.main([write_config(files, output, **{**NO_EVAL, "checkpoint": None, **changes})])
    return curve(output)


def curve(output) -> list[float]:
    return [line["loss"] for line in training_lines(output)]


def poison(monkeypatch, steps) -> None:
    """Lets the batches of some steps weigh infinitely much."""
    iterate = data.iterate

    def poisoned(plan, first, last, **options):
        for step, batch in enumerate(iterate(plan, first, last, **options), first + 1):
            if step in steps:
                batch = {**batch, "weights": np.where(batch["weights"] > 0, np.inf, 0).astype("f")}
            yield batch

    monkeypatch.setattr(data, "iterate", poisoned)


def test_loss_falls_and_the_metrics_have_their_fields(finished):
    lines = read_lines(output_of(finished) / "metrics.jsonl")
    training = training_lines(output_of(finished))
    assert steps_of(training) == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, STEPS]
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    for line in training:
        assert set(line) == {
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "supervised_tokens",
            "seconds",
            "skipped_updates",
        }
        assert line["seconds"] > 0
        assert line["tokens_per_second"] > 0
    for line in lines:
        if "eval_loss" in line:
            assert set(line) == {
                "step",
                "eval_loss",
                "eval_perplexity",
                "eval_token_accuracy",
                "eval_exact_match",
            }


def test_learning_rate_is_logged_as_the_cosine_says(finished):
    rates = [line["learning_rate"] for line in training_lines(output_of(finished))]
    counts = np.arange(STEPS)
    np.testing.assert_allclose(rates, 0.01 * 0.5 * (1 + np.cos(np.pi * counts / STEPS)), rtol=1e-5)


def test_samples_have_question_reference_and_answer(finished):
    samples = read_lines(output_of(finished) / "samples.jsonl")
    assert steps_of(samples) == [0] * 10 + [6] * 10 + [STEPS] * 10
    assert all(set(line) == {"step", "prompt", "reference", "answer"} for line in samples)
    rows = read_lines(pathlib.Path(settings_of(finished)["data"]["eval"]))
    assert [line["prompt"] for line in samples[:10]] == [row["prompt"] for row in rows]
    assert [line["reference"] for line in samples[:10]] == [row["completion"] for row in rows]
    matches = [sum(s["answer"] == s["reference"] for s in samples[i : i + 10]) for i in (0, 10, 20)]
    scores = [line["eval_exact_match"] for line in evaluation_lines(output_of(finished))]
    np.testing.assert_allclose(scores, np.array(matches) / 10)


def settings_of(config: str) -> dict:
    return yaml.safe_load(pathlib.Path(config).read_text())


def test_the_folder_holds_the_documented_files(finished):
    output = output_of(finished)
    assert {path.name for path in output.iterdir()} == {
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
    }
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["12", "9"]
    assert jp.load_config(str(output / "config.yaml")) == jp.load_config(finished)


def test_the_exported_adapter_gives_the_last_evaluation(finished, files):
    base = load_model(files.model)
    adapter = jp.load_adapter(str(output_of(finished)), base)
    examples = data.encode_file(
        files.eval, base.tokenizer, max_length=32, vocab_size=base.config.vocab_size
    )
    batches = list(
        data.eval_batches(examples, batch_size=8, max_length=32, packing=True, pad_id=None)
    )
    after = evaluate_loss(base, batches, adapter)
    before = evaluate_loss(base, batches)
    lines = evaluation_lines(output_of(finished))
    # No adapter at all: the first evaluation is the base's own, to the last bit.
    assert {"step": 0, **before} == {k: v for k, v in lines[0].items() if k != "eval_exact_match"}
    assert after["eval_loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-6)


def test_a_second_call_says_that_all_is_done(finished, capsys, monkeypatch):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: 1 / 0)
    before = (output_of(finished) / "metrics.jsonl").read_bytes()
    program.main([finished])
    assert "already finished" in capsys.readouterr().out
    assert (output_of(finished) / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_differences(finished):
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.01 -> 0\.02") as error:
        program.main([finished, "--optim.learning_rate", "0.02", "--train.seed", "3"])
    assert "train.seed: 0 -> 3" in str(error.value)
    assert "--overwrite" in str(error.value)


def test_resume_never_refuses_a_folder_with_a_run(finished):
    with pytest.raises(UserError, match="--resume never"):
        program.main([finished, "--resume", "never"])


def test_a_finished_run_is_not_called_finished_with_other_data(finished, tmp_path):
    draft = settings_of(finished)
    rows = read_lines(pathlib.Path(draft["data"]["train"]))
    path = pathlib.Path(draft["data"]["train"])
    before = path.read_bytes()
    try:
        write_rows(path, rows[:-1])
        with pytest.raises(UserError, match="training data are not those this run began with"):
            program.main([finished])
    finally:
        path.write_bytes(before)


def test_printed_config_reads_back_as_the_same_config(finished, capsys, tmp_path):
    program.main([finished, "--print_config", "--optim.b1", "0.5"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert jp.load_config(str(again)) == jp.load_config(finished, ["--optim.b1", "0.5"])


def test_overwrite_discards_the_run_and_nothing_else(files, plain, tmp_path):
    output = pathlib.Path(shutil.copytree(plain, tmp_path / "run"))
    first = curve(output)
    (output / "notes.txt").write_text("mine")
    (output / "tensorboard").mkdir()
    config = write_config(files, output, **NO_EVAL, checkpoint=None)
    program.main([config, "--overwrite", "--train.seed=1", "--train.steps=4"])
    second = training_lines(output)
    assert steps_of(second) == [1, 2, 3, 4]
    assert second[0]["loss"] != first[0]
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "tensorboard").exists()
    assert os.listdir(output / "checkpoints") == ["4"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints"])
def test_folders_that_belong_to_no_run_are_left_alone(files, tmp_path, name, flags):
    output = tmp_path / "run"
    (output / name).mkdir(parents=True)
    (output / name / "precious").write_text("mine")
    with pytest.raises(UserError, match=f"holds {name} but no config.yaml"):
        program.main([write_config(files, output), *flags])
    assert (output / name / "precious").read_text() == "mine"


def test_accumulation_gives_the_losses_of_the_whole_batch(files, plain, tmp_path):
    parts = losses(files, tmp_path / "parts", train={"microbatch_size": 2})
    np.testing.assert_allclose(parts, curve(plain), rtol=1e-5)


@pytest.mark.parametrize("name", ["dots", "none"])
def test_remat_does_not_change_the_losses(files, plain, tmp_path, name):
    other = losses(files, tmp_path / "run", train={"remat": name})
    np.testing.assert_allclose(other, curve(plain), rtol=1e-5)


def test_adafactor_lowers_the_loss(files, tmp_path):
    optim = {"name": "adafactor", "learning_rate": 0.03}
    found = losses(files, tmp_path / "run", optim=optim)
    assert found[-1] < 0.95 * found[0]


def test_dropout_changes_the_losses(files, plain, tmp_path):
    dropped = losses(files, tmp_path / "run", method={"dropout": 0.3})
    assert dropped[0] == curve(plain)[0]  # B is still zero
    assert all(a != b for a, b in zip(dropped[1:], curve(plain)[1:], strict=True))


def test_full_fine_tuning_writes_a_model(files, tmp_path):
    output = tmp_path / "run"
    found = losses(files, output, method={"name": "full"})
    assert found[-1] < 0.5 * found[0]
    assert not (output / "adapter").exists()
    trained, base = load_model(output / "model"), load_model(files.model)
    before, after = paths.flatten(base.params), paths.flatten(trained.params)
    assert before.keys() == after.keys()
    assert all((before[path] != after[path]).any() for path in before)
    assert len(trained.tokenizer) == len(base.tokenizer)


def test_a_run_that_goes_on_replaces_the_model_it_wrote(files, tmp_path):
    output = tmp_path / "run"
    changes = {
        "train": {"steps": 2},
        "optim": {"trainable": ["norm/scale"]},
        "checkpoint": {"every": 1},
    }
    losses(files, output, **changes)
    weights = output / "model" / "model.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(b"of an earlier step")
    shutil.rmtree(output / "checkpoints" / "2")
    losses(files, output, **changes)
    assert weights.read_bytes() == expected


def test_relabelled_norm_is_trained_and_nothing_else_of_the_base(files, tmp_path, monkeypatch):
    runs = record_runs(monkeypatch)
    output = tmp_path / "run"
    losses(files, output, optim={"trainable": ["norm/scale"], "learning_rate": 0.05})
    (run,) = runs
    base = paths.flatten(load_model(files.model).params)
    on_base = paths.flatten(run.state.trained["base"])
    assert [path for path, leaf in on_base.items() if leaf is not None] == ["norm/scale"]
    for path, leaf in paths.flatten(run.base.params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(base[path]).tobytes(), path
    moments = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.opt_state)
        if leaf.ndim and "/adapter/" not in jax.tree_util.keystr(path, simple=True, separator="/")
    ]
    assert [name.rpartition("/base/")[2] for name in moments] == ["norm/scale"] * 2
    assert {name.split("/")[-4] for name in moments} == {"mu", "nu"}, moments
    saved = paths.flatten(load_model(output / "model").params)
    assert (saved["norm/scale"] != base["norm/scale"]).any()
    for path in ("embed_tokens/embedding", "lm_head/kernel", "layers/input_layernorm/scale"):
        np.testing.assert_array_equal(saved[path], base[path])


def record_runs(monkeypatch) -> list[Run]:
    """Lets the program tell which runs it makes."""
    runs = []

    class Recorded(Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(program, "Run", Recorded)
    return runs


def test_base_is_bit_identical_after_training(files, tmp_path, monkeypatch):
    runs = record_runs(monkeypatch)
    losses(files, tmp_path / "run", train={"steps": 3, "batch_size": 1})
    assert sha256(runs[0].base.params) == sha256(load_model(files.model).params)


def sha256(params: dict) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.flatten(params).items()):
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def test_step_and_evaluation_are_compiled_once(files, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)  # the context manager knows this thread only
    program.main([write_config(files, tmp_path / "run", evaluation={"every": 4})])
    jax.config.update("jax_log_compiles", False)
    texts = [record.getMessage() for record in caplog.records]
    compiled = [found[1] for text in texts if (found := re.match(r"Compiling jit\((\w+)\)", text))]
    assert {name: compiled.count(name) for name in ("step", "_batch_sums")} == {
        "step": 1,
        "_batch_sums": 1,
    }, compiled


def scripted(monkeypatch, scores: dict[int, float]) -> None:
    def evaluate(run):
        return {"eval_loss": scores[int(run.state.step)], "eval_token_accuracy": 0.5}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)


def test_best_step_is_exported(files, tmp_path, monkeypatch, capsys):
    constant = {"schedule": "constant"}
    losses(files, tmp_path / "six", optim=constant, train={"steps": 6})
    scripted(monkeypatch, {0: 5.0, 3: 2.0, 6: 1.0, 9: 3.0, 12: 2.0})
    output = tmp_path / "run"
    checkpoint = {"best": "eval_loss", "every": None, "keep": 1}
    config = write_config(
        files, output, optim=constant, checkpoint=checkpoint, evaluation={"every": 3}
    )
    program.main([config])
    assert adapter_bytes(output) == adapter_bytes(tmp_path / "six")
    assert sorted(os.listdir(output / "checkpoints")) == ["12", "6"]
    assert "(step 6)" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 1), ("eval_token_accuracy", 2)])
def test_best_is_the_least_loss_or_the_largest_accuracy(files, tmp_path, metric, best):
    config = jp.load_config(write_config(files, tmp_path / "run", checkpoint={"best": metric}))
    rows = program.read_data(config, load_config(files.model))
    run = Run(config, load_model(files.model), rows, sharding.make_mesh())
    scores = [(0.5, 0.5), (0.7, 0.9), (0.9, 0.7)]  # at steps 1, 2, 3
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for loss, accuracy in scores:
            run.state = run.state.replace(step=run.state.step + 1)
            run.save(checkpoints, {"eval_loss": loss, "eval_token_accuracy": accuracy})
        checkpoints.wait()
        assert checkpoints.best() == best
        assert checkpoints.steps() == sorted({best, 3})


def test_a_poisoned_batch_is_skipped_and_counted(files, plain, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {4})
    output = tmp_path / "run"
    losses(files, output)
    lines = training_lines(output)
    assert [line["skipped_updates"] for line in lines] == [0] * 3 + [1] * 9
    assert lines[3]["loss"] is None
    assert [line["loss"] for line in lines[:3]] == curve(plain)[:3]
    assert all(np.isfinite(line["loss"]) for line in lines[4:])
    rates = [line["learning_rate"] for line in lines]
    assert rates[3] == rates[4]  # the skipped update did not use its place in the schedule
    assert "step 4: not finite, update skipped; lines of its rows: " in capsys.readouterr().err
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_five_poisoned_batches_end_the_run_with_the_last_good_state(files, tmp_path, monkeypatch):
    runs, output = record_runs(monkeypatch), tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, checkpoint={"every": 1, "keep": 99})
    poison(monkeypatch, range(5, 13))
    with pytest.raises(DivergedError, match="5 times in a row up to step 9") as error:
        program.main([config])
    assert error.value.exit_code == 3
    saved = max(map(int, os.listdir(output / "checkpoints")))
    lines = training_lines(output)
    assert steps_of(lines) == list(range(1, saved + 1))
    assert lines[-1]["skipped_updates"] == saved - 4
    monkeypatch.setattr(Run, "compile_step", None)
    with pytest.raises(DivergedError, match="last good state"):
        program.main([config])
    with Checkpoints(output / "checkpoints") as checkpoints:
        runs[0].restore(checkpoints, 4)
        good = jax.device_get((runs[0].state.trained, runs[0].state.opt_state))
        runs[0].restore(checkpoints, saved)
    last = jax.device_get((runs[0].state.trained, runs[0].state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, last, good)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


def test_a_run_that_ends_in_poisoned_batches_is_not_exported(files, tmp_path, monkeypatch):
    config = write_config(files, tmp_path / "run", **NO_EVAL)
    poison(monkeypatch, range(STEPS - 4, STEPS + 1))
    for _ in range(2):
        with pytest.raises(DivergedError):
            program.main([config])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_was_not_exported_only_needs_the_export(files, plain, tmp_path, monkeypatch):
    output = pathlib.Path(shutil.copytree(plain, tmp_path / "run"))
    shutil.rmtree(output / "adapter")
    monkeypatch.setattr(Run, "compile_step", None)
    program.main([write_config(files, output, **NO_EVAL, checkpoint=None)])
    assert adapter_bytes(output) == adapter_bytes(plain)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal while it prepares a step, once."""
    put, left = Run.put, [True]

    def putting(run, batch):
        if left and int(run.state.step) + 1 == step:
            left.clear()
            os.kill(os.getpid(), number)
        return put(run, batch)

    monkeypatch.setattr(Run, "put", putting)


def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_later(
    files, finished, tmp_path, monkeypatch
):
    config = write_config(
        files, tmp_path / "run", evaluation={"exact_match": True, "max_new_tokens": 3}
    )
    evaluate, left = Run.evaluate, [True]

    def slow(run):
        if left and int(run.state.step) == 6:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return evaluate(run)

    monkeypatch.setattr(Run, "evaluate", slow)
    begin = time.monotonic()
    with pytest.raises(InterruptedRunError, match="SIGTERM at step 6, saved") as error:
        program.main([config])
    assert error.value.exit_code == 6
    assert steps_of(evaluation_lines(tmp_path / "run")) == [0]
    assert steps_of(training_lines(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    program.main([config])
    assert time.monotonic() - begin < 60
    whole = output_of(finished)
    assert evaluation_lines(tmp_path / "run") == evaluation_lines(whole)
    for name in ("samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_never_costs_an_evaluation_that_decides_about_the_best(
    files, tmp_path, monkeypatch
):
    def evaluate(run):
        step = int(run.state.step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval_loss": {6: 1.0}.get(step, 2.0)}, []

    monkeypatch.setattr(Run, "evaluate", evaluate)
    output = tmp_path / "run"
    config = write_config(files, output, checkpoint={"best": "eval_loss"}, evaluation={"every": 3})
    with pytest.raises(InterruptedRunError, match="at step 6, saved"):
        program.main([config])
    program.main([config])
    assert {"6", "12"} <= set(os.listdir(output / "checkpoints"))
    assert steps_of(evaluation_lines(output)) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("doing", ["loading the model", "evaluating", "compiling"])
def test_a_signal_before_the_first_step_saves_nothing(files, tmp_path, monkeypatch, doing):
    owner, name = {
        "loading the model": (program, "load_model"),
        "evaluating": (Run, "evaluate"),
        "compiling": (Run, "compile_step"),
    }[doing]
    work = getattr(owner, name)

    def slow(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return work(*args, **options)

    monkeypatch.setattr(owner, name, slow)
    changes = NO_EVAL if doing == "compiling" else {}
    with pytest.raises(InterruptedRunError, match=f"SIGINT while {doing}: nothing new to save"):
        program.main([write_config(files, tmp_path / "run", **changes)])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_in_the_last_step_leaves_the_export_for_later(files, plain, tmp_path, monkeypatch):
    config = write_config(files, tmp_path / "run", **NO_EVAL, checkpoint=None)
    stop_at(monkeypatch, STEPS, signal.SIGINT)
    with pytest.raises(InterruptedRunError, match=f"SIGINT at step {STEPS}"):
        program.main([config])
    program.main([config])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(plain)


def test_checkpoint_is_hardly_larger_than_adapter_and_moments(files, tmp_path, getkey):
    config = jp.load_config(
        write_config(files, tmp_path / "run"), ["--method.rank=16", "--method.targets=all-linear"]
    )
    base = toy_model(getkey(), d_model=256, d_ff=768, num_layers=6, head_dim=64)
    mesh = sharding.make_mesh()
    run = Run(config, base, program.read_data(config, load_config(files.model)), mesh)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(run.state.adapter.params))
    draw = np.random.default_rng(0)  # what has been trained does not compress
    trained, moments = jax.tree.map(
        lambda x: draw.standard_normal(x.shape, np.float32) if x.ndim else x,
        (run.state.trained, run.state.opt_state),
    )
    run.state = run.state.replace(trained=trained, opt_state=moments)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run.save(checkpoints)
        checkpoints.wait()
    files_ = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files_)
    assert numbers > 400_000
    assert 0.9 * 3 * 4 * numbers < size <= 1.2 * 3 * 4 * numbers + 1_000_000


def test_trackers_and_profiler_go_on_with_a_resumed_run(files, tmp_path, monkeypatch):
    codes = []
    close = program.track.Tracker.close
    monkeypatch.setattr(
        program.track.Tracker,
        "close",
        lambda self, exit_code=0: (codes.append(exit_code), close(self, exit_code)),
    )
    output = tmp_path / "run"
    config = write_config(files, output, **NO_EVAL, track={"tensorboard": True})
    stop_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        program.main([config])
    program.main([config, "--profile", "4:6"])  # step 4 was made before
    assert codes == [6, 0]
    assert len(list((output / "tensorboard").iterdir())) == 2
    assert list((output / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["6:4", "0:2", "a:b", "3"])
def test_a_range_to_profile_needs_a_first_and_a_last_step(finished, text):
    with pytest.raises(UserError, match="--profile: expected START:STOP"):
        program.main([finished, "--profile", text])


def test_held_out_rows_that_are_trained_on_are_counted(files, tmp_path, capsys):
    rows = read_lines(files.train)[:3] + read_lines(files.eval)[:2]
    write_rows(tmp_path / "eval.jsonl", rows)
    config = jp.load_config(
        write_config(files, tmp_path / "run", data={"eval": str(tmp_path / "eval.jsonl")})
    )
    read = program.read_data(config, load_config(files.model))
    assert read.shared == 3
    run = Run(config, load_model(files.model), read, sharding.make_mesh())
    assert ("note", "3 of 5 rows of data.eval are trained on") in run.describe()[0]


def test_bad_rows_are_dropped_from_held_out_data_too(files, tmp_path):
    rows = read_lines(files.eval)
    write_rows(tmp_path / "eval.jsonl", [{"promt": "typo"}, *rows, {"text": 3}])
    changes = {"eval": str(tmp_path / "eval.jsonl"), "on_bad_row": "drop"}
    config = jp.load_config(write_config(files, tmp_path / "run", data=changes))
    read = program.read_data(config, load_config(files.model))
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
    "missing data": ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "missing held-out data": ({"data": {"eval": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "bad row": (bad_row, r'bad\.jsonl:1: "completion": expected text, got null'),
    "nothing to match": (no_answers, "evaluation.exact_match: .* has plain text only"),
    "model typo": ({"model": {"path": "./modle"}}, "modle"),
    "unknown key": ({"optim": {"learning_rat": 1}}, r"run\.yaml:\d+: .*learning_rate"),
    "no such target": ({"method": {"targets": ["q_prj"]}}, "targets pattern 'q_prj'"),
    "rank too large": ({"method": {"rank": 33}}, "LoRA.rank 33 exceeds"),
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
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES)
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
