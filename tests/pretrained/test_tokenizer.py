"""Tokenizers of GGUF files and folders: pieces, ids, special tokens, templates, refusals."""

import json
import pathlib

import gguf
import numpy as np
import pytest
from tiny_models import CONFIGS, hf_tensors, write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxpeft.core.errors import UserError
from jaxpeft.pretrained.load import load_params, load_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog 2024, isn't it? naïve café",
    "def f(x):\n    return x**2  # 3.14\n\n\nthe end of the thing, the very end",
    "<|im_start|>user\nhello there<|im_end|>\n",
] * 3
TEXTS = [
    "the lazy  42 foxes' café",
    "  lead\n\n\ttab 007 ",
    "日本語 😀",
    "",
    "<|im_start|>user\nthe end<|im_end|>\n",
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL_TYPE, UNKNOWN_TYPE, CONTROL_TYPE, USER_TYPE, UNUSED_TYPE, BYTE_TYPE = 1, 2, 3, 4, 5, 6


def write_tokenizer(path: pathlib.Path, **metadata) -> pathlib.Path:
    """A GGUF file with nothing but `tokenizer.ggml.*` metadata and one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def trained_reference(pre) -> tuple[Tokenizer, dict]:
    """A byte-level BPE trained by the tokenizers package, and its metadata as in a GGUF."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    stored = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [CONTROL_TYPE if t in CONTROL else NORMAL_TYPE for t in tokens],
        "merges": [" ".join(pair) for pair in stored["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    }
    return tokenizer, metadata


def smollm2_splitting():
    """As in SmolLM2's tokenizer.json."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@pytest.mark.parametrize(
    ("name", "splitting"),
    [
        ("smollm", smollm2_splitting),
        ("gpt-2", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ],
)
def test_ids_are_those_of_the_tokenizer_behind_the_file(tmp_path, name, splitting):
    reference, metadata = trained_reference(splitting())
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre=name, **metadata))
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == reference.encode(text).ids
        assert ours.decode(ids) == text
    assert len(ours) == reference.get_vocab_size()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "fooBar ĠI 'm Ġ Ġ12345 Ġx Ċ"),
        ("default", "fooBar ĠI 'm Ġ Ġ12345 Ġx Ċ"),
        ("smollm", "fooBar ĠI 'm ĠĠ 1 2 3 4 5 Ġx Ċ"),
        ("llama-bpe", "fooBar ĠI 'm Ġ Ġ 123 45 Ġx Ċ"),
        ("qwen2", "fooBar ĠI 'm Ġ Ġ 1 2 3 4 5 Ġx Ċ"),
        ("tekken", "foo Bar ĠI 'm Ġ Ġ 1 2 3 4 5 Ġx Ċ"),
    ],
)
def test_text_is_split_before_merging_as_the_name_says(tmp_path, name, pieces):
    _, metadata = trained_reference(smollm2_splitting())
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre=name, **metadata))
    found = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("fooBar I'm  12345 x\n")
    assert [piece for piece, _ in found] == pieces.split(" ")


def test_special_tokens_and_template_come_from_the_metadata(tmp_path):
    _, metadata = trained_reference(smollm2_splitting())
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    path = write_tokenizer(tmp_path / "t.gguf", pre="smollm", chat_template=template, **metadata)
    ours = load_tokenizer(path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.unk_token == "<|endoftext|>"
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi<|im_end|>"
    ids = ours("<|im_start|>the<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert ours.decode(ids, skip_special_tokens=True) == "the"


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "tekken"])
def test_saved_beside_a_llama_config_and_loaded_again_gives_the_same_ids(tmp_path, name):
    _, metadata = trained_reference(smollm2_splitting())
    path = write_tokenizer(tmp_path / "t.gguf", pre=name, chat_template="{{ 1 }}", **metadata)
    ours = load_tokenizer(path)
    folder = write_hf(tmp_path / "m", "llama", hf_tensors("llama"))
    ours.save_pretrained(folder)
    again = load_tokenizer(folder)
    for text in TEXTS:
        assert again(text)["input_ids"] == ours(text)["input_ids"]
    assert again.chat_template == "{{ 1 }}"
    assert again.eos_token_id == 2


@pytest.mark.parametrize(
    ("name", "add_bos", "expected"),
    [
        ("llama-bpe", None, [1]),
        ("llama-bpe", False, []),
        ("smollm", None, []),
        ("qwen2", True, [1]),
    ],
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(tmp_path, name, add_bos, expected):
    _, metadata = trained_reference(smollm2_splitting())
    path = write_tokenizer(tmp_path / "t.gguf", pre=name, add_bos_token=add_bos, **metadata)
    ours = load_tokenizer(path)
    assert ours("")["input_ids"] == expected
    plain = ours("the", add_special_tokens=False)["input_ids"]
    assert ours("the")["input_ids"] == expected + plain


def test_eos_is_added_where_the_file_says_so(tmp_path):
    _, metadata = trained_reference(smollm2_splitting())
    path = write_tokenizer(tmp_path / "t.gguf", pre="smollm", add_eos_token=True, **metadata)
    assert load_tokenizer(path)("")["input_ids"] == [2]


def test_qwen2_composes_accents_first(tmp_path):
    _, metadata = trained_reference(smollm2_splitting())
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre="qwen2", **metadata))
    assert ours("cafe\u0301")["input_ids"] == ours("caf\u00e9")["input_ids"]


def test_llama3_takes_a_whole_word_of_the_vocabulary_without_merges(tmp_path):
    _, metadata = trained_reference(smollm2_splitting())
    metadata["tokens"] = [*metadata["tokens"], "zebra"]
    metadata["token_type"] = [*metadata["token_type"], NORMAL_TYPE]
    for name, whole in (("llama-bpe", True), ("qwen2", False)):
        path = write_tokenizer(tmp_path / f"{name}.gguf", pre=name, **metadata)
        ids = load_tokenizer(path)("zebra", add_special_tokens=False)["input_ids"]
        assert (ids == [len(metadata["tokens"]) - 1]) == whole


def test_unused_rows_are_no_tokens_and_user_tokens_stay_whole(tmp_path):
    _, metadata = trained_reference(smollm2_splitting())
    count = len(metadata["tokens"])
    metadata["tokens"] = [*metadata["tokens"], "<think>", "[PAD341]"]
    metadata["token_type"] = [*metadata["token_type"], USER_TYPE, UNUSED_TYPE]
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre="qwen2", **metadata))
    assert len(ours) == count + 1
    assert ours("the<think>")["input_ids"][-1] == count
    assert ours.decode([count], skip_special_tokens=True) == "<think>"
    assert count + 1 not in ours("[PAD341]")["input_ids"]


SPACE = "\u2581"
PIECES = [  # best score first: "he" before "el", "ll" before "lo"
    *("he", "ll", "llo", "hello", SPACE + "hello", "el", "lo", SPACE + "h"),
    *(SPACE, "h", "e", "l", "o"),
]


def sentencepiece_metadata() -> dict:
    specials = ["<unk>", "<s>", "</s>"]
    return {
        "model": "llama",
        "tokens": [*specials, *(f"<0x{i:02X}>" for i in range(256)), *PIECES],
        "token_type": [
            UNKNOWN_TYPE,
            *[CONTROL_TYPE] * 2,
            *[BYTE_TYPE] * 256,
            *[NORMAL_TYPE] * len(PIECES),
        ],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def piece(text: str) -> int:
    return 259 + PIECES.index(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", [piece(SPACE + "hello")]),
        ("hello hello", [piece(SPACE + "hello")] * 2),
        ("hel", [piece(SPACE), piece("he"), piece("l")]),
        ("é", [piece(SPACE), 3 + 0xC3, 3 + 0xA9]),
        ("hello</s>", [piece(SPACE + "hello"), 2]),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path, text, expected):
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", **sentencepiece_metadata()))
    ids = ours(text)["input_ids"]
    assert ids == [1, *expected]
    assert ours.decode(ids[1:]) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported; supported: gpt2"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"token_type": [1, 1]}, "token_type: 2 entries for 340 tokens"),
        ({"pre": "chatglm"}, "tokenizer.ggml.pre: 'chatglm' is not supported; supported: default"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["h e", "qq zz"]}, r"merges: 1 lines do not join two known tokens: 'qq zz'"),
        ({"eos_token_id": 340}, "eos_token_id: 340 is outside the 340 tokens"),
        ({"tokens": ["a"] * 340}, "a token is there twice"),
    ],
)
def test_metadata_that_does_not_fit_is_named(tmp_path, changes, message):
    _, metadata = trained_reference(smollm2_splitting())
    path = write_tokenizer(tmp_path / "t.gguf", **{"pre": "smollm", **metadata, **changes})
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(f"{path}: ")


def folder_with_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    write_hf(folder, "llama", hf_tensors("llama"))
    _, metadata = trained_reference(smollm2_splitting())
    load_tokenizer(write_tokenizer(folder / "t.gguf", pre="smollm", **metadata)).save_pretrained(
        folder
    )
    return folder


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path):
    folder = folder_with_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"340 tokens, the embedding only 40 rows"):
        load_params(folder)


def test_a_padded_embedding_is_fine(tmp_path, monkeypatch):
    import tiny_models

    monkeypatch.setattr(tiny_models, "VOCAB", 384)
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "vocab_size": 384})
    _, config, tokenizer, _ = load_params(folder_with_tokenizer(tmp_path))
    assert (config.vocab_size, len(tokenizer)) == (384, 340)


def test_code_named_by_a_tokenizer_is_not_run(tmp_path):
    folder = folder_with_tokenizer(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"contains custom code .* is never run"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_file_outside_the_folder_is_refused(tmp_path):
    folder = folder_with_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"vocab_file": "../../.env"}')
    with pytest.raises(UserError, match=r"vocab_file: '\.\./\.\./\.env' is not a file name inside"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer_says_which_files_make_one(tmp_path):
    folder = write_hf(tmp_path, "llama", hf_tensors("llama"))
    with pytest.raises(UserError, match=r"no tokenizer: expected one of tokenizer\.json"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_file_is_named_with_its_folder(tmp_path):
    folder = folder_with_tokenizer(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer files cannot be read") as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
