import json

import numpy as np
import pytest
from toy_tokenizer import CHATML, VOCAB_SIZE, shown, toy_tokenizer

from jaxpeft.core.errors import UserError
from jaxpeft.data.chat.template import render_messages
from jaxpeft.data.encode import encode_file
from jaxpeft.data.settings import Reading

PAIR = {"prompt": "ab", "completion": "cd"}


def chat(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for index, content in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return {"messages": messages}


@pytest.fixture
def encode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def encode(*rows, tokenizer=None, max_length=200, vocab_size=VOCAB_SIZE, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
        return encode_file(
            "train.jsonl",
            tokenizer or toy_tokenizer(),
            max_length=max_length,
            vocab_size=vocab_size,
            **options,
        )

    return encode


def learned(examples):
    return [shown(*pair) for pair in zip(examples.tokens, examples.masks, strict=True)]


def test_assistant_turns_are_learned_with_their_end_though_pad_is_eos(encode):
    tokenizer = toy_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = encode(chat("Hi", "Hello", "1+1", "2", system="S"))
    assert learned(examples) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Hello<|im_end|>]\n<|im_start|>user\n1+1<|im_end|>\n"
        "<|im_start|>assistant\n[2<|im_end|>]\n"
    ]
    assert examples.tokens[0].dtype == np.int32
    assert examples.masks[0].dtype == bool


def test_default_system_prompt_of_the_template_is_kept_and_not_learned(encode):
    assert learned(encode(chat("Hi", "Hello"))) == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Hello<|im_end|>]\n"
    ]


def test_user_turn_after_the_last_answer_is_not_learned(encode):
    text = learned(encode(chat("Hi", "Hello", "Bye", system="S")))[0]
    assert text.endswith("[Hello<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n")


def test_only_the_completion_of_messages_is_learned(encode):
    messages = chat("a", "b", "c", "d", system="S")["messages"]
    text = learned(encode({"prompt": messages[:4], "completion": messages[4:]}))[0]
    assert "assistant\nb<|im_end|>" in text
    assert text.endswith("assistant\n[d<|im_end|>]\n")


def test_blanks_in_the_content_are_learned_and_blanks_of_the_template_are_not(encode):
    assert learned(encode(chat("Hi", "x \n")))[0].endswith("assistant\n[x \n<|im_end|>]\n")


PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_template_that_writes_no_end_is_refused_before_training(encode):
    with pytest.raises(UserError, match=r"no end behind an answer.*data.end_of_turn to eos"):
        encode(chat("Hi", "Hello"), tokenizer=toy_tokenizer(PLAIN))


def test_end_token_is_learned_where_the_template_writes_no_end(encode):
    """History has no end token, so each turn stands behind its own prompt."""
    row, reading = chat("Hi", "Hello", "1+1", "2"), Reading(end_of_turn="eos")
    examples = encode(row, tokenizer=toy_tokenizer(PLAIN), reading=reading)
    assert learned(examples) == [
        "user: Hi\nassistant: [Hello<|im_end|>]",
        "user: Hi\nassistant: Hello\nuser: 1+1\nassistant: [2<|im_end|>]",
    ]
    assert (examples.num_rows, examples.lines) == (1, [1, 1])
    assert examples.stop_ids == (1,)


def test_template_that_writes_bos_gets_no_second_one(encode):
    tokenizer = toy_tokenizer("{{ bos_token }}" + CHATML, bos=True)
    text = learned(encode(chat("Hi", "Hello", system="S"), tokenizer=tokenizer))[0]
    assert text.startswith("<s><|im_start|>system")


@pytest.mark.parametrize(
    ("bos", "eos", "row", "expected"),
    [
        (False, True, PAIR, "ab[cd<|im_end|>]"),
        (True, True, PAIR, "<s>ab[cd<|im_end|>]"),
        (True, False, PAIR, "<s>ab[cd]"),
        (True, True, {"text": "abc"}, "<s>[abc<|im_end|>]"),
        (True, True, {"text": "<s>abc<|im_end|>"}, "[<s>abc<|im_end|>]"),
        (False, False, {"text": "abc"}, "[abc]"),
    ],
)
def test_plain_text_gets_bos_and_eos_once(encode, bos, eos, row, expected):
    assert learned(encode(row, tokenizer=toy_tokenizer(bos=bos, eos=eos))) == [expected]


def test_prompt_and_answer_are_encoded_apart_where_they_would_merge(encode):
    assert learned(encode({"prompt": "a ", "completion": "b"})) == ["a [b<|im_end|>]"]
    assert learned(encode({"prompt": "a", "completion": " b"})) == ["a[ b<|im_end|>]"]
    spaced = CHATML.replace("assistant\n{% endif", "assistant\n{{ ' ' }}{% endif")
    spaced = spaced.replace("}}\n{{ m['content']", "}}\n {{ m['content']")
    text = learned(encode(chat("Hi", "bye", system="S"), tokenizer=toy_tokenizer(spaced)))[0]
    assert text.endswith("<|im_start|>assistant\n [bye<|im_end|>]")


