"""What stands beside the weights of a saved model: the base's bytes, but for what must change."""

import dataclasses
import json
import shutil

import jax
import pytest
from rich_folder import CHATML, GENERATION, OTHER, make_tokenizer, read_all, write_rich
from toy_model import toy_adapter, toy_model
from transformers import AutoTokenizer

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.files.companions import find_companions
from jaxpeft.files.locate import locate_again
from jaxpeft.methods.chat_settings import ChatSettings
from jaxpeft.pretrained.hf.config import config_from_hf

# What a saved model of `write_rich` holds beside the bytes of the base, by hand.
WRITTEN = {"config.json", "model.safetensors"}
COPIED = {
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
TEMPLATES = {
    "jinja": {"chat_template.jinja"},
    "config": set(),
    "both": {"chat_template.jinja"},
    "named": {
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "chat_template.json",
    },
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """The folder of each kind, and a model and an adapter for all of them."""
    root = tmp_path_factory.mktemp("rich")
    folders = {name: write_rich(root / name, name) for name in TEMPLATES}
    base = jp.load_model(str(folders["jinja"]))
    return folders, base, toy_adapter(jax.random.key(1), base)


def loaded(rich, template):
    """The model of a folder, and its adapter; weights are read once."""
    folders, base, adapter = rich
    place = str(folders[template])
    tokenizer = AutoTokenizer.from_pretrained(place)
    return base.replace(name=place, tokenizer=tokenizer), adapter


def taught(adapter, **chat):
    return dataclasses.replace(adapter, chat=ChatSettings(**chat).label())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_model_has_the_bytes_of_its_bases_files(rich, tmp_path, capsys, template, merged):
    base, adapter = loaded(rich, template)
    jp.save_model(str(tmp_path / "out"), base, adapter=adapter if merged else None)
    before, after = read_all(rich[0][template]), read_all(tmp_path / "out")
    assert set(after) == WRITTEN | COPIED | TEMPLATES[template]
    for name in COPIED | TEMPLATES[template]:
        assert after[name] == before[name], name
    assert capsys.readouterr().err == ""


def test_merging_two_times_gives_the_same_bytes(rich, tmp_path):
    base, adapter = loaded(rich, "named")
    adapter = taught(adapter, stop_ids=(2,), template=OTHER)
    for name in ("one", "two"):
        jp.save_model(str(tmp_path / name), base, adapter=adapter)
    assert read_all(tmp_path / "one") == read_all(tmp_path / "two")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (GENERATION, {**json.loads(GENERATION), "eos_token_id": [0, 2]}),
        (b'{"eos_token_id": [5, 0], "top_k": 3}', {"eos_token_id": [5, 0, 2], "top_k": 3}),
        (b'{"_from_model_config": true, "eos_token_id": 0}', {"eos_token_id": [0, 2]}),
        (b'{"top_k": 3}', {"eos_token_id": [0, 2], "top_k": 3}),
        (b'{"eos_token_id": null}', {"eos_token_id": [0, 2]}),
        (None, {"bos_token_id": 3, "eos_token_id": [0, 2]}),
    ],
)
def test_tokens_that_end_learned_turns_are_added_to_those_of_the_base(
    rich, tmp_path, capsys, generation, expected
):
    _, adapter = loaded(rich, "jinja")
    folder = shutil.copytree(rich[0]["jinja"], tmp_path / "base")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_bytes(generation)
    base = jp.load_model(str(folder))
    jp.save_model(str(tmp_path / "out"), base, adapter=taught(adapter, stop_ids=(2,)))
    before, after = read_all(folder), read_all(tmp_path / "out")
    assert json.loads(after["generation_config.json"]) == expected
    assert set(jp.load_model(str(tmp_path / "out")).config.eos_token_ids) >= {0, 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "note: generation_config.json: generation stops at <|im_end|> (2) too, where learned turns "
        "end"
    )
    for name in COPIED - {"generation_config.json"}:
        assert after[name] == before[name], name


