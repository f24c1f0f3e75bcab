"""A run and an adapter know their whole base: weights, config, tokenizer, chat template."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import pytest
import yaml
from places import GOLDEN
from tiny_run import make_files, settings
from toy_model import toy_adapter
from toy_tokenizer import toy_tokenizer

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core.errors import UserError
from jaxpeft.models.config import ModelConfig, RopeScaling
from jaxpeft.pretrained.adapters import notes_of
from jaxpeft.pretrained.identity import Identity, config_changes, identity_of, tokenizer_hash


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder, and an adapter and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("made")
    files = make_files(folder)
    base = jp.load_model(files.model)
    jp.save_adapter(folder / "adapter", toy_adapter(jax.random.key(1), base), base)
    draft = settings(
        files, folder / "run", data={"eval": None}, evaluation=None, train={"steps": 2}
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(draft))
    program.main([str(folder / "run.yaml")])
    return folder


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy to change, whose run reads the copied model."""
    folder = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    for name in ("run.yaml", "run/config.yaml"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(str(made), str(folder)))
    monkeypatch.chdir(folder)
    return folder


def change_json(file: pathlib.Path, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tokenizer(folder: pathlib.Path):
    """Two tokens change places."""
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(values))


def go_on(folder: pathlib.Path, *flags: str):
    """Resumes the run; where the model lies is no change that these tests are about."""
    path = ["--accept_changes", ",".join(("model.path", "data", *flags))]
    program.main([str(folder / "run.yaml"), *path])


CHANGES = {
    "rope_theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        r"rope_theta from 10000\.0 to 20000\.0",
    ),
    "rms_norm_eps": ({"rms_norm_eps": 1e-3}, r"rms_eps from 1e-06 to 0\.001"),
    "eos": ({"eos_token_id": 3}, r"eos_token_ids from \[.*\] to \[3\]"),
    "scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        r"rope_scaling from None to \{'kind': 'linear', 'factor': 2\.0",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_config_of_the_base_is_named_with_its_field(copy, name):
    changes, words = CHANGES[name]
    change_json(copy / "model" / "config.json", **changes)
    if name == "eos":
        (copy / "model" / "generation_config.json").unlink(missing_ok=True)
    base = jp.load_model("model")
    with pytest.raises(UserError, match=f"its config changed: .*{words}"):
        jp.load_adapter("adapter", base)
    assert jp.load_adapter("adapter", base, allow_other_base=True) is not None
    with pytest.raises(UserError, match=f"the config of the base changed: .*{words}") as error:
        go_on(copy)
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) == 1


def test_another_tokenizer_is_named(copy):
    change_tokenizer(copy / "model")
    base = jp.load_model("model")
    with pytest.raises(UserError, match="its tokenizer encodes otherwise"):
        jp.load_adapter("adapter", base)
    assert jp.load_adapter("adapter", base, allow_other_base=True) is not None
    with pytest.raises(UserError, match="the tokenizer of the base encodes otherwise"):
        go_on(copy)


def test_another_chat_template_is_a_warning_and_a_change_to_accept(copy, capsys):
    (copy / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    base = jp.load_model("model")
    before = hashlib.sha256(json.dumps(toy_tokenizer().chat_template).encode()).hexdigest()[:12]
    now = hashlib.sha256(json.dumps(base.tokenizer.chat_template).encode()).hexdigest()[:12]
    with pytest.warns(UserWarning, match=rf"another chat template .*\({before}, now {now}\)"):
        jp.load_adapter("adapter", base)
    with pytest.raises(UserError, match=rf"the chat template \({before}, now {now}\) is not that"):
        go_on(copy)
    go_on(copy, "chat_template")
    assert "already finished" in capsys.readouterr().out


def test_a_config_that_changed_in_form_alone_is_the_same(copy):
    file = copy / "model" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "transformers_version": "0"}, indent=7, sort_keys=True))
    assert jp.load_adapter("adapter", jp.load_model("model")) is not None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_flipped_bits_of_the_base_s_small_files_are_found_or_change_nothing(copy, name):
    file, base = copy / "model" / name, jp.load_model("model")
    whole, known = file.read_bytes(), identity_of(base.config, base.tokenizer)
    found = 0
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        raw = bytearray(whole)
        raw[at] ^= 1
        file.write_bytes(raw)
        try:
            other = jp.load_model("model")
        except (UserError, UnicodeDecodeError):
            found += 1
            continue
        if identity_of(other.config, other.tokenizer) == known:
            text = "a b#c=ab<|im_end|>\n"
            assert other.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
            assert other.config == base.config
            continue
        found += 1
        with pytest.raises(UserError, match=r"config changed|tokenizer encodes otherwise"):
            jp.load_adapter("adapter", other)
    assert found >= 20


