"""Absurd sizes of models and files are answered at once, from what headers and file sizes say."""

import json
import math
import re
import struct
import subprocess
import sys

import gguf as gguf_package
import numpy as np
import pytest
from tiny_models import CONFIGS, hf_tensors, write_hf
from tiny_run import make_files, settings

import jaxpeft as jp
from jaxpeft.core import limits
from jaxpeft.core.errors import UserError
from jaxpeft.data.rows.json_rows import read_json
from jaxpeft.pretrained.gguf.file import read_gguf
from jaxpeft.pretrained.hf.folder import open_folder
from jaxpeft.pretrained.load import load_model_config, load_tokenizer


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "llama"])
@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [100_000_000_000, 10**299])
def test_every_size_of_a_model_has_a_limit(tmp_path, kind, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[kind], key: value}))
    with pytest.raises(UserError, match=rf"config\.json: {key}: at most [\d,]+ is supported, got"):
        load_model_config(tmp_path)


def header(length, content=b"{"):
    return struct.pack("<Q", length) + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(2**60) + b" " * 100, "this is no safetensors file"),
        (header(2**60, b"x" * 100), "this is no safetensors file"),
        (header(2**30) + b" " * 100, "cut short: the header alone needs 1073741832 bytes"),
        (header(100, b'{"a":' + b"[" * 95), "the safetensors header is damaged"),
        (header(100_000, b'{"a":' + b"[" * 99_995), "the safetensors header is damaged"),
    ],
)
def test_safetensors_headers_that_claim_too_much(tmp_path, content, words):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        open_folder(folder)


def test_a_safetensors_header_has_a_limit(tmp_path):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"))
    (folder / "model.safetensors").write_bytes(header(2**30))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="its header: 1,073,741,824 bytes are too large"):
        open_folder(folder)


def gguf(tensors, pairs, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def pair(kind, body):
    return struct.pack("<Q1sI", 1, b"k", kind) + body


@pytest.mark.parametrize(
    "content",
    [
        gguf(2**60, 0),
        gguf(0, 2**60),
        gguf(0, 1, struct.pack("<Q", 2**60)),
        gguf(0, 1, pair(8, struct.pack("<Q", 2**60))),
        gguf(0, 1, pair(9, struct.pack("<IQ", 8, 2**60))),
        gguf(0, 1, pair(9, struct.pack("<IQ", 4, 2**60))),
        gguf(0, 1, pair(9, struct.pack("<IQ", 9, 2**60))),
        gguf(0, 1, pair(9, struct.pack("<IQ", 9, 1) * 1000)),
    ],
)
@pytest.mark.parametrize("sparse", [0, 2**40])
def test_gguf_headers_that_claim_too_much(tmp_path, content, sparse):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    if sparse:
        with path.open("r+b") as file:
            file.truncate(sparse)  # a file of a terabyte, of which nothing is on disk
    with pytest.raises(UserError, match="the GGUF header is damaged or cut short"):
        read_gguf(path)


@pytest.mark.parametrize("value", [2**31 - 1, 10**8])
def test_sizes_of_a_gguf_have_limits(tmp_path, value):
    writer = gguf_package.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(value)
    writer.add_embedding_length(8)
    writer.add_head_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.add_feed_forward_length(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"llama\.block_count: at most 2,048 is supported"):
        load_model_config(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "load", "limit"),
    [
        ("config.json", load_model_config, limits.JSON_BYTES),
        ("model.safetensors.index.json", open_folder, limits.JSON_BYTES),
        ("tokenizer.json", load_tokenizer, limits.TOKENIZER_BYTES),
        ("tokenizer_config.json", load_tokenizer, limits.JSON_BYTES),
    ],
)
def test_files_of_absurd_sizes_are_not_read(tmp_path, name, load, limit):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError) as error:
        load(folder)
    assert f"{folder / name}: {2**40:,} bytes are too large, at most {limit.most:,}" in str(
        error.value
    )


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom"])
def test_devices_are_no_files_of_rows_or_configs(path):
    with pytest.raises(UserError, match="this is a device"):
        read_json(path)
    with pytest.raises(UserError, match="bytes are too large"):
        jp.load_config(path)


def test_a_huge_file_of_rows_is_refused_by_its_size(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"a\.jsonl: 1,099,511,627,776 bytes are too large"):
        read_json(tmp_path / "a.jsonl")


@pytest.fixture
def small_rows(monkeypatch):
    monkeypatch.setattr(limits, "ROW_BYTES", limits.Limit(40_000, "for the test"))


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_that_is_too_large_is_told_with_its_line(tmp_path, name):
    rows = [{"text": "x" * size} for size in (10, 39_000, 50_000)]
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if name == "a.jsonl" else "[" + ",\n".join(lines) + "]"
    (tmp_path / name).write_text(text)
    found = read_json(tmp_path / name)
    assert [value for _, value in found.values] == rows[:2]
    (problem,) = found.problems
    assert problem.line == 3
    assert problem.text == "a row of more than 40,000 bytes, which is not read"
    assert problem.fatal == (name == "a.json")


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("size", [4000, 4090, 4096, 4097, 5000, 32_768, 39_980])
def test_rows_of_every_size_of_an_array_are_read_as_python_reads_them(tmp_path, size):
    values = [{"text": "\u00e9" * size}, {"n": [1, 2.5, -3e9, True, None]}, 12345, "b" * size]
    (tmp_path / "a.json").write_text(
        json.dumps(values + values, ensure_ascii=False), encoding="utf-8"
    )
    assert [value for _, value in read_json(tmp_path / "a.json").values] == values * 2


