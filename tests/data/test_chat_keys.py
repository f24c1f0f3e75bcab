"""What becomes of every key of messages and rows: honoured, handed on, refused, or told once."""

import dataclasses
import json

import pytest
from chat_rows import TOOLS, answer, call, result, system, user
from chat_templates import ZOO, shown, tokenizer_of

from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows

HI, HELLO = user("Hi"), answer("Hello")
PLAIN = {"messages": [HI, HELLO]}


def encode(*rows, name="hermes", kind=None):
    tokenizer = tokenizer_of(kind or ZOO[name])
    examples = encode_rows(rows, tokenizer, max_length=2048)
    pairs = zip(examples.tokens, examples.masks, strict=True)
    return [shown(tokenizer, *pair) for pair in pairs], examples.notes


def refusal(*rows, name="hermes", kind=None):
    with pytest.raises(UserError) as caught:
        encode(*rows, name=name, kind=kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def message(**keys):
    """A plain row with further keys in its answer."""
    return {"messages": [HI, HELLO | keys]}


THINKS = {"messages": [HI, answer("Hello", reasoning_content="T")]}
CALLS = {"messages": [HI, answer(None, tool_calls=[call("Bern")]), result("8"), HELLO]}
FUNCTION = {"name": "weather", "arguments": {"place": "Bern"}}

SAME = [
    # (template, a row, the row that must give the same)
    ("hermes", {"messages": [HI | {"role": "human"}, HELLO | {"role": "gpt"}]}, PLAIN),
    ("hermes", {"messages": [HI, HELLO | {"role": "model"}]}, PLAIN),
    ("hermes", {"messages": [HI, HELLO | {"role": "bot"}]}, PLAIN),
    ("hermes", message(tool_calls=None), PLAIN),
    ("hermes", message(tool_calls=[]), PLAIN),
    ("by key", message(reasoning_content=None), PLAIN),
    ("by key", message(thinking="T"), THINKS),
    ("by key", message(reasoning="T"), THINKS),
    ("by key", message(reasoning="T", reasoning_content="T"), THINKS),
    (
        "by key",
        message(content=[{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "Hello"}]),
        THINKS,
    ),
    ("hermes", message(content=[{"type": "text", "text": "Hello"}]), PLAIN),
    ("hermes", {"messages": [HI | {"content": [{"type": "text", "text": "Hi"}]}, HELLO]}, PLAIN),
    (
        "hermes",
        {"messages": [{"role": "developer", "content": "S"}, HI, HELLO]},
        {"messages": [system("S"), HI, HELLO]},
    ),
    ("chatml", {**PLAIN, "system": "S"}, {"messages": [system("S"), HI, HELLO]}),
    ("hermes", {**PLAIN, "tools": json.dumps(TOOLS)}, {**PLAIN, "tools": TOOLS}),
    ("hermes", {**PLAIN, "tools": None}, PLAIN),
    ("hermes", {**PLAIN, "tools": []}, PLAIN),
    (
        "hermes",
        {
            "messages": [
                HI,
                answer("", tool_calls=[{"type": "function", "function": FUNCTION}]),
                {"role": "observation", "content": "8"},
                HELLO,
            ]
        },
        CALLS,
    ),
    (
        "hermes",
        {
            "messages": [
                HI,
                {"role": "assistant", "tool_calls": [{"function": FUNCTION}]},
                {"role": "ipython", "content": "8"},
                HELLO,
            ]
        },
        CALLS,
    ),
    ("hermes", message(refusal=None, audio=None, images=None), PLAIN),
    ("hermes", {"prompt": [HI], "completion": [HELLO]}, PLAIN),
]


@pytest.mark.parametrize(("name", "row", "same"), SAME)
def test_keys_that_say_the_same_give_the_same(name, row, same):
    got, notes = encode(row, name=name)
    assert got == encode(same, name=name)[0]
    assert notes == ()


def test_role_that_the_template_names_is_its_own():
    row = {"messages": [{"role": "developer", "content": "S"}, HI, HELLO]}
    (text,), _ = encode(row, name="gpt-oss")
    assert text.startswith("<|start|>developer<|message|>S<|end|>")


REFUSED_IN_MESSAGES = {
    "function_call": {"name": "f", "arguments": "{}"},
    "train_detail": [],
    "training_detail": [],
    "refusal": "No.",
    "audio": {"id": "a"},
    "images": ["a.png"],
    "prefix": True,
    "partial": True,
    "channel": "final",
    "recipient": "all",
    "content_type": "text",
    "end_turn": True,
    "unparsed_tool_calls": [],
    "mask": 1,
    "label": True,
    "from": "gpt",
    "value": "Hello",
}


@pytest.mark.parametrize("key", REFUSED_IN_MESSAGES)
def test_key_of_a_message_is_refused_by_name(key):
    text = refusal(message(**{key: REFUSED_IN_MESSAGES[key]}))
    assert text.startswith("rows:1: ")
    assert f"messages[1].{key}" in text


def test_function_call_and_function_results_are_answered_with_tool_calls():
    assert "tool_calls" in refusal(message(function_call={"name": "f", "arguments": "{}"}))
    row = {"messages": [HI, HELLO, {"role": "function", "name": "f", "content": "3"}, HELLO]}
    text = refusal(row)
    assert "messages[2]" in text
    assert "tool" in text


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "Hello", "train": False},
        {"type": "text", "text": "Hello", "weight": 0},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "audio", "audio": "a.wav"},
        {"type": "video", "video": "a.mp4"},
        {"type": "refusal", "refusal": "No."},
        {"type": "text"},
        {"type": "text", "text": 1},
        "Hello",
        {},
    ],
)
def test_part_that_is_no_text_is_refused(part):
    row = message(content=[{"type": "text", "text": "Well, "}, part])
    assert "messages[1].content[1]" in refusal(row)


