"""Rows at the edges: answers that look like markup or like tags, and shapes no row should have."""

import contextlib

import pytest
from chat_rows import answer, call, user
from chat_templates import ZOO, shown, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import toy_model
from toy_tokenizer import CHATML, toy_tokenizer

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows
from jaxpeft.data.questions import make_questions
from jaxpeft.data.settings import Reading

THINKS_AND_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}"
    "\n<tool_call>{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} "
    "| tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def learned(tokenizer, *messages, **options):
    examples = encode_rows([{"messages": list(messages)}], tokenizer, max_length=4096, **options)
    texts = [shown(tokenizer, *one) for one in zip(examples.tokens, examples.masks, strict=True)]
    return [part.split("⟧")[0] for text in texts for part in text.split("⟦")[1:]]


@pytest.mark.parametrize("said", ["7", "answer7", "e", "x0e", "Zq", "Zq4vanswer"])
@pytest.mark.parametrize("name", ["chatml", "qwq", "r1 distill", "glm 4.5", "v3.1 on"])
def test_answer_may_end_as_the_marks_do_by_which_it_is_found(name, said):
    kind = ZOO[name]
    row = {"messages": [user("5+2?"), answer(said, reasoning_content="sum")]}
    if name == "chatml":
        del row["messages"][1]["reasoning_content"]
    turn, keys = row["messages"][1], {"chat_template_kwargs": dict(kind.arguments)}
    (plain,) = learned(tokenizer_of(kind), user("5+2?"), turn | {"content": "Q"}, **keys)
    (span,) = learned(tokenizer_of(kind), user("5+2?"), turn, **keys)
    assert span == plain.replace("Q", said)


def test_thinking_that_a_template_drops_is_learned_with_the_calls_behind_it():
    tokenizer = tokenizer_of(ZOO["qwq"])
    tokenizer.chat_template = THINKS_AND_CALLS
    turn = answer("Let me look.", reasoning_content="plan", tool_calls=[call("Bern")])
    (text,) = learned(tokenizer, user("Hi"), turn)
    assert text.startswith("plan\n</think>\n\nLet me look.<tool_call>{")
    assert text.count("Bern") == 1
    assert text.endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glm 4.5", "\n<think>plan</think><|user|>"),
        ("qwen 3", "<think>\nplan\n</think>\n\n<|im_end|>"),
        ("kimi k2 thinking", "<think>plan</think><|im_end|>"),
    ],
)
@pytest.mark.parametrize("content", ["", None])
def test_turn_that_only_thinks_keeps_its_closing_tag_and_ends(name, expected, content):
    turn = answer(content, reasoning_content="plan")
    assert learned(tokenizer_of(ZOO[name]), user("x"), turn) == [expected]


def test_closing_tag_in_an_answer_is_text_where_nothing_opens_thinking():
    said = "Write `</think>` to close it."
    assert learned(toy_tokenizer(), user("x"), answer(said.replace("`", ""))) != []
    tokenizer = tokenizer_of(ZOO["chatml"])
    assert learned(tokenizer, user("x"), answer(said)) == [f"{said}<|im_end|>"]
    with pytest.raises(UserError, match="takes </think> in it for the end of thinking"):
        learned(tokenizer_of(ZOO["qwen 3"]), user("x"), answer(said))


@pytest.mark.parametrize("name", ["chatml", "qwen 3", "r1 distill"])
def test_tags_that_are_the_answer_count_in_exact_match(name):
    said = "<reason>late</reason><code>5</code>"
    row = {"messages": [user("x"), answer(said)]}
    (question,) = make_questions([row], tokenizer_of(ZOO[name]), Reading())
    assert question.reference == said
    if name != "chatml":
        begin = "" if name == "r1 distill" else "<think>"
        assert question.answer_of(f"{begin}hm</think>\n\n{said}") == said


def test_completion_that_ends_in_the_end_token_is_asked_without_it():
    row = {"prompt": "1+1=", "completion": " 2<|im_end|>"}
    (question,) = make_questions([row], toy_tokenizer(), Reading())
    assert (question.reference, question.stop) == ("2", 1)