@pytest.mark.usefixtures("small_rows")
def test_an_error_behind_large_rows_keeps_its_place(tmp_path):
    good = json.dumps({"text": "x" * 20_000})
    (tmp_path / "a.json").write_text(f"[{good},\n{good},\n{{oops}}]")
    (problem,) = read_json(tmp_path / "a.json").problems
    assert (problem.line, problem.column) == (3, 2)
    assert "malformed JSON" in problem.text


# Time and memory, in processes of their own.

MEASURE = """
import pathlib, resource, sys, time
import jaxpeft as jp, jaxpeft.train, jaxpeft.pretrained.load as load
from jaxpeft.core.errors import UserError
from jaxpeft.data.rows.json_rows import read_json
from jaxpeft.pretrained.hf.folder import open_folder
path = sys.argv[1]
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    WHAT
except UserError as error:
    text = str(error)
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(time.process_time() - start, taken / 2**20, text[:200], sep="\\n")
"""
READ_ROWS = "from jaxpeft.data.rows.kinds import read_rows; read_rows(path)"


def train(tmp_path, **changes):
    files = make_files(tmp_path / "files")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(files, tmp_path / "run", **changes)))
    return path, "jaxpeft.train.main([path])"


def row_of(size, inner):
    def write(tmp_path):
        (tmp_path / "a.json").write_text(inner(size))
        return tmp_path / "a.json", READ_ROWS

    return write


def line_of(size, inner):
    def write(tmp_path):
        (tmp_path / "a.jsonl").write_text(inner(size))
        return tmp_path / "a.jsonl", READ_ROWS

    return write


def model_file(name, content):
    def write(tmp_path):
        folder = write_hf(tmp_path, "llama", hf_tensors("llama"), shards=2)
        (folder / name).write_bytes(content())
        what = (
            "load.load_model_config(path)"
            if name == "config.json"
            else "open_folder(pathlib.Path(path))"
        )
        return folder, what

    return write


def layers(tmp_path):
    folder = write_hf(tmp_path, "mistral", hf_tensors("mistral"), num_hidden_layers=100_000_000)
    return folder, "jp.load_model(path)"


def most_layers(tmp_path):
    most = limits.MODEL["num_layers"].most
    folder = write_hf(tmp_path, "mistral", hf_tensors("mistral"), num_hidden_layers=most)
    return folder, "jp.load_model(path)"


def yaml_of(text):
    def write(tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text(text())
        return path, "jp.load_config(path)"

    return write


def aliases():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for depth in range(1, 40):
        lines.append(f"a{depth}: &a{depth} [{', '.join([f'*a{depth - 1}'] * 10)}]")
    return "\n".join([*lines, "optim: {trainable: *a39}", "method: {name: lora, targets: *a39}"])


JUNK = limits.HEADER_BYTES.most - 100
WORST = {
    "num_hidden_layers": layers,
    "as many layers as are allowed": most_layers,
    "a line of 100 MB": line_of(100_000_000, lambda n: '{"text": "' + "x " * (n // 2) + '"}\n'),
    "a line of 100 MB of lists": line_of(100_000_000, lambda n: "[" + "[]," * (n // 3) + "[]]"),
    "a row of 100 MB in an array": row_of(
        100_000_000, lambda n: '[{"text": "' + "x " * (n // 2) + '"}]'
    ),
    "lists of 100 MB in an array": row_of(100_000_000, lambda n: "[[" + "[]," * (n // 3) + "[]]]"),
    "a header of lists": model_file(
        "model.safetensors", lambda: header(JUNK, b'{"a":[' + b"[]," * ((JUNK - 10) // 3) + b"]]}}")
    ),
    "config.json of objects": model_file(
        "config.json",
        lambda: b'{"a":[' + b'{"":0},' * ((limits.JSON_BYTES.most - 20) // 7) + b"0]}",
    ),
    "an index of objects": model_file(
        "model.safetensors.index.json",
        lambda: b"{" + b'"":{},' * ((limits.JSON_BYTES.most - 20) // 6) + b'"":0}',
    ),
    "aliases that stand for 10 ** 40 items": yaml_of(aliases),
    "a config of 100 MB": yaml_of(lambda: "a: 1\n" * 20_000_000),
    "as large a config as is allowed": yaml_of(
        lambda: "".join(f"a{i}: 1\n" for i in range(limits.CONFIG_BYTES.most // 11))
    ),
    "epochs": lambda tmp_path: train(tmp_path, train={"steps": None, "epochs": 1e300}),
    "steps": lambda tmp_path: train(tmp_path, train={"steps": 999_999_999_999}),
    "batch_size": lambda tmp_path: train(tmp_path, train={"batch_size": 1_000_000_000}),
    "as large a batch as is allowed": lambda tmp_path: train(tmp_path, train={"batch_size": 2**20}),
}
QUICK = ("a line of 100 MB", "an index of objects")
SECONDS, GIB = 10, 1.0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in WORST]
)
def test_absurd_sizes_are_answered_at_once(tmp_path, name):
    path, what = WORST[name](tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("WHAT", what), str(path)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    seconds, gib, *text = result.stdout.split("\n")
    assert float(seconds) < SECONDS, (seconds, text)
    assert float(gib) < GIB, (gib, text)
    assert math.isfinite(float(gib))
    assert text[0]
