"""What is learned is what will be generated, for templates of every kind."""

# ruff: noqa: RUF001 (the tokens of DeepSeek have a wide bar)

import re

import chat_law
import pytest
from chat_rows import Words, cases
from chat_templates import ZOO, shown, smollm2_of, spans_of, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_model import CONFIG

import jaxpeft as jp
from jaxpeft.data.encode import encode_rows
from jaxpeft.inference.decoding import encode_prompts

LENGTH = 4096
TRICKY = (
    " b",
    "\nb",
    "\n\nA new line in front",
    "blanks behind \n",
    "\tb\t",
    "</s",
    "|",
    "<br>",
    "{{ x }} {% if %} {# #}",
    "ASSISTANT: no",
    "[/INST",
    "### Response:\n",
    "assistant",
    "<|im_start|",
    '{"name": "weather"}',
    "null",
    "0",
    "é\u0301\u200d👩‍👩‍👧\u2028ß",
    "日本語のテキスト",
)
"""Texts that look like what templates write, or grow together with it."""

LETTERS = st.characters(exclude_categories=["Cs", "Co", "Cn"])
TEXTS = st.one_of(
    st.sampled_from(TRICKY),
    st.text(st.one_of(LETTERS, st.sampled_from(" \nb<>|")), min_size=1, max_size=12),
).filter(lambda text: text.strip() and "think>" not in text)
INNER = TEXTS.map(str.strip)
WORDS = st.builds(
    Words,
    users=st.tuples(TEXTS, TEXTS, TEXTS),
    answers=st.tuples(TEXTS, TEXTS, TEXTS),
    thoughts=st.tuples(INNER, INNER),
    system=TEXTS,
    place=INNER,
    result=TEXTS,
)
AGAIN = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
KINDS = pytest.mark.parametrize("name", list(ZOO))


def holds(kind, tokenizer, words):
    found = cases(kind, words)
    examples = encode_rows([case.row for case in found], tokenizer, max_length=LENGTH)
    chat_law.law_of(kind, tokenizer, found, examples)
    return found, examples


@KINDS
def test_what_is_learned_is_what_generation_meets(name):
    kind, tokenizer = ZOO[name], tokenizer_of(ZOO[name])
    found, examples = holds(kind, tokenizer, Words())
    # The prompts of this library's own generation are those prompts as well.
    config = jp.ModelConfig(**CONFIG)
    base = jp.Model(params={}, config=config, module=None, tokenizer=tokenizer, name=kind.name)
    for line, case in enumerate(found, 1):
        beside = {key: value for key, value in case.row.items() if key != "messages"}
        prompts = [case.row["messages"][:index] for index in case.at]
        assert encode_prompts(base, prompts, **beside) == [
            examples.tokens[place][:start].tolist()
            for place, number in enumerate(examples.lines)
            if number == line
            for start, _ in spans_of(examples.masks[place])
        ], case.shape


@KINDS
@settings(max_examples=2, **AGAIN)
@given(words=WORDS)
def test_what_is_learned_is_what_generation_meets_for_all_texts(name, words):
    holds(ZOO[name], tokenizer_of(ZOO[name]), words)


@pytest.mark.slow
@KINDS
@settings(max_examples=100, **AGAIN)
@given(words=WORDS)
def test_what_is_learned_is_what_generation_meets_for_very_many_texts(name, words):
    holds(ZOO[name], tokenizer_of(ZOO[name]), words)


MERGING = Words(
    users=("Hi", " 1+1?", "Why?\n"),
    answers=(" Hello", "\n2", "\n\n So."),
    thoughts=("A greeting.", "1 and 1"),
)


@pytest.mark.parametrize(
    "name",
    [
        *("chatml", "llama 2", "command a", "glm 4", "apriel 1.6", "vicuna"),
        *("qwen 3", "qwen 3.5", "r1 distill", "gpt-oss", "mistral tools"),
    ],
)
def test_the_law_holds_where_words_of_a_real_tokenizer_merge(name):
    holds(ZOO[name], smollm2_of(ZOO[name]), MERGING)


U, A = "user", "assistant"


def row(*turns, **keys):
    """A row of texts by turns, a system text first where one is given."""
    messages = [{"role": "system", "content": keys.pop("system")}] if "system" in keys else []
    messages += [
        turn if isinstance(turn, dict) else {"role": (U, A)[place % 2], "content": turn}
        for place, turn in enumerate(turns)
    ]
    return {"messages": messages, **keys}


