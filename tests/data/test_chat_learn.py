"""Which turns of a row are learned, and what ends them."""

import re

import pytest
from chat_rows import TOOLS, answer, call, result, system, user
from chat_templates import ALL, ZOO, shown, tokenizer_of

from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows

A, B, C, D = (user(text) for text in "abcd")
W, X, Y, Z = (answer(text) for text in "wxyz")
CALLS = answer(None, tool_calls=[call("Bern")])
SAID = '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'
AGENT = {"messages": [A, X, B, CALLS, result("8"), Y], "tools": TOOLS}
END = "<|im_end|>"


def encode(*rows, name="hermes", **options):
    tokenizer = tokenizer_of(ALL[name])
    return tokenizer, encode_rows(rows, tokenizer, max_length=2048, **options)


def texts(*rows, **options):
    tokenizer, examples = encode(*rows, **options)
    pairs = zip(examples.tokens, examples.masks, strict=True)
    return [shown(tokenizer, *pair) for pair in pairs]


def learned(*rows, **options):
    """What is learned of rows, without the end of a turn."""
    found = re.findall("⟦(.*?)⟧", "".join(texts(*rows, **options)), re.DOTALL)
    assert all(text.endswith(END) for text in found)
    return [text.removesuffix(END) for text in found]


@pytest.mark.parametrize(
    ("learn", "row", "expected"),
    [
        ("assistant", {"messages": [A, X, B, Y]}, ["x", "y"]),
        ("last_message", {"messages": [A, X, B, Y]}, ["y"]),
        ("last_exchange", {"messages": [A, X, B, Y]}, ["y"]),
        ("assistant", AGENT, ["x", SAID, "y"]),
        ("last_message", AGENT, ["y"]),
        ("last_exchange", AGENT, [SAID, "y"]),
        ("last_message", {"messages": [A, X, B, Y, C]}, ["y"]),
        ("assistant", {"messages": [A, X, B, Y, C]}, ["x", "y"]),
        ("assistant", {"prompt": [A, X, B], "completion": [Y]}, ["y"]),
        ("assistant", {"prompt": [A], "completion": [X, B, Y]}, ["x", "y"]),
        ("last_message", {"prompt": [A], "completion": [X, B, Y]}, ["y"]),
        ("last_exchange", {"prompt": [A], "completion": [X, B, Y]}, ["y"]),
    ],
)
def test_turns_that_are_learned(learn, row, expected):
    assert learned(row, learn=learn) == expected


@pytest.mark.parametrize("learn", ["assistant", "last_message", "last_exchange"])
@pytest.mark.parametrize("index", [1, 3, 5])
def test_weight_takes_a_turn_out_of_what_is_selected_and_adds_none(learn, index):
    selected = dict(zip((1, 3, 5), learned(AGENT), strict=True))
    chosen = {"assistant": {1, 3, 5}, "last_message": {5}, "last_exchange": {3, 5}}[learn]
    for weight in (0, 1):
        messages = list(AGENT["messages"])
        messages[index] = messages[index] | {"weight": weight}
        row = AGENT | {"messages": messages}
        left = chosen - {index} if weight == 0 else chosen
        expected = [selected[place] for place in sorted(left)]
        if expected:
            assert learned(row, learn=learn) == expected
        else:
            with pytest.raises(UserError, match=r"rows:1: .*learn"):
                encode(row, learn=learn)


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss"])
def test_all_names_of_weight_are_one(key):
    yes, no = (1, 0) if key == "weight" else (True, False)
    plain = {"messages": [A, X, B, Y]}
    assert texts({"messages": [A, X | {key: yes}, B, Y]}) == texts(plain)
    (text,) = texts({"messages": [A, X | {key: no}, B, Y]})
    assert text.startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦y<|im_end|>⟧"
    )
    assert texts({"messages": [A, X | {key: None}, B, Y]}) == texts(plain)


@pytest.mark.parametrize(
    ("keys", "role"),
    [
        ({"weight": 1, "train": False}, "assistant"),
        ({"train": True, "loss": False}, "assistant"),
        ({"weight": 0.5}, "assistant"),
        ({"weight": 2}, "assistant"),
        ({"weight": -1}, "assistant"),
        ({"weight": "1"}, "assistant"),
        ({"train": "yes"}, "assistant"),
        ({"weight": 1}, "user"),
        ({"train": True}, "system"),
    ],
)
def test_weight_that_says_nothing_clear_is_refused(keys, role):
    messages = [system("s"), A, X]
    place = [message["role"] for message in messages].index(role)
    messages[place] = messages[place] | keys
    with pytest.raises(UserError, match=rf"rows:1: .*messages\[{place}\]") as caught:
        encode({"messages": messages})
    assert any(key in str(caught.value) for key in keys)


