"""Hints name options that the command has, and flags are read as strictly as files."""

import errno

import pytest

import jaxpeft as jp
from jaxpeft.cli import arguments, exits
from jaxpeft.core.errors import UserError

CONFIG_KEYS = ("train.microbatch_size", "data.max_length", "checkpoint.keep", "output_dir")


@pytest.mark.parametrize("verb", ["generate", "evaluate", "merge"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left")])
def test_commands_without_a_config_name_no_key_of_one(monkeypatch, capsys, verb, error):
    monkeypatch.setattr(exits, "_running", [])
    parser = arguments.make_parser(verb, "")
    if verb != "merge":
        arguments.add_base(parser)
    assert exits.report(error) == 5
    text = capsys.readouterr().err
    assert not [key for key in CONFIG_KEYS if key in text]
    known = {"--batch_size", "--dtype", "--quantization"}
    named = {word.strip(",;()") for word in text.split() if word.startswith("--")}
    assert named <= known


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_commands_with_a_config_name_its_keys(monkeypatch, capsys, verb):
    monkeypatch.setattr(exits, "_running", [])
    arguments.make_parser(verb, "")
    assert exits.report(MemoryError()) == 5
    assert "lower train.microbatch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--method.targets", "[" * 5000, "nested too deeply for a config"),
        ("--optim.trainable", "[" * 5000, "nested too deeply for a config"),
        ("--method", "{a: " * 5000, "nested too deeply for a config"),
        ("--method.rank_pattern", "{a: " * 5000, "nested too deeply for a config"),
        ("--method.targets", "[!!python/name:os.system x]", "tags are not allowed"),
        ("--method", "{name: !!python/name:os.system x}", "tags are not allowed"),
    ],
)
def test_a_flag_is_read_as_strictly_as_a_file(tmp_path, flag, value, words):
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\nmethod: {name: lora}\ndata: {train: t}\ntrain: {steps: 1}\n"
        "output_dir: o\n"
    )
    with pytest.raises(UserError) as error:
        jp.load_config(str(tmp_path / "c.yaml"), [flag, value])
    text = str(error.value)
    assert text.startswith(f"{flag}: ")
    assert words in text
    assert len(text) < 300