def think(text, thinking):
    return {"role": A, "content": text, "reasoning_content": thinking}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {
    "role": A,
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": "é", "n": 1}'}}
    ],
}
RESULT = {"role": "tool", "content": "3"}
TWO = row("Hi", "Hello", "1+1", "2", system="S")
"""A row of two turns with a system text."""

LITERAL = [
    (
        "chatml",
        TWO,
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\n1+1<|im_end|>\n"
            "<|im_start|>assistant\n⟦2<|im_end|>⟧"
        ],
    ),
    (
        "llama 3",
        row("Hi", " Hello "),
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Today Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        ],
    ),
    (
        "llama 2",
        TWO,
        ["<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧<s>[INST] 1+1 [/INST]⟦ 2 </s>⟧"],
    ),
    (
        "mistral nemo",
        TWO,
        [
            "<s>[INST]S\n\nHi[/INST]⟦Hello</s>⟧",
            "<s>[INST]Hi[/INST]Hello</s>[INST]S\n\n1+1[/INST]⟦2</s>⟧",
        ],
    ),
    (
        "gemma",
        row("Hi", "Hello"),
        ["<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧"],
    ),
    ("phi", row("Hi", "Hello"), ["<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧"]),
    (
        "apriel 1.6",
        row("Hi", "Hello"),
        ["<|begin_user|>\nHi\n<|begin_assistant|>\n⟦Hello\n<|end|>⟧"],
    ),
    (
        "command a",
        row("Hi", "Hello"),
        [
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>"
            "⟦<|START_RESPONSE|>Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
        ],
    ),
    (
        "glm 4",
        row("Hi", "Hello", "1+1", "2"),
        ["[gMASK]<sop><|user|>\nHi<|assistant|>⟦\nHello<|user|>⟧\n1+1<|assistant|>⟦\n2<|user|>⟧"],
    ),
    (
        "apertus",
        row("Hi", "Hello", "1+1", "2"),
        [
            "<s><|user_start|>Hi<|user_end|><|assistant_start|>⟦Hello<|assistant_end|>⟧"
            "<|user_start|>1+1<|user_end|><|assistant_start|>⟦2<|assistant_end|>⟧"
        ],
    ),
    (
        "metharme",
        row("Hi", "Hello", "1+1", "2"),
        ["<|user|>Hi<|model|>⟦Hello</s>⟧", "<|user|>Hi<|model|>Hello<|user|>1+1<|model|>⟦2</s>⟧"],
    ),
    ("vicuna", row("Hi", "Hello"), ["USER: Hi ASSISTANT:⟦ Hello</s>⟧"]),
    (
        "qwen 3",
        row("Hi", think("Hello", "T"), "1+1", "2"),
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nT\n</think>\n\nHello<|im_end|>⟧",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\n2<|im_end|>⟧",
        ],
    ),
    (
        "qwen 3",
        row("Hi", "Hello", chat_template_kwargs={"enable_thinking": False}),
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "⟦Hello<|im_end|>⟧"
        ],
    ),
    (
        "r1 distill",
        row("Hi", "<think>\nT\n</think>\n\nHello"),
        [
            "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
            "⟦T\n</think>\n\nHello<｜end▁of▁sentence｜>⟧"
        ],
    ),
    (
        "r1 distill",
        row("Hi", "Hello"),
        [
            "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
            "⟦\n</think>\n\nHello<｜end▁of▁sentence｜>⟧"
        ],
    ),
    (
        "qwq",
        row("Hi", "<think>\nT\n</think>\n\nHello"),
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
            "⟦T\n</think>\n\nHello<|im_end|>⟧"
        ],
    ),
    (
        "v3.1",
        row("Hi", "Hello"),
        ["<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>⟦Hello<｜end▁of▁sentence｜>⟧"],
    ),
    (
        "v3.1",
        row("Hi", think("Hello", "T"), chat_template_kwargs={"thinking": True}),
        [
            "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"
            "⟦T</think>Hello<｜end▁of▁sentence｜>⟧"
        ],
    ),
    (
        "nemotron",
        row("Hi", "Hello"),
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
            "⟦</think>Hello<|im_end|>⟧"
        ],
    ),
    (
        "glm 4.7",
        row("Hi", think("Hello", "T")),
        ["[gMASK]<sop><|user|>\nHi<|assistant|><think>⟦T</think>Hello<|user|>⟧"],
    ),
    (
        "kimi k2 thinking",
        row("Hi", think("Hello", "T")),
        [
            "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
            "⟦<think>T</think>Hello<|im_end|>⟧"
        ],
    ),
    (
        "gpt-oss",
        row("Hi", think("Hello", "T"), "1+1", "2"),
        [
            "<|start|>user<|message|>Hi<|end|><|start|>assistant"
            "⟦<|channel|>analysis<|message|>T<|end|><|start|>assistant"
            "<|channel|>final<|message|>Hello<|return|>⟧",
            "<|start|>user<|message|>Hi<|end|><|start|>assistant"
            "<|channel|>final<|message|>Hello<|end|><|start|>user<|message|>1+1<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|>2<|return|>⟧",
        ],
    ),
    (
        "hermes",
        row("Hi", CALL, RESULT, "Hello", tools=[TOOL]),
        [
            "<|im_start|>system\n# Tools\n<tools>\n"
            '{"type": "function", "function": {"name": "f", "parameters": {}}}\n'
            "</tools><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            '⟦<tool_call>\n{"name": "f", "arguments": {"x": "é", "n": 1}}\n</tool_call>'
            "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧"
        ],
    ),
    (
        "glm 4.7",
        row("Hi", CALL, RESULT, "Hello"),
        [
            "[gMASK]<sop><|user|>\nHi<|assistant|><think>⟦</think>\n<tool_call>f\n"
            '<arg_key>x</arg_key>\n<arg_value>"é"</arg_value>\n'
            "<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>⟧",
            "[gMASK]<sop><|user|>\nHi<|assistant|></think>\n<tool_call>f\n"
            '<arg_key>x</arg_key>\n<arg_value>"é"</arg_value>\n'
            "<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>\n"
            "<tool_response>\n3\n</tool_response><|assistant|><think>⟦</think>Hello<|user|>⟧",
        ],
    ),
    (
        "text arguments",
        row("Hi", CALL),
        ['<s><|user|>Hi<|assistant|>⟦<|call|>f\n{"x": "é", "n": 1}</s>⟧'],
    ),
    (
        "llama 3.1 tools",
        row("Hi", CALL, RESULT, "Hello"),
        [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '⟦{"name": "f", "parameters": {"x": "é", "n": 1}}<|eot_id|>⟧'
            "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        ],
    ),
]