@pytest.mark.parametrize("role", ["", "Assistant ", "critic", None, 1])
def test_role_that_is_not_known_is_refused(role):
    assert "messages[0].role" in refusal({"messages": [HI | {"role": role}, HELLO]})


PLANNED = dataclasses.replace(
    ZOO["chatml"],
    template=ZOO["chatml"].template.replace(
        "m['content'] +", "(m['tool_plan'] or '') + m['content'] + (m['citations'] or '') +"
    ),
)


@pytest.mark.parametrize(("key", "said"), [("tool_plan", "PHello"), ("citations", "HelloP")])
def test_plans_and_citations_are_learned_where_the_template_writes_them(key, said):
    (text,), notes = encode(message(**{key: "P"}), kind=PLANNED)
    assert f"⟦{said}<|im_end|>⟧" in text
    assert notes == ()
    assert key in refusal(message(**{key: "P"}), name="chatml")


def test_key_that_changes_nothing_is_told_once():
    texts, notes = encode(message(mood="glad"), message(mood="sad"), PLAIN)
    assert texts == encode(PLAIN, PLAIN, PLAIN)[0]
    assert len([note for note in notes if "mood" in note]) == 1
    assert len(notes) == 1


def test_key_that_the_template_reads_is_handed_on():
    kind = dataclasses.replace(
        ZOO["chatml"],
        template=ZOO["chatml"].template.replace(
            "+ m['content'] +", "+ m['content'] + m.mood|d('') +"
        ),
    )
    (text,), notes = encode({"messages": [HI | {"mood": "!"}, HELLO]}, kind=kind)
    assert "Hi!<|im_end|>" in text
    assert notes == ()


IN_ROWS = {
    "enable_thinking": True,
    "thinking": True,
    "reasoning_effort": "low",
    "functions": [],
    "function_call": "auto",
    "tool_choice": "auto",
    "chosen": "a",
    "rejected": "b",
    "preferred_output": [],
    "non_preferred_output": [],
    "label": True,
    "kto_tag": True,
    "completions": ["a"],
    "input_ids": [1],
    "labels": [1],
    "attention_mask": [1],
    "position_ids": [1],
    "seq_lengths": [1],
    "completion_mask": [1],
    "assistant_masks": [1],
    "mask": [1],
    "loss_mask": [1],
    "segments": [],
    "image": "a.png",
    "images": ["a.png"],
    "video": "a.mp4",
    "videos": ["a.mp4"],
    "audio": "a.wav",
    "audios": ["a.wav"],
    "weight": 1,
    "train_on_input": False,
    "train_on_inputs": False,
    "chat_template": "{{ messages }}",
}


@pytest.mark.parametrize("key", IN_ROWS)
def test_key_of_a_row_is_refused_by_name(key):
    text = refusal({**PLAIN, key: IN_ROWS[key]})
    assert text.startswith("rows:1: ")
    assert f'"{key}"' in text
    if key in ("enable_thinking", "thinking", "reasoning_effort"):
        assert "chat_template_kwargs" in text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ("conversations", "ShareGPT")),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            ("instruction", "prompt", "completion"),
        ),
        ({"query": "1+1", "response": "2", "history": []}, ("messages",)),
        ({**PLAIN, "system": "S", "messages": [system("S"), HI, HELLO]}, ("system",)),
        ({**PLAIN, "tools": {}}, ('"tools"',)),
        ({**PLAIN, "tools": "["}, ('"tools"',)),
        ({**PLAIN, "documents": "a"}, ('"documents"',)),
        ({**PLAIN, "chat_template_kwargs": []}, ('"chat_template_kwargs"',)),
        ({**PLAIN, "chat_template_kwargs": {"messages": []}}, ("chat_template_kwargs", "messages")),
        ({**PLAIN, "system": 1}, ('"system"',)),
        ({"messages": [HI]}, ("messages",)),
        ({"messages": []}, ("messages",)),
    ],
)
def test_row_is_refused_with_what_to_write(row, words):
    text = refusal(row)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "key",
    ["parallel_tool_calls", "id", "source", "score", "answer", "solution", "ground_truth", "mood"],
)
def test_key_of_a_row_that_is_not_used_is_told_once(key):
    texts, notes = encode({**PLAIN, key: 1}, {**PLAIN, key: 2}, PLAIN)
    assert texts == encode(PLAIN, PLAIN, PLAIN)[0]
    assert len(notes) == 1
    assert f'"{key}"' in notes[0] or key in notes[0].split()
