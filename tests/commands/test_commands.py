"""The commands generate, evaluate and merge, as a user types them."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_model import toy_adapter, toy_model

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.evaluate import main as evaluate_main
from jaxpeft.generate import main as generate_main
from jaxpeft.inference.metrics import evaluate_file
from jaxpeft.merge import main as merge_main

MAINS = {"generate": generate_main, "evaluate": evaluate_main, "merge": merge_main}
ROWS = [
    {"prompt": "two and two is", "completion": " four"},
    {"prompt": "Sing", "completion": ", o muse."},
]


@dataclasses.dataclass(frozen=True)
class Files:
    """A model, an adapter for it and rows, on disk; `base` and `trained` are the same loaded."""

    model: str
    adapter: str
    data: str
    base: jp.Model
    trained: jp.Adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model, adapter, data = (str(folder / name) for name in ("model", "adapter", "rows.jsonl"))
    jp.save_model(model, toy_model(jax.random.key(0), eos_token_ids=(1,)))
    base = jp.load_model(model)
    jp.save_adapter(adapter, toy_adapter(jax.random.key(1), base), base)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Files(model, adapter, data, base, jp.load_adapter(adapter, base))


@pytest.fixture
def loaded(files, monkeypatch):
    """The files, where loading the model again costs nothing."""

    def load_model(path, **settings):
        assert path == files.model
        plain = {"revision": None, "dtype": "float32"}
        none = {"quantization": None, "double_quantization": False}
        assert settings in (plain, plain | none)
        return files.base

    monkeypatch.setattr("jaxpeft.pretrained.load.load_model", load_model)
    return files


def python_m(verb, *arguments, stdin=""):
    environment = {**os.environ, "PYTHONWARNINGS": "error::RuntimeWarning"}
    environment.pop("PYTEST_VERSION", None)
    return subprocess.run(
        [sys.executable, "-m", f"jaxpeft.{verb}", *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def chat(*questions, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": question}] for question in questions]


def test_generate_prints_the_adapters_answers_in_order_and_nothing_else(files):
    expected = jp.generate(files.base, chat("Who?", "Why?"), adapter=files.trained)
    result = python_m(
        "generate", "--model", files.model, "--adapter", files.adapter, "--max_new_tokens", "64",
        "-", stdin="Who?\n\nWhy?\n",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "".join(answer + "\n" for answer in expected)


def test_generate_without_adapter_asks_the_base_with_a_system_message(loaded, capsys):
    arguments = ["--model", loaded.model, "--max_new_tokens", "9", "--system", "Be brief.", "Who?"]
    generate_main(arguments)
    prompts = chat("Who?", system="Be brief.")
    assert capsys.readouterr().out == jp.generate(loaded.base, prompts, max_new_tokens=9)[0] + "\n"


def test_generate_samples_raw_text_by_the_seed(loaded, capsys):
    def sample(seed):
        law = ["--temperature", "2", "--top_k", "50", "--top_p", "0.9", "--seed", seed]
        generate_main(["--model", loaded.model, "--raw", "--max_new_tokens", "9", *law, "Who?"])
        return capsys.readouterr().out

    options = {"max_new_tokens": 9, "temperature": 2.0, "top_k": 50, "top_p": 0.9}
    (expected,) = jp.generate(loaded.base, ["Who?"], key=jax.random.key(3), **options)
    assert sample("3") == sample("3") == expected + "\n"
    assert sample("3") != sample("4")


def test_evaluate_prints_a_line_for_the_base_and_for_every_adapter(loaded, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(loaded.adapter).parent)  # a short name, not folded
    options = ["--max_new_tokens", "4", "--batch_size", "2", "--max_length", "96"]
    common = ["--model", loaded.model, "--data", loaded.data, "--adapter", "adapter", *options]
    expected = evaluate_file(
        loaded.base,
        loaded.data,
        {"base": None, "adapter": loaded.trained},
        max_new_tokens=4,
        batch_size=2,
        max_length=96,
    )
    lines = {
        name: [name, *[f"{value:.4g}" for value in metrics.values()]]
        for name, metrics in expected.items()
    }
    heading = ["adapter", "loss", "perplexity", "token", "accuracy", "exact", "match"]
    evaluate_main(common)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == heading
    assert printed[2:] == [lines["base"], lines["adapter"]]
    evaluate_main([*common, "--no_base"])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[2:] == [lines["adapter"]]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merge_writes_a_model_with_the_logits_of_base_and_adapter(files, tmp_path, capsys, dtype):
    output = str(tmp_path / "merged")
    options = ["--dtype", dtype] if dtype else []
    merge_main(["--model", files.model, "--adapter", files.adapter, "--output", output, *options])
    assert capsys.readouterr().out == f"{output}: the merged model is ready.\n"
    merged = jp.load_model(output, dtype=None)
    assert merged.params["norm"]["scale"].dtype == (dtype or "float32")
    ids = np.array([[5, 9, 40, 7, 3, 80]])
    expected = files.base(ids, adapter=files.trained)
    tolerance = 1e-4 if dtype is None else 0.3
    np.testing.assert_allclose(merged(ids), expected, rtol=0, atol=tolerance)
    assert np.abs(files.base(ids) - expected).max() > 1


def test_merge_keeps_the_dtype_in_which_a_model_is_stored(files, tmp_path):
    stored, output = str(tmp_path / "bfloat16"), str(tmp_path / "merged")
    jp.save_model(stored, files.base, dtype="bfloat16")
    base = jp.load_model(stored)
    jp.save_adapter(str(tmp_path / "adapter"), files.trained, base)
    merge_main(["--model", stored, "--adapter", str(tmp_path / "adapter"), "--output", output])
    merged = jp.load_model(output, dtype=None).params
    exact = jp.merge(base.params, files.trained)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), exact)
    jax.tree.map(np.testing.assert_array_equal, merged, rounded)


def read_files(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_merge_never_replaces_its_own_base(files, options):
    before = read_files(files.model)
    arguments = ["--model", files.model, "--adapter", files.adapter, "--output", files.model]
    with pytest.raises(UserError, match=f"{files.model}: is the model that is read"):
        merge_main([*arguments, *options])
    assert read_files(files.model) == before


def test_merge_replaces_another_model_only_when_told_to(loaded, tmp_path):
    output = str(tmp_path / "merged")
    jp.save_model(output, loaded.base)
    before = read_files(output)
    arguments = ["--model", loaded.model, "--adapter", loaded.adapter, "--output", output]
    with pytest.raises(UserError, match=f"{output}: holds a model already; .* --overwrite"):
        merge_main(arguments)
    assert read_files(output) == before
    # As float32, the model counts as loaded.
    merge_main([*arguments, "--overwrite", "--dtype", "float32"])
    expected = str(tmp_path / "expected")
    jp.save_model(expected, loaded.base, adapter=loaded.trained)
    assert read_files(output) == read_files(expected) != before


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("generate", [], "required: PROMPT, --model"),
        ("evaluate", ["--model", "x"], "required: --data"),
        ("merge", ["--modell", "x"], "--modell: unknown option, did you mean --model?"),
    ],
)
def test_bad_arguments_end_with_exit_code_2_and_one_line(verb, arguments, words):
    result = python_m(verb, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("verb", MAINS)
def test_help_names_the_command_and_its_options(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        MAINS[verb](["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m jaxpeft.{verb}" in out
    assert "--adapter" in out


NO_MODEL = ["--model", "./nowhere"]


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("generate", [*NO_MODEL, "Who?"], "./nowhere: no such file"),
        ("generate", [*NO_MODEL, "  "], "no prompt: every line is empty"),
        ("generate", [*NO_MODEL, "--raw", "--system", "s", "Who?"], "--system needs the chat"),
        ("generate", [*NO_MODEL, "--max_new_tokens", "many", "Who?"], "invalid int value: 'many'"),
        ("generate", [*NO_MODEL, "--seed", str(2**70), "Who?"], "--seed must lie in [0, 2**32)"),
        ("generate", [*NO_MODEL, "--seed", "-1", "Who?"], "--seed must lie in [0, 2**32), got -1"),
        ("evaluate", [*NO_MODEL, "--data", "none.jsonl"], "none.jsonl"),
        ("evaluate", [*NO_MODEL, "--data", "d", "--no_base"], "leaves nothing to evaluate"),
        ("evaluate", [*NO_MODEL, "--data", "d", "--max_rows", "0"], "--max_rows must be at least"),
        ("merge", [*NO_MODEL, "--adapter", "a", "--output", "o"], "./nowhere: no such file"),
    ],
)
def test_bad_input_is_the_users_to_mend(verb, arguments, words):
    with pytest.raises(UserError) as caught:
        MAINS[verb](arguments)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--max_new_tokens", "1000"], "max_new_tokens=1000 exceed the model's 128 positions"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--top_p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--adapter", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_generate_refuses_numbers_out_of_range(loaded, options, words):
    with pytest.raises(UserError, match=words):
        generate_main(["--model", loaded.model, *options, "Who?"])


def test_generate_says_how_to_do_without_a_chat_template(loaded, monkeypatch):
    monkeypatch.setattr(loaded.base.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template; add --raw"):
        generate_main(["--model", loaded.model, "Who?"])


def test_generate_reads_no_prompt_from_an_empty_pipe(loaded, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    with pytest.raises(UserError, match="no prompt: every line is empty"):
        generate_main(["--model", loaded.model, "-"])


def test_merge_refuses_an_unknown_dtype(files, tmp_path):
    arguments = ["--model", files.model, "--adapter", files.adapter]
    with pytest.raises(UserError, match="'float33' is not one of"):
        merge_main([*arguments, "--output", str(tmp_path / "out"), "--dtype", "float33"])
