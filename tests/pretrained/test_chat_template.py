"""A chat template in a file: how it is read, and that generate, evaluate and merge use it."""

import json

import jax
import pytest
from toy_model import toy_adapter, toy_model
from toy_tokenizer import CHATML, toy_tokenizer

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.evaluate import main as evaluate_main
from jaxpeft.generate import main as generate_main
from jaxpeft.merge import main as merge_main
from jaxpeft.methods.chat_settings import ChatSettings, chat_of
from jaxpeft.pretrained.chat_template import (
    MAX_BYTES,
    override_in_adapter,
    override_template,
    read_template,
)

OTHER = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_a_template_is_read_as_it_stands(tmp_path):
    text = "{# naïve 😀 #}\r\n{% generation %}{{ messages }}{% endgeneration %}{% break %}"
    text = "{% for m in messages %}" + text + "{% endfor %}\n"
    (tmp_path / "a.jinja").write_bytes(text.encode())
    assert read_template(str(tmp_path / "a.jinja")) == text
    (tmp_path / "a.jinja").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_template(str(tmp_path / "a.jinja")) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.jinja: the file is empty; expected a chat template"),
        (b" \n\t", "t.jinja: the file is empty"),
        (b"\xef\xbb\xbf", "t.jinja: the file is empty"),
        (b"line\n{{ x }}\xe9", r"t.jinja:2: not UTF-8: byte 0xe9 at byte 12; save it as UTF-8"),
        ("{{ x }}".encode("utf-16"), r"t.jinja:1: not UTF-8: byte 0xff at byte 0"),
        (b"a\nb\n{% if x %}\n", r"t.jinja:3: not a chat template in Jinja: Unexpected end"),
        (b"{{ x", r"t.jinja:1: not a chat template in Jinja: "),
        (b"{{ x | no_such_filter }}", r"t.jinja:1: .*No filter named 'no_such_filter'"),
        (b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", "t.jinja.*not a chat template"),
        (b"x" * (MAX_BYTES + 1), "t.jinja: has 1,000,001 bytes, more than 1,000,000"),
    ],
)
def test_a_file_that_is_no_template_is_one_line(tmp_path, content, message):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_template(str(tmp_path / "t.jinja"))
    assert str(error.value).startswith("model.chat_template: ")
    assert "\n" not in str(error.value)


def test_a_template_that_is_not_there_names_what_is_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatml.jinja").write_text("x")
    with pytest.raises(UserError) as error:
        read_template("chatlm.jinja", "--chat_template")
    assert str(error.value) == (
        f"--chat_template: chatlm.jinja: no such file (from {tmp_path}); near names: chatml.jinja"
    )
    for path, words in (
        (str(tmp_path), "is a folder; give a file in it"),
        ("no/x.jinja", "no such file"),
        ("chatml.jinja/x", "no such file|cannot be read: Not a directory"),
        ("a\0b", "NUL"),
        ("~nobody_here/x", "no home folder"),
    ):
        with pytest.raises(UserError, match=words):
            read_template(path)


def test_an_override_leaves_the_tokenizer_and_the_adapter_as_they_were(getkey):
    tokenizer = toy_tokenizer()
    changed = override_template(tokenizer, OTHER)
    assert (changed.chat_template, tokenizer.chat_template) == (OTHER, CHATML)
    assert changed("the")["input_ids"] == tokenizer("the")["input_ids"]
    assert override_template(tokenizer, "") is tokenizer
    adapter = toy_adapter(getkey(), toy_model(getkey()))
    adapter = adapter.replace(chat=ChatSettings(arguments={"a": 1}, stop_ids=(1,)).label())
    other = override_in_adapter(adapter, OTHER)
    assert chat_of(other) == ChatSettings(OTHER, {"a": 1}, (1,))
    assert chat_of(adapter).template == ""
    assert override_in_adapter(adapter, "") is adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, an adapter that was taught with a third template, rows and a template, on disk."""
    folder = tmp_path_factory.mktemp("files")
    base = toy_model(jax.random.key(0), eos_token_ids=(1,)).replace(name="")
    jp.save_model(str(folder / "model"), base)
    base = jp.load_model(str(folder / "model"))
    adapter = override_in_adapter(toy_adapter(jax.random.key(1), base), "third {{ messages }}")
    jp.save_adapter(str(folder / "adapter"), adapter, base)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "me"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "other.jinja").write_text(OTHER)
    return folder


def arguments(files, *names):
    values = {"model": "model", "adapter": "adapter", "data": "rows.jsonl"}
    return [part for name in names for part in (f"--{name}", str(files / values[name]))]


def given(monkeypatch, name):
    """The templates of the model and the adapter that a function which generates is called with."""
    seen = []

    def generate(base, prompts, *, adapter=None, **_):
        seen.append((base.tokenizer.chat_template, chat_of(adapter).template))
        return [[1] if name.endswith("ids") else "me" for _ in prompts]

    monkeypatch.setattr(name, generate)
    return seen


@pytest.mark.parametrize("with_adapter", [False, True])
def test_generate_takes_the_template_of_the_flag(files, monkeypatch, with_adapter):
    seen = given(monkeypatch, "jaxpeft.inference.decoding.generate")
    names = ("model", "adapter") if with_adapter else ("model",)
    flag = ["--chat_template", str(files / "other.jinja")]
    generate_main([*arguments(files, *names), *flag, "Who?"])
    generate_main([*arguments(files, *names), "Who?"])
    assert seen == [
        (OTHER, OTHER if with_adapter else ""),
        (CHATML, "third {{ messages }}" if with_adapter else ""),
    ]


def test_evaluate_takes_the_template_of_the_flag(files, monkeypatch, capsys):
    seen = given(monkeypatch, "jaxpeft.inference.metrics.generate_ids")
    monkeypatch.setattr("jaxpeft.inference.metrics.evaluate_loss", lambda *_: {"eval_loss": 1.0})
    flag = ["--chat_template", str(files / "other.jinja")]
    evaluate_main([*arguments(files, "model", "adapter", "data"), *flag])
    assert {template for template, _ in seen} == {OTHER}
    assert {template for _, template in seen} == {"", OTHER}
    assert "exact match" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flag", [True, False])
def test_merge_writes_the_template_of_the_flag_or_of_the_adapter(files, tmp_path, flag):
    more = ["--chat_template", str(files / "other.jinja")] if flag else []
    out = tmp_path / "out"
    merge_main([*arguments(files, "model", "adapter"), *more, "--output", str(out)])
    expected = OTHER if flag else "third {{ messages }}"
    assert (out / "chat_template.jinja").read_text() == expected
    assert jp.load_model(str(out)).tokenizer.chat_template == expected
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == expected


@pytest.mark.parametrize("verb", [generate_main, evaluate_main, merge_main])
def test_a_bad_template_is_told_before_the_model_is_loaded(files, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("jaxpeft.pretrained.load.load_model", lambda *_, **__: 1 / 0)
    out = ["--output", str(tmp_path / "out")]
    rest = {generate_main: ["Who?"], evaluate_main: arguments(files, "data"), merge_main: out}
    names = ("model", "adapter") if verb is merge_main else ("model",)
    with pytest.raises(UserError, match=r"--chat_template: gone\.jinja: no such file"):
        verb([*arguments(files, *names), "--chat_template", "gone.jinja", *rest[verb]])
    assert not (tmp_path / "out").exists()


def test_raw_text_has_no_use_for_a_template(files):
    with pytest.raises(UserError, match="--chat_template needs the chat template; leave out --raw"):
        generate_main([*arguments(files, "model"), "--raw", "--chat_template", "x", "Who?"])
