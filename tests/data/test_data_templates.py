"""Chat templates: the text transformers gives, within limits."""

import concurrent.futures
import datetime
import json
import re
import subprocess
import sys
import tracemalloc

import pytest
import tiny_run
from hostile_templates import HUGE, WRONG
from hypothesis import given, settings
from hypothesis import strategies as st
from ordinary_templates import CHATML, LLAMA3, TEMPLATES
from toy_tokenizer import toy_tokenizer

from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_file
from jaxpeft.data.templates import limits
from jaxpeft.data.templates.date import strftime_now
from jaxpeft.data.templates.render import TemplateError, render_template
from jaxpeft.data.templates.sandbox import BoundedEnvironment

USER = {"role": "user", "content": "What is <b>4</b> & 5?\n"}
CALL = {"function": {"name": "add", "arguments": {"a": 4, "b": [5.5, None, True, "\u00fc"]}}}
CONVERSATIONS = {
    "one turn": [USER, {"role": "assistant", "content": " a nana "}],
    "system": [
        {"role": "system", "content": "\u00dcber"},
        USER,
        {"role": "assistant", "content": "b"},
    ],
    "thinking": [
        USER,
        {"role": "assistant", "content": "b", "reasoning_content": "hm\n", "thinking": None},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nc", "reasoning": "why"},
    ],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "9.5", "name": "add"},
        {"role": "assistant", "content": "9.5", "n": 3},
    ],
}
TREE = [{"name": "a", "kids": [{"name": "b"}, {"name": "c", "kids": [{"name": "d"}]}]}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> 'numbers'.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number"},
                "b": {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer(bos=True)


@pytest.fixture
def rendered(tokenizer, monkeypatch):
    """Renders a template with our environment and with that of transformers."""

    def render(template, messages, **options):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        arguments = {"x": "y", "tree": TREE}
        theirs = _outcome(
            lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options, **arguments)
        )
        ours = _outcome(
            lambda: render_template(tokenizer, messages, **options, arguments=arguments)
        )
        return ours, theirs

    return render


def _outcome(render):
    """A text, or None for an error."""
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_the_text_of_transformers(rendered, name):
    texts = []
    for messages in CONVERSATIONS.values():
        for options in ({}, {"add_generation_prompt": True}, {"tools": [TOOL]}):
            ours, theirs = rendered(TEMPLATES[name], messages, **options)
            assert ours == theirs
            texts.append(ours)
    assert any(texts)


_TEXTS = st.text(max_size=20) | st.sampled_from(["<think>\na\n</think>\n\nb", "", "\n", "{{ x }}"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _TEXTS},
        optional={
            "reasoning_content": st.none() | _TEXTS,
            "thinking": _TEXTS,
            "tool_calls": st.none() | st.lists(st.just(CALL), max_size=2),
            "n": _JSON,
        },
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)), messages=_MESSAGES, prompt=st.booleans(), tool=_JSON
)
def test_any_messages_give_the_text_of_transformers(tokenizer, name, messages, prompt, tool):
    tokenizer.chat_template = TEMPLATES[name]
    options = {"add_generation_prompt": prompt, "tools": [{"function": tool}]}
    theirs = _outcome(lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options))
    ours = _outcome(lambda: render_template(tokenizer, messages, **options))
    assert ours == theirs