def test_turn_of_weight_0_is_history_as_generation_renders_it():
    thinks = answer("x", reasoning_content="t")
    whole = texts({"messages": [A, thinks, B, Y]}, name="qwen 3")
    assert texts({"messages": [A, thinks | {"weight": 0}, B, Y]}, name="qwen 3") == whole[1:]


PAIR = {"prompt": "ab", "completion": " cd"}


def test_text_is_learned_whole_where_all_is_asked_for():
    assert texts(PAIR) == [f"ab⟦ cd{END}⟧"]
    assert texts(PAIR, learn="all") == [f"⟦ab cd{END}⟧"]


@pytest.mark.parametrize("row", [{"messages": [A, X]}, {"prompt": [A], "completion": [X]}])
def test_all_is_refused_on_messages(row):
    with pytest.raises(UserError, match=r"data\.learn"):
        encode(row, learn="all")


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a ", "b"), ("a\n", "\nb"), ("a", "b"), ("a ", " b")]
)
def test_completion_that_merges_with_the_prompt_is_encoded_apart(prompt, completion):
    tokenizer, examples = encode({"prompt": prompt, "completion": completion})
    ids, mask = examples.tokens[0].tolist(), examples.masks[0].tolist()
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(alone)] == alone
    assert mask == [False] * len(alone) + [True] * (len(ids) - len(alone))
    assert tokenizer.decode(ids[len(alone) :]) == completion + END


@pytest.mark.parametrize("name", list(ZOO))
def test_every_token_that_ends_a_turn_is_among_the_stop_ids(name):
    kind = ZOO[name]
    arguments = {"chat_template_kwargs": dict(kind.arguments)} if kind.arguments else {}
    rows = [{"messages": [A, X], **arguments}]
    if kind.call:
        rows.append({"messages": [A, CALLS], "tools": TOOLS, **arguments})
    tokenizer, examples = encode(*rows, name=name)
    ends = {kind.end} | ({kind.ends([1])} if kind.call else set())
    assert ends <= set(tokenizer.convert_ids_to_tokens(list(examples.stop_ids)))


def test_end_of_turn_eos_teaches_eos_where_the_template_has_no_end():
    rows = {"messages": [A, X, B, Y]}
    tokenizer, examples = encode(rows, name="alpaca", end_of_turn="eos")
    assert tokenizer.eos_token_id in examples.stop_ids
    for ids, mask in zip(examples.tokens, examples.masks, strict=True):
        assert ids[mask].tolist().count(tokenizer.eos_token_id) == 1
        assert ids[mask][-1] == tokenizer.eos_token_id


def test_arguments_of_the_run_are_the_default_of_all_rows():
    off = {"enable_thinking": False}
    row = {"messages": [A, X]}
    given = texts(row | {"chat_template_kwargs": off}, name="qwen 3")
    assert texts(row, name="qwen 3", chat_template_kwargs=off) == given
    on = row | {"chat_template_kwargs": {"enable_thinking": True}}
    assert texts(on, name="qwen 3", chat_template_kwargs=off) == texts(on, name="qwen 3")


@pytest.mark.parametrize("name", ["qwq", "r1 distill"])
def test_empty_blocks_that_are_closed_are_told_once(name):
    _, examples = encode(*[{"messages": [A, X]}] * 3, name=name)
    assert [note for note in examples.notes if "think" in note] != []
    assert len(examples.notes) == 1
    _, examples = encode({"messages": [A, answer("x", thinking="t")]}, name=name)
    assert examples.notes == ()


def test_bos_that_a_template_writes_twice_is_told():
    _, examples = encode({"messages": [A, X]}, name="bos twice")
    assert [note for note in examples.notes if "<s>" in note] != []
    _, examples = encode({"messages": [A, X, B, Y]}, name="llama 2")
    assert examples.notes == ()


def test_length_counts_for_every_example_of_a_row():
    row = {"messages": [A, answer("x", thinking="t"), B, Y]}
    tokenizer, examples = encode(row, row, name="qwen 3")
    lengths = [len(ids) for ids in examples.tokens]
    assert examples.lines == [1, 1, 2, 2]
    assert lengths[:2] == lengths[2:]
    assert encode_rows([row], tokenizer, max_length=max(lengths)).lines == [1, 1]
    # The new line behind the last stop token is not learned, and need not fit.
    assert len(encode_rows([row], tokenizer, max_length=max(lengths) - 1)) == 2
    with pytest.raises(UserError, match=rf"rows:1: {max(lengths) - 1} tokens"):
        encode_rows([row], tokenizer, max_length=max(lengths) - 2)


def test_long_conversation_is_one_example_where_prompts_extend_one_another():
    messages = [turn for _ in range(40) for turn in (A, X)]
    (text,) = texts({"messages": messages})
    assert text.count("⟦x<|im_end|>⟧") == 40
    assert len(texts({"messages": messages[:20]}, name="mistral nemo")) == 1
    rewritten = {"messages": [system("s"), *messages[:20]]}
    assert len(texts(rewritten, name="mistral nemo")) == 10