def deep(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


HI, HO = user("Hi"), answer("Ho")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [HI, HO], "tools": [{"function": None}]}, '"tools": function: expected an'),
        ({"messages": [HI, HO], "tools": [{"type": "function"}]}, '"tools": the name of a tool'),
        ({"messages": [HI, HO | {"k": deep(900)}]}, "nested more than 100 deep"),
        ({"messages": [HI, HO], "k": deep(20_000)}, "nested more than 100 deep"),
        ({"messages": [HI, HO | {"\ud800": "x"}]}, "the key '\\ud800' has half of a surrogate"),
        ({"messages": [HI, HO], "\ud800": 1}, "the key '\\ud800' has half of a surrogate"),
        (
            {"messages": [HI, HO | {"tool_calls": [call("Bern") | {"id": "\ud800"}]}]},
            "half of a surrogate pair",
        ),
    ],
)
def test_rows_of_odd_shape_are_refused_in_one_line(row, words):
    with pytest.raises(UserError) as caught:
        encode_rows([row], toy_tokenizer(), max_length=99)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", " ", "x", "\ud800", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "function", "name", "arguments", "type", "text", "weight", "k"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KEYS = ["messages", "prompt", "completion", "text", "tools", "documents", "system", "task", "k"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3), message=JSON)
def test_any_json_is_examples_or_a_refusal(row, message):
    tokenizer = toy_tokenizer(CHATML)
    for one in (row, row | {"messages": [HI, HO]}, {"messages": [HI, message, HO]} | row):
        with contextlib.suppress(UserError):
            encode_rows([one], tokenizer, max_length=9999)


def test_null_and_empty_values_are_absent():
    row = {"messages": [HI, HO | {"citations": []}], "prompt": None, "text": None, "tools": "  "}
    assert learned(toy_tokenizer(), *row["messages"]) == ["Ho<|im_end|>"]
    examples = encode_rows([row], toy_tokenizer(), max_length=99)
    assert (len(examples), examples.notes) == (1, ())


def test_greeting_that_is_not_learned_may_open_a_conversation():
    greeting = answer("Welcome", weight=0)
    assert learned(toy_tokenizer(), greeting, HI, HO) == ["Ho<|im_end|>"]
    with pytest.raises(UserError, match="starts with an assistant turn"):
        learned(toy_tokenizer(), answer("Welcome"), HI, HO)


def test_second_assistant_turn_is_named_where_roles_must_alternate():
    with pytest.raises(UserError, match=r"join messages\[2\], a second assistant turn in a row"):
        learned(tokenizer_of(ZOO["gemma"]), HI, HO, answer("Again"))


def test_text_behind_the_last_learned_token_does_not_make_a_row_too_long():
    row = {"messages": [HI, HO, user("x" * 500)]}
    examples = encode_rows([row], toy_tokenizer(), max_length=100)
    assert len(examples.tokens[0]) == 100
    assert examples.truncated == 0


def test_rows_and_examples_are_counted_apart():
    row = {"messages": [HI, answer("a" * 50), HI, answer("b" * 50)]}
    tokenizer = tokenizer_of(ZOO["qwen 3"])
    examples = encode_rows([row] * 3, tokenizer, max_length=999)
    assert (examples.num_rows, len(examples), len(examples.distinct_rows)) == (3, 6, 3)
    short = {"messages": [HI, HO]}
    left = encode_rows([short, row, row], tokenizer, max_length=60, on_long="drop")
    assert left.dropped == {"too long": 2}
    with pytest.raises(UserError, match="rows: there are no rows"):
        encode_rows([], tokenizer, max_length=60)


def test_task_that_no_method_reads_is_named():
    examples = encode_rows([{"messages": [HI, HO], "task": 1}], toy_tokenizer(), max_length=99)
    assert examples.notes == ('not used: "task"',)


def test_several_adapters_generate_and_are_saved_together(getkey, tmp_path):
    from toy_model import toy_adapter

    base = toy_model(getkey())
    adapters = [toy_adapter(getkey(), base), toy_adapter(getkey(), base)]
    (several,) = jp.generate(base, ["ab"], adapter=adapters, max_new_tokens=6)
    merged = base.replace(params=jp.merge(jp.merge(base.params, adapters[0]), adapters[1]))
    assert jp.generate(merged, ["ab"], max_new_tokens=6) == [several]
    jp.save_model(str(tmp_path / "merged"), base, adapter=adapters)
    saved = jp.load_model(str(tmp_path / "merged"))
    assert jp.generate(saved, ["ab"], max_new_tokens=6) == [several]