@pytest.fixture
def render(tokenizer, monkeypatch):
    def render(template, messages=CONVERSATIONS["one turn"], **options):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return render_template(tokenizer, messages, **options)

    return render


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_asks_for_too_much_ends_in_one_line(render, monkeypatch, name):
    """With fewer steps than there are, since types are checked at each of them in tests."""
    monkeypatch.setattr(limits, "MAX_STEPS", 4000)
    monkeypatch.setattr(limits, "MAX_TOTAL_CHARS", limits.MAX_TOTAL_CHARS // 10)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError) as caught:
            render(HUGE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(r"more than [\d,]+|too deeply|Range too big", str(caught.value))
    assert "\n" not in str(caught.value)
    assert peak < 160e6


@pytest.mark.parametrize("name", WRONG)
def test_whatever_a_template_raises_is_one_line(render, name):
    template, part = WRONG[name]
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1100


def test_the_message_of_a_template_is_passed_on_as_it_is(render):
    with pytest.raises(TemplateError) as caught:
        render("\n{{ raise_exception('roles must alternate: ' ~ messages[0].role) }}")
    assert str(caught.value) == "roles must alternate: user"


def test_an_interrupt_is_not_swallowed(render):
    class Interrupted(dict):
        def items(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(CHATML, [Interrupted(USER)])


def test_a_message_without_content_is_one_line(render):
    with pytest.raises(TemplateError, match="'dict object' has no attribute 'content'"):
        render(CHATML, [{"role": "user"}])


def test_objects_are_seen_by_the_name_of_their_type(render):
    message = {"role": "user", "content": tracemalloc, "n": (datetime, [1])}
    assert render("{{ messages }}", [message]) == (
        "[{'role': 'user', 'content': '<module>', 'n': ('<module>', [1])}]"
    )


def test_messages_are_left_as_they_were(render):
    messages = json.loads(json.dumps(CONVERSATIONS["thinking"]))
    render("{{ messages }}", messages)
    assert messages == CONVERSATIONS["thinking"]


def test_variables_that_are_already_given_are_refused(render):
    with pytest.raises(TemplateError, match="'messages' is already given"):
        render(CHATML, arguments={"messages": []})


def test_arguments_stand_before_special_tokens(render):
    assert render("{{ eos_token }}{{ pad_token }}", arguments={"eos_token": "E"}) == "E<|im_end|>"


def test_named_templates_are_chosen_by_whether_there_are_tools(render):
    named = {"default": "plain", "tool_use": "tools"}
    assert render(named) == "plain"
    assert render(named, tools=[TOOL]) == "tools"
    assert render({"default": "plain"}, tools=[TOOL]) == "plain"
    assert render({"rag": "x", "tool_use": "tools"}, tools=[TOOL]) == "tools"


def test_several_templates_without_a_default_name_the_way_out(render):
    with pytest.raises(UserError) as caught:
        render({"rag": "x", "tool_use": "y"})
    assert str(caught.value) == (
        "the model's tokenizer has several chat templates (rag, tool_use) and none of them is "
        "named default; set model.chat_template to a file with the one to use."
    )


@pytest.mark.parametrize("template", [None, ""])
def test_no_template_is_told(render, template):
    with pytest.raises(UserError, match="has no chat template"):
        render(template)


LETTERS = "aAwdbBmyYHIMSfzZjpUWcxXGuVCDeFghklnrRtTP%"


@pytest.mark.parametrize("flag", ["", "-", "_", "0", "^"])
def test_the_date_is_written_as_the_c_library_writes_it(flag):
    day = datetime.datetime(2024, 7, 26)
    for letter in LETTERS:
        if flag and letter in "fzZn%tcxXDFrRT":
            continue
        form = f"<%{flag}{letter}>"
        assert strftime_now(form) == day.strftime(form), form
    assert strftime_now("%d %b %Y, %A %H:%M:%S; %Q 100%") == "26 Jul 2024, Friday 00:00:00; %Q 100%"


def test_the_date_does_not_change(render):
    assert render("{{ strftime_now('%d %B %Y') }}") == "26 July 2024"
    with pytest.raises(TemplateError, match="str"):
        render("{{ strftime_now(1) }}")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        pytest.param(LLAMA3, marks=pytest.mark.slow),
        pytest.param(TEMPLATES["thinking"], marks=pytest.mark.slow),
    ],
)
def test_a_long_conversation_passes(rendered, template):
    turns = [
        {"role": role, "content": f"{index} " + "some words " * 18}
        for index in range(5000)
        for role in ("user", "assistant")
    ]
    ours, theirs = rendered(template, turns, tools=[TOOL])
    assert ours == theirs
    assert len(ours) > 2e6


def test_a_long_message_passes(rendered):
    ours, theirs = rendered(
        LLAMA3, [USER, {"role": "assistant", "content": "some words " * 200_000}]
    )
    assert ours == theirs


def test_threads_count_for_themselves(render, tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "MAX_STEPS", 3000)
    text = render("{% for i in range(2000) %}{{ i % 10 }}{% endfor %}")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(render_template, tokenizer, [USER]) for _ in range(40)]
        assert {job.result() for job in jobs} == {text}


def test_a_template_is_compiled_once(render, monkeypatch):
    compiled = []
    of_string = BoundedEnvironment.from_string
    monkeypatch.setattr(
        BoundedEnvironment,
        "from_string",
        lambda self, source: compiled.append(source) or of_string(self, source),
    )
    for content in "abc":
        render("{{ messages[0].content }} compiled once", [{"role": "user", "content": content}])
        with pytest.raises(TemplateError):
            render("{% compiled once")
    assert len(compiled) == 2


def test_a_template_that_passes_the_limits_is_soon_done_with_many_rows(render, monkeypatch):
    """The n-th failure takes a part of the steps, but every rendering has some."""
    monkeypatch.setattr(limits, "MAX_STEPS", 20_000)
    monkeypatch.setattr(limits, "MIN_STEPS", 4_000)
    taken = []
    for _ in range(7):
        with pytest.raises(TemplateError) as caught:
            render(HUGE["nested loops"] + "{# of many rows #}")
        found = re.search(r"more than ([\d,]+) steps", str(caught.value))
        taken.append(int(found[1].replace(",", "")))
    assert taken == [20_000, 10_000, 6_666, 5_000, 4_000, 4_000, 4_000]


def test_rows_that_fail_take_nothing_from_ordinary_ones(render):
    template = (
        "{% for m in messages %}{{ m.content * (10**9 if m.content == 'y' else 1) }}{% endfor %}"
    )
    turn = {"role": "user", "content": "y"}
    for _ in range(99):
        with pytest.raises(TemplateError):
            render(template, [turn])
    assert render(template, [turn | {"content": "z"}] * 500) == "z" * 500


def _write(path):
    rows = [{"prompt": "a", "completion": "b"}, {"messages": CONVERSATIONS["one turn"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "template",
    [
        HUGE["range"],
        HUGE["repeated text"],
        HUGE["joined"],
        HUGE["printed lists"],
        HUGE["a width of format"],
        HUGE["macro without end"],
        HUGE["many megabytes"],
        *(template for template, _ in WRONG.values()),
    ],
)
def test_a_template_that_fails_names_the_row(tmp_path, tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    path = _write(tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        encode_file(path, tokenizer, max_length=99, vocab_size=len(tokenizer))
    assert f"{path}:2" in str(caught.value)
    assert "the chat template refuses the messages: " in str(caught.value)


def test_nested_loops_end_a_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "MAX_STEPS", 4000)
    test_a_template_that_fails_names_the_row(tmp_path, tokenizer, monkeypatch, HUGE["nested loops"])


@pytest.mark.slow
def test_training_ends_with_exit_code_2_and_no_traceback(tmp_path):
    files = tiny_run.make_files(tmp_path)
    tiny_run.write_rows(files.train, [{"messages": CONVERSATIONS["one turn"]}] * 20)
    (files.model / "chat_template.jinja").write_text(HUGE["nested loops"])
    config = tiny_run.write_config(files, tmp_path / "out")
    command = [sys.executable, "-m", "jaxpeft.train", config]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"error: {files.train}:1: the chat template refuses the messages: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
