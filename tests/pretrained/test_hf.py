"""Hugging Face folders: every tensor lands where it belongs, every fault is told by name."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import BF16, CONFIGS, VOCAB, D, expected_params, hf_tensors, write_hf

from jaxpeft.core.errors import UserError
from jaxpeft.core.paths import flatten
from jaxpeft.pretrained.load import load_model_config, load_params


def assert_same_tree(actual: dict, expected: dict):
    assert sorted(actual) == sorted(expected)
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(actual[path]), value, err_msg=path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_every_family_lands_in_its_place(tmp_path, kind, shards):
    tensors = hf_tensors(kind)
    params, config, tokenizer, _ = load_params(write_hf(tmp_path, kind, tensors, shards))
    assert_same_tree(flatten(params), expected_params(kind, tensors))
    assert config.model_type == kind.split("-")[0]
    assert tokenizer is None


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_values_are_cast_once_to_the_asked_dtype(tmp_path, stored, dtype):
    tensors = hf_tensors("qwen2", stored)
    params, *_ = load_params(write_hf(tmp_path, "qwen2", tensors), dtype=dtype)
    target = {"bfloat16": BF16, None: stored}.get(dtype, dtype)
    expected = expected_params("qwen2", {k: v.astype(target) for k, v in tensors.items()})
    assert_same_tree(flatten(params), expected)


def test_fingerprint_depends_on_the_tensors_only(tmp_path):
    tensors = hf_tensors("llama")
    single = load_params(write_hf(tmp_path / "a", "llama", tensors))[3]
    sharded = load_params(write_hf(tmp_path / "b", "llama", tensors, 3), dtype="bfloat16")[3]
    assert single == sharded
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] += 1e-6
    assert load_params(write_hf(tmp_path / "c", "llama", tensors))[3] != single


def test_a_stored_copy_of_the_tied_head_is_ignored(tmp_path):
    tensors = hf_tensors("llama-tied")
    plain = load_params(write_hf(tmp_path / "a", "llama-tied", tensors))[3]
    extra = {
        **tensors,
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    params, _, _, fingerprint = load_params(write_hf(tmp_path / "b", "llama-tied", extra))
    assert "lm_head" not in params
    assert fingerprint == plain


def test_a_stored_head_that_differs_from_the_tied_embedding_is_refused(tmp_path):
    tensors = {**hf_tensors("llama-tied"), "lm_head.weight": np.zeros((VOCAB, D), np.float32)}
    with pytest.raises(UserError, match=r"lm_head\.weight differs .*tie_word_embeddings"):
        load_params(write_hf(tmp_path, "llama-tied", tensors))


def test_missing_extra_and_misshapen_tensors_are_listed_together(tmp_path):
    tensors = hf_tensors("llama")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        load_params(write_hf(tmp_path, "llama", tensors))
    text = str(error.value)
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in text
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight" in text
    assert f"model.norm.weight is [3], expected [{D}]" in text


def test_integer_weights_are_refused_by_dtype(tmp_path):
    tensors = {**hf_tensors("llama"), "model.norm.weight": np.ones(D, np.int32)}
    with pytest.raises(UserError, match=r"unsupported dtype .*model\.norm\.weight is I32"):
        load_params(write_hf(tmp_path, "llama", tensors))


@pytest.mark.parametrize(("stored", "value"), [(np.float32, np.nan), (BF16, np.inf)])
def test_non_finite_weights_are_counted_and_named(tmp_path, stored, value):
    tensors = hf_tensors("llama", stored)
    tensors["model.layers.1.mlp.up_proj.weight"][:2, 0] = value
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: 2 of 384 values"):
        load_params(write_hf(tmp_path, "llama", tensors), dtype=None)


def test_values_too_large_for_float16_are_refused(tmp_path):
    tensors = hf_tensors("llama")
    tensors["model.norm.weight"][0] = 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 16 .* as float16"):
        load_params(write_hf(tmp_path, "llama", tensors), dtype="float16")


HUGE = struct.pack("<Q", 2**60)
DAMAGED = {
    "empty": (lambda b: b"", "the file is empty"),
    "html": (lambda b: b"<!DOCTYPE html><html><body>404</body></html>", r"web page \(HTML\)"),
    "lfs": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "git-LFS pointer",
    ),
    "pickle": (lambda b: b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01", "pickle or zip"),
    "zip": (lambda b: b"PK\x03\x04" + b"\0" * 40, "pickle or zip"),
    "gguf": (lambda b: b"GGUF" + b"\0" * 40, "this is a GGUF file"),
    "noise": (lambda b: b"hello, this is no model at all", "no safetensors file"),
    "short": (lambda b: b"abc", "only 3 bytes"),
    "cut body": (lambda b: b[:-100], r"cut short: expected \d+ bytes, the file has \d+"),
    "cut header": (lambda b: b[:200], r"cut short: the header alone needs \d+ bytes"),
    "longer": (lambda b: b + b"\0" * 8, "longer than its header says"),
    "header of 2^60": (lambda b: HUGE + b[8:], "no safetensors file"),
    "bad json": (lambda b: b[:8] + b"{{" + b[10:], "header is damaged"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_named_and_described(tmp_path, fault):
    change, message = DAMAGED[fault]
    write_hf(tmp_path, "llama", hf_tensors("llama"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        load_params(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def raw_file(path, header: dict, body: bytes):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "overlap or leave a hole"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, None),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "needs 16 bytes"),
        ({"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}, "bad shape or offsets"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}, "bad shape or offsets"),
        ({"dtype": "F32", "shape": [3]}, "header is damaged"),
        ([1], "header is damaged"),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path, entry, message):
    from jaxpeft.files.safetensors_file import read_header

    file = tmp_path / "x.safetensors"
    raw_file(file, {"w": entry}, b"\0" * 12)
    if message is None:
        assert read_header(file)["w"].shape == (3,)
        return
    with pytest.raises(UserError, match=message):
        read_header(file)


def test_a_tensor_name_given_twice_is_refused(tmp_path):
    from jaxpeft.files.safetensors_file import read_header

    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"w":{entry},"w":{entry}}}'.encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(UserError, match='"w": the key is given twice'):
        read_header(file)


def test_missing_shards_are_listed(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are not there: model-00002-of-00003"):
        load_params(tmp_path)


def test_a_shard_that_disagrees_with_the_index_is_named(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"), shards=2)
    save_file({"other": np.ones(1, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors: .*not listed: other"):
        load_params(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", 3, "a\0b"])
def test_an_index_may_not_point_outside_the_folder(tmp_path, file):
    write_hf(tmp_path, "llama", hf_tensors("llama"), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(UserError, match="not a file name inside the folder"):
        load_params(tmp_path)


def test_only_pickles_are_refused_with_the_way_to_convert(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin; .*never opened: convert"):
        load_params(tmp_path)


def test_no_weights_at_all_are_told(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"))
    (tmp_path / "model.safetensors").unlink()
    assert load_model_config(tmp_path).vocab_size == VOCAB
    with pytest.raises(UserError, match="no weights: expected model"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json:1:1: the file is empty"),
        ("{\n  oops", r"config\.json:2:3: not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": 1, "a": 2}', '"a": the key is given twice'),
        ("[" * 200_000, "not valid JSON"),
    ],
)
def test_a_broken_config_is_placed(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model_config(tmp_path)


def test_a_folder_without_config_is_told(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: file not found"):
        load_model_config(tmp_path)


def test_generation_config_adds_the_tokens_that_end_a_turn(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"), eos_token_id=[2, 3])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert load_model_config(tmp_path).eos_token_ids == (2, 3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 400}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: .*below 40"):
        load_model_config(tmp_path)


def test_an_unknown_dtype_is_refused_before_reading(tmp_path):
    with pytest.raises(UserError, match="'float8' is not one of float32, bfloat16, float16"):
        load_params(tmp_path, dtype="float8")