def test_turns_behind_rewritten_history_are_examples_of_their_own(encode):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: "
        "{% if m['role'] == 'assistant' and loop.last %}(think) {% endif %}{{ m['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    examples = encode(chat("Hi", "yo", "So", "no"), tokenizer=toy_tokenizer(template))
    assert learned(examples) == [
        "<|im_start|>user: Hi<|im_end|><|im_start|>assistant: [(think) yo<|im_end|>]",
        "<|im_start|>user: Hi<|im_end|><|im_start|>assistant: yo<|im_end|>"
        "<|im_start|>user: So<|im_end|><|im_start|>assistant: [(think) no<|im_end|>]",
    ]
    assert (examples.num_rows, len(examples), examples.lines) == (1, 2, [1, 1])
    assert len(examples.first(1)) == 2


def test_message_of_a_template_that_refuses_is_passed_on(encode):
    template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(UserError, match=r"train.jsonl:1: the chat template refuses .*no system"):
        encode(chat("Hi", "yo"), tokenizer=toy_tokenizer(template))


def test_messages_without_a_chat_template_are_refused(encode):
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        encode(chat("Hi", "yo"), tokenizer=toy_tokenizer(None))
    assert len(encode(PAIR, tokenizer=toy_tokenizer(None))) == 1


@pytest.mark.parametrize(
    ("form", "date"), [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26")]
)
def test_date_in_a_template_does_not_change_from_day_to_day(form, date):
    template = (
        "{% if date_string is not defined and strftime_now is defined %}"
        f"{{% set date_string = strftime_now('{form}') %}}"
        "{% endif %}{% for m in messages %}{{ date_string }} {{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert render_messages(toy_tokenizer(template), messages) == f"{date} Hi"


def test_long_rows_are_refused_with_lengths_and_the_length_to_set(encode):
    rows = [{"text": "a" * 5}, {"text": "a" * 20}, {"text": "a" * 30}]
    with pytest.raises(UserError) as caught:
        encode(*rows, max_length=10, on_bad_row="drop")
    assert str(caught.value).splitlines() == [
        "train.jsonl:2: 21 tokens, more than max_length 10",
        "train.jsonl:3: 31 tokens, more than max_length 10",
        '2 problems in train.jsonl; set data.max_length to 31, or data.on_long to "drop" or '
        '"truncate"',
    ]


def test_long_rows_are_dropped_and_counted(encode):
    examples = encode({"text": "ab"}, {"text": "a" * 20}, max_length=10, on_long="drop")
    assert learned(examples) == ["[ab<|im_end|>]"]
    assert (examples.dropped, examples.truncated, examples.lines) == ({"too long": 1}, 0, [1])


def test_long_rows_are_truncated_and_counted(encode):
    rows = [{"text": "ab"}, {"text": "c" * 20}, {"prompt": "d" * 10, "completion": "e"}]
    with pytest.raises(UserError, match=r"train.jsonl:3: no supervised token is left"):
        encode(*rows, max_length=4, on_long="truncate")
    examples = encode(*rows, max_length=4, on_long="truncate", on_bad_row="drop")
    assert learned(examples) == ["[ab<|im_end|>]", "[cccc]"]
    assert examples.truncated == 1
    assert examples.dropped == {"no supervised token": 1}


def test_token_outside_the_vocabulary_is_refused_with_row_and_id(encode):
    with pytest.raises(UserError) as caught:
        encode({"text": "a"}, {"text": "a~"}, vocab_size=50)
    assert str(caught.value).startswith(
        "train.jsonl:2: token id 97 ('~') is outside the model's vocabulary of 50; use the "
    )


def test_problems_of_reading_and_of_encoding_are_told_together(encode):
    with pytest.raises(UserError) as caught:
        encode({"text": "a" * 20}, '{"text": ', PAIR, {"text": 1}, max_length=10)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[:3]] == [
        "train.jsonl:1",
        "train.jsonl:2:9",
        "train.jsonl:4",
    ]


def test_bad_rows_are_dropped_and_counted_by_reason(encode):
    examples = encode(
        "{oops", {"text": 1}, PAIR, {"prompt": "", "completion": ""}, on_bad_row="drop"
    )
    assert learned(examples) == ["ab[cd<|im_end|>]"]
    assert examples.lines == [3]
    assert examples.dropped == {"malformed JSON": 1, "bad row": 2}


def test_file_without_a_usable_row_is_refused_with_counts(encode):
    rows = ["{oops", {"text": 1}, {"text": 2}, {"text": "a" * 20}]
    with pytest.raises(UserError) as caught:
        encode(*rows, max_length=10, on_bad_row="drop", on_long="drop")
    assert str(caught.value) == (
        "train.jsonl: no row is left: 2 bad row, 1 malformed JSON, 1 too long."
    )


def test_encoding_leaves_the_folder_and_the_progress_bars_as_they_were(encode, tmp_path, capfd):
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    encode(*[PAIR] * 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]
    assert datasets.are_progress_bars_disabled() == were_off
    assert capfd.readouterr().err == ""