def test_a_field_that_one_version_lacks_counts_with_its_default():
    config = ModelConfig(
        model_type="llama",
        vocab_size=8,
        d_model=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        tie_embeddings=False,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    )
    now = identity_of(config, None).config
    older = {key: value for key, value in now.items() if key not in ("qk_norm", "windows")}
    older["rope_scaling"] = {"kind": "llama3", "factor": 8.0}
    assert config_changes(older, now) == config_changes(now, older) == []
    changed = dataclasses.replace(config, qk_norm=True, windows=(4,))
    assert config_changes(older, identity_of(changed, None).config) == [
        "qk_norm from False to True",
        "windows from [] to [4]",
    ]
    scaled = {**now, "rope_scaling": {**now["rope_scaling"], "factor": 4.0}}
    assert config_changes(now, scaled) == ["rope_scaling.factor from 8.0 to 4.0"]


def test_what_a_call_sets_and_what_a_save_rewrites_do_not_change_a_tokenizer(tmp_path):
    tokenizer = toy_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
    assert tokenizer_hash(toy_tokenizer(bos=True)) != before
    assert tokenizer_hash(toy_tokenizer(eos=False)) != before


def test_the_hash_of_the_toy_tokenizer_is_the_same_everywhere():
    """With tokenizers 0.22 and 0.23, on Python 3.11 and 3.13."""
    expected = "86af0c1342e52f80ce6265af8c79a5fe605e6998264d04834e933564aaf58cf2"
    assert tokenizer_hash(toy_tokenizer()) == expected


def test_a_side_file_that_lost_a_part_of_the_identity_is_refused(copy):
    file = copy / "adapter" / "jaxpeft.json"
    side = json.loads(file.read_text())
    side["base"]["tokenizes"] = side["base"].pop("tokenizer")
    file.write_text(json.dumps(side))
    with pytest.raises(UserError, match=r"jaxpeft\.json: base: lacks a part"):
        jp.load_adapter("adapter", jp.load_model("model"))
    assert Identity.is_whole({"name": "x", "fingerprint": "y"})


def test_folders_of_peft_s_own_are_noted_with_scale_and_base(tmp_path):
    base = jp.load_model(GOLDEN / "models" / "llama3")
    place = pathlib.Path(shutil.copytree(GOLDEN / "adapters" / "qv", tmp_path / "qv"))
    values = json.loads((place / "adapter_config.json").read_text())
    scale = values["lora_alpha"] / values["r"]
    change_json(place / "adapter_config.json", base_model_name_or_path="org/other")
    notes = notes_of(place, jp.load_adapter(place, base), base)
    assert len(notes) == 2
    assert notes[0].endswith(f"its effective scale (alpha by rank) is {scale:g}.")
    assert "names 'org/other' as its base and is used on" in notes[1]
    change_json(place / "adapter_config.json", base_model_name_or_path="some-org/llama3")
    assert len(notes_of(place, jp.load_adapter(place, base), base)) == 1
    change_json(place / "adapter_config.json", lora_alpha=100 * values["lora_alpha"])
    (note,) = notes_of(place, jp.load_adapter(place, base), base)
    assert f"is {100 * scale:g}." in note


def test_a_folder_of_our_own_has_nothing_to_note(made):
    base = jp.load_model(made / "model")
    adapter = jp.load_adapter(made / "adapter", base)
    assert notes_of(made / "adapter", adapter, base) == []