@pytest.mark.parametrize(
    ("name", "given", "expected"), LITERAL, ids=[entry[0] for entry in LITERAL]
)
def test_learned_part_of_a_row_word_by_word(name, given, expected):
    tokenizer = tokenizer_of(ZOO[name])
    examples = encode_rows([given], tokenizer, max_length=LENGTH)
    pairs = zip(examples.tokens, examples.masks, strict=True)
    texts = [shown(tokenizer, *pair) for pair in pairs]
    # What the template writes behind the last stop token is neither learned nor generated.
    assert [text[: text.rindex("⟧") + 1] for text in texts] == expected
    assert examples.lines == [1] * len(expected)


def spans(name, content):
    kind = ZOO[name]
    arguments = {"chat_template_kwargs": dict(kind.arguments)} if kind.arguments else {}
    tokenizer = tokenizer_of(kind)
    examples = encode_rows([row("Hi", content) | arguments], tokenizer, max_length=LENGTH)
    return [shown(tokenizer, *pair) for pair in zip(examples.tokens, examples.masks, strict=True)]


OPENED = ["qwq", "r1 distill", "v3.1 on", "qwen 3.5", "nemotron", "glm 4.7"]
"""Kinds whose prompt opens thinking."""


@pytest.mark.parametrize("name", OPENED)
def test_answer_that_begins_inside_the_block_of_the_prompt_is_learned_as_it_is(name):
    (prompt,) = (text.partition("⟦")[0] for text in spans(name, "<think>T</think>Hello"))
    opened = "<think>\n" if prompt.endswith("\n") else "<think>"
    inside = "T\n</think>\n\nHello"
    found, expected = spans(name, inside), spans(name, opened + inside)
    # What stands behind the last stop token is neither learned nor generated.
    assert [text.rstrip() for text in found] == [text.rstrip() for text in expected]


@pytest.mark.parametrize("name", [*OPENED, "qwen 3", "kimi k2 thinking"])
def test_empty_block_inside_the_content_is_no_thinking(name):
    (plain,) = spans(name, "Hello")
    (inline,) = spans(name, "<think>\n\n</think>\n\nHello")
    if ZOO[name].loose:
        plain, inline = (re.sub(r"\s*(</?think>⟦?)\s*", r"\1", text) for text in (plain, inline))
    assert inline == plain