@pytest.mark.parametrize(
    ("generation", "stops"),
    [(b'{"eos_token_id": [2,0]}', (2, 0)), (GENERATION, (0,)), (GENERATION, ()), (None, (0,))],
)
def test_stop_tokens_that_the_base_has_change_nothing(rich, tmp_path, capsys, generation, stops):
    _, adapter = loaded(rich, "jinja")
    folder = shutil.copytree(rich[0]["jinja"], tmp_path / "base")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_bytes(generation)
    base = jp.load_model(str(folder))
    jp.save_model(str(tmp_path / "out"), base, adapter=taught(adapter, stop_ids=stops))
    assert read_all(tmp_path / "out").get("generation_config.json") == generation
    assert capsys.readouterr().err == ""


def test_a_stop_token_outside_the_vocabulary_is_refused(rich, tmp_path):
    base, adapter = loaded(rich, "jinja")
    with pytest.raises(UserError, match="stop token 40 is outside the vocabulary of 40"):
        jp.save_model(str(tmp_path / "out"), base, adapter=taught(adapter, stop_ids=(40,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("by", ["adapter", "tokenizer"])
def test_an_override_is_the_only_chat_template_of_a_saved_model(rich, tmp_path, template, by):
    base, adapter = loaded(rich, template)
    if by == "adapter":
        adapter = taught(adapter, template=OTHER)
    else:
        base.tokenizer.chat_template = OTHER
    jp.save_model(str(tmp_path / "out"), base, adapter=adapter)
    before, after = read_all(rich[0][template]), read_all(tmp_path / "out")
    named = {"chat_template.json"} if template == "named" else set()
    assert set(after) == WRITTEN | COPIED | {"chat_template.jinja"} | named
    assert after["chat_template.jinja"] == OTHER.encode()
    settings = json.loads(before["tokenizer_config.json"])
    if template == "jinja":
        assert after["tokenizer_config.json"] == before["tokenizer_config.json"]
    else:
        expected = {**settings, "chat_template": OTHER}
        assert json.loads(after["tokenizer_config.json"]) == expected
    if named:
        assert json.loads(after["chat_template.json"]) == {"chat_template": OTHER, "more": 1}
    for name in COPIED - {"tokenizer_config.json"}:
        assert after[name] == before[name], name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == OTHER
    assert tokenizer.get_chat_template(tools=[{}]) == OTHER


def test_a_tokenizer_with_new_tokens_is_written_anew_and_said_so(rich, tmp_path, capsys):
    base, _ = loaded(rich, "named")
    base.tokenizer.add_tokens(["<new>"])
    jp.save_model(str(tmp_path / "out"), base)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the<new>")["input_ids"] == base.tokenizer("the<new>")["input_ids"]
    assert again.chat_template == base.tokenizer.chat_template
    assert "has other tokens than these files; it is written anew" in capsys.readouterr().err
    before, after = read_all(rich[0]["named"]), read_all(tmp_path / "out")
    assert after["generation_config.json"] == before["generation_config.json"]


def test_calls_of_a_tokenizer_do_not_change_it(rich, tmp_path):
    base, _ = loaded(rich, "jinja")
    base.tokenizer(["the", "the the"], padding=False, truncation=True, max_length=2)
    jp.save_model(str(tmp_path / "out"), base)
    before = read_all(rich[0]["jinja"])
    assert read_all(tmp_path / "out")["tokenizer.json"] == before["tokenizer.json"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_model_without_a_folder_gets_files_that_encode_the_same(tmp_path, capsys, gone):
    base = toy_model(jax.random.key(0), eos_token_ids=(1,))
    base = base.replace(name=str(tmp_path / "moved") if gone else "")
    adapter = taught(toy_adapter(jax.random.key(1), base), stop_ids=(1, 2))
    jp.save_model(str(tmp_path / "out"), base, adapter=adapter)
    after = read_all(tmp_path / "out")
    plain = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(after) == WRITTEN | plain | {"generation_config.json"}
    assert json.loads(after["generation_config.json"]) == {"eos_token_id": [1, 2]}
    assert json.loads(after["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": base.tokenizer.model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": base.tokenizer.chat_template,
    }
    again, text = AutoTokenizer.from_pretrained(tmp_path / "out"), "<s>user\nHi  there 12<|im_end|>"
    assert again(text) == base.tokenizer(text)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "moved: is not there any more" in line] == lines[: int(gone)]
    assert len(lines) == 1 + gone


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool_use.jinja"])
def test_a_link_out_of_the_base_is_never_followed(rich, tmp_path, name):
    folder = shutil.copytree(rich[0]["named"], tmp_path / "base")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    base = rich[1].replace(name=str(folder))
    with pytest.raises(UserError, match=f"base/{name}: is a link to {secret}, outside the model"):
        jp.save_model(str(tmp_path / "out"), base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool_use.jinja"])
@pytest.mark.parametrize("where", ["cache", "model", "other name", "no model", "no cache"])
def test_a_link_to_a_models_file_is_followed_and_no_other(rich, tmp_path, name, where):
    target = {
        "cache": tmp_path / "hub" / "models--org--name" / "blobs" / "abc",
        "model": tmp_path / "shared" / name,
        "other name": tmp_path / "shared" / "private.json",
        "no model": tmp_path / "plain" / name,
        "no cache": tmp_path / "somewhere" / "blobs" / "abc",
    }[where]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "config.json").write_text("{}")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = shutil.copytree(rich[0]["named"], tmp_path / "base")
    content = (folder / name).read_bytes()
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    if where in ("cache", "model"):
        base, _ = loaded(rich, "named")
        jp.save_model(str(tmp_path / "out"), base.replace(name=str(folder)))
        assert (tmp_path / "out" / name).read_bytes() == content
        assert not (tmp_path / "out" / name).is_symlink()
        return
    with pytest.raises(UserError, match=f"base/{name}: is a link to {target}, outside the model"):
        find_companions(folder)


def test_files_of_the_hubs_cache_are_copied_through_its_own_links(rich, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = repo / "snapshots" / ("a" * 40)
    for index, (name, content) in enumerate(read_all(rich[0]["named"]).items()):
        (repo / "blobs" / str(index)).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repo / "blobs" / str(index))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate_again("org/name") == snapshot
    assert locate_again("org/other") is None
    base, _ = loaded(rich, "named")
    jp.save_model(str(tmp_path / "out"), base.replace(name="org/name"))
    before, after = read_all(rich[0]["named"]), read_all(tmp_path / "out")
    assert {name: after[name] for name in COPIED} == {name: before[name] for name in COPIED}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_keys_of_the_bases_config_that_we_do_not_interpret_are_kept(rich, tmp_path, dtype):
    base, _ = loaded(rich, "jinja")
    jp.save_model(str(tmp_path / "out"), base, dtype=dtype)
    before = json.loads(read_all(rich[0]["jinja"])["config.json"])
    after = json.loads(read_all(tmp_path / "out")["config.json"])
    changed = {name for name in before if after.get(name) != before[name]}
    dtype_differs = {"torch_dtype"} if dtype is None else set()
    assert changed == {"_name_or_path", "auto_map"} | dtype_differs
    assert after["dtype"] == after["torch_dtype"] == (dtype or "float32")
    assert "_name_or_path" not in after
    assert "auto_map" not in after
    assert after["use_cache"] is False
    assert after["attention_dropout"] == 0.1
    assert after["layer_notes"] == {"who": "na\u00efve"}
    assert config_from_hf(after) == config_from_hf(before)


@pytest.mark.parametrize("stray", [None, "additional_chat_templates/notes.txt", "more/x.jinja"])
def test_a_saved_model_with_every_file_can_be_replaced_by_another(rich, tmp_path, stray):
    base, adapter = loaded(rich, "named")
    out = tmp_path / "out"
    jp.save_model(str(out), base)
    plain, _ = loaded(rich, "config")
    if stray is not None:
        (out / stray).parent.mkdir(exist_ok=True)
        (out / stray).write_text("mine")
        before = read_all(out)
        with pytest.raises(UserError, match="out: exists and is no saved model"):
            jp.save_model(str(out), plain, adapter=adapter, overwrite=True)
        assert read_all(out) == before
        return
    jp.save_model(str(out), plain, adapter=adapter, overwrite=True)
    assert set(read_all(out)) == WRITTEN | COPIED
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML


def test_the_tokenizer_of_the_hand_made_folder_is_the_one_we_think(rich):
    """The folders above stand for real ones: transformers reads their tokens."""
    base, _ = loaded(rich, "both")
    reference = make_tokenizer()
    for text in ("the cab", "<|im_start|>the\n12<|im_end|>"):
        assert base.tokenizer(text)["input_ids"] == reference.encode(text).ids
