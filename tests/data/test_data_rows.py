import json

import pytest
from toy_tokenizer import shown, toy_tokenizer

from jaxpeft.core.errors import UserError
from jaxpeft.data.questions import make_questions
from jaxpeft.data.rows.kinds import Row, has_answer, read_rows
from jaxpeft.data.settings import Reading

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {"prompt": "1+1=", "completion": "2"}
TEXT = {"text": "Once upon a time"}


def turns(*roles, content="x"):
    return [{"role": role, "content": content} for role in roles]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content, name="train.jsonl"):
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (tmp_path / name).write_bytes(data)
        return name

    return write


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_rows(path)
    return str(caught.value)


def test_rows_of_all_kinds_are_read_with_their_lines(write):
    lines = [json.dumps(CHAT), "", json.dumps(PAIR | {"id": 7}), "  ", json.dumps(TEXT)]
    assert read_rows(write("\n".join(lines))) == [
        Row(1, CHAT),
        Row(3, PAIR | {"id": 7}),
        Row(5, TEXT),
    ]


def test_byte_order_mark_crlf_and_blanks_around_a_row_are_accepted(write):
    line = json.dumps(TEXT).encode()
    path = write(b"\xef\xbb\xbf  " + line + b" \r\n" + line + b"\r\n")
    assert read_rows(path) == [Row(1, TEXT), Row(2, TEXT)]


def test_line_separator_inside_a_text_does_not_split_the_row(write):
    row = {"text": "a\u2028b\x85c"}
    assert read_rows(write(json.dumps(row, ensure_ascii=False))) == [Row(1, row)]


def test_array_of_a_json_file_gives_rows_with_their_lines(write):
    text = '[\n  {"text": "a"},\n  {\n    "text": "b"\n  }, {"text": "c"}\n]\n'
    assert read_rows(write(text, "train.json")) == [
        Row(2, {"text": "a"}),
        Row(3, {"text": "b"}),
        Row(5, {"text": "c"}),
    ]


def test_json_file_may_have_one_object_a_line(write):
    assert read_rows(write('{"text": "a"}\n{"text": "b"}', "train.json")) == [
        Row(1, {"text": "a"}),
        Row(2, {"text": "b"}),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "p", "completion": null}', '"completion": expected text, got null'),
        ('{"prompt": 3, "completion": "c"}', '"prompt": expected text, got a number'),
        ('{"prompt": true, "completion": "c"}', '"prompt": expected text, got a boolean'),
        ('{"prompt": "p", "id": 1}', '"completion": missing; keys of the row: "prompt", "id"'),
        ('{"completion": "c"}', '"prompt": missing; keys of the row: "completion"'),
        ('{"text": ["a"]}', '"text": expected text, got a list'),
        ('{"text": " \\n"}', '"text": empty'),
        ('{"text": "\\ud800"}', '"text": half of a surrogate pair at character 0'),
        ('{"prompt": "", "completion": "c"}', '"prompt": empty'),
        ('{"prompt": "p", "completion": ""}', '"completion": empty'),
        ("[1, 2]", "expected an object, got a list"),
        ("3", "expected an object, got a number"),
        ("null", "expected an object, got null"),
        ("{}", "expected messages, or prompt and completion, or text; keys of the row: none"),
        (
            '{"massages": []}',
            "expected messages, or prompt and completion, or text; "
            'keys of the row: "massages"; did you mean "messages"?',
        ),
        (
            '{"text": "a", "prompt": "b"}',
            'the row mixes "prompt", "text"; keep messages, or prompt and completion, or text',
        ),
        (
            '{"prompt": "p", "completion": []}',
            '"prompt" is text and "completion" is a list; make both text or both lists of messages',
        ),
        ('{"text": NaN}', "NaN is not JSON; write null or a number"),
        ('{"text": "a", "score": -Infinity}', "-Infinity is not JSON; write null or a number"),
        ('{"text": "a", "text": "b"}', '"text": the key is given twice'),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "malformed JSON: Exceeds the limit"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "malformed JSON: nested too deeply"),
    ],
)
def test_bad_row_is_refused_with_its_line_and_field(write, line, why):
    path = write('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    assert refusal(path).startswith(f"train.jsonl:3: {why}")


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("Hi", '"messages": expected a list of messages, got text'),
        ([], '"messages": empty'),
        (["Hi"], '"messages[0]": expected an object, got text'),
        ([{"role": "user"}], '"messages[0].content": missing; keys of the message: "role"'),
        ([{"content": "Hi"}], '"messages[0].role": missing; keys of the message: "content"'),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            '"messages[0].content[0].text": expected text, got null',
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            '"messages[0].content[0].type": "image_url" is not supported; only text',
        ),
        (turns("user", "assistant", content=" "), '"messages[0].content": empty'),
        (
            turns("robot", "assistant"),
            '"messages[0].role": unknown role "robot"; known: system, user, assistant, tool',
        ),
        (
            turns("tool", "assistant"),
            '"messages[0].role": the conversation starts with the answer of a tool',
        ),
        (
            turns("assistant", "user"),
            '"messages[0].role": the conversation starts with an assistant turn',
        ),
        (
            turns("system", "assistant"),
            '"messages[1].role": the conversation starts with an assistant turn',
        ),
        (
            turns("user", "assistant", "system"),
            '"messages[2].role": a system message must be the first',
        ),
        (
            turns("system", "user"),
            '"messages": no assistant turn, so there is nothing to learn',
        ),
        (
            [{"role": "user", "content": "Hi"}, {**turns("assistant")[0], "tool_calls": [{}]}],
            '"messages[1].tool_calls[0].name": expected text, got null',
        ),
    ],
)
def test_bad_conversation_is_refused_with_the_message_and_why(write, messages, why):
    text = refusal(write(json.dumps({"messages": messages})))
    assert text.startswith(f"train.jsonl:1: {why}")


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        (turns("user"), turns("user"), '"completion": no assistant turn, so there is nothing'),
        (
            turns("user", "assistant"),
            turns("user", "assistant"),
            '"completion[0].role": a completion must open with an assistant turn',
        ),
        (turns("user"), [], '"completion": empty'),
        (turns("robot"), turns("assistant"), '"prompt[0].role": unknown role "robot"'),
    ],
)
def test_bad_prompt_and_completion_of_messages_are_refused(write, prompt, completion, why):
    text = refusal(write(json.dumps({"prompt": prompt, "completion": completion})))
    assert text.startswith(f"train.jsonl:1: {why}")


def test_all_problems_of_a_file_are_told_at_once_in_order(write):
    path = write('{"text": 1}\n{"text": "fine"}\n{"prompt": "", "completion": ""}\n{oops}\n')
    assert refusal(path).splitlines() == [
        'train.jsonl:1: "text": expected text, got a number',
        'train.jsonl:3: "prompt": empty',
        'train.jsonl:3: "completion": empty',
        "train.jsonl:4:2: malformed JSON: Expecting property name enclosed in double quotes",
        '4 problems in train.jsonl; set data.on_bad_row to "drop" to train without such rows',
    ]


def test_twenty_problems_are_shown_and_the_rest_counted(write):
    lines = refusal(write('{"text": 1}\n' * 33)).splitlines()
    assert lines[19] == 'train.jsonl:20: "text": expected text, got a number'
    assert len(lines) == 21
    assert lines[20].startswith("and 13 more; 33 problems in train.jsonl; ")


@pytest.mark.parametrize("cut", ['{"text": "a"}\n{"text": "b', '{"text": "a"}\n{"text": \n\n'])
def test_cut_last_line_is_called_incomplete(write, cut):
    text = refusal(write(cut))
    assert text.startswith("train.jsonl:2:")
    assert "the last line is incomplete: the file is cut off" in text


def test_object_over_several_lines_is_refused_where_it_starts(write):
    text = refusal(write('{\n"text": "a"\n}\n'))
    assert text.startswith("train.jsonl:1:2: malformed JSON: the line ends inside an object")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"text": "a"},\n {"text": "b', "train.json:2:11: the array is incomplete"),
        ('[{"text": "a"},\n', "train.json:2:1: the array is incomplete"),
        ('[{"text": "a"}\n {"text": "b"}]', "train.json:2:2: malformed JSON: Expecting ','"),
        ('[{"text": "a"}]\n {}', "train.json:2:2: malformed JSON: Extra data"),
        ('[{"text": "a"},\n]', "train.json:2:1: malformed JSON"),
        ('[\n{"text": "a", "text": "b"}]', 'train.json:2: "text": the key is given twice'),
        ("[" * 100_000, "train.json:1: malformed JSON: nested too deeply"),
        ("[ ]", "train.json: the array is empty"),
        ("[] x", "train.json:1:4: malformed JSON: Extra data"),
    ],
)
def test_malformed_array_is_refused_with_line_and_column(write, content, why):
    assert refusal(write(content, "train.json")).startswith(why)


def test_array_in_a_jsonl_file_is_refused(write):
    text = refusal(write('[{"text": "a"},\n{"text": "b"}]'))
    assert text.startswith("train.jsonl:1: the file is one JSON array")


def test_missing_file_is_answered_with_the_nearest_names(write):
    write("", "train.jsonl")
    assert "closest names: train.jsonl" in refusal("trian.jsonl")
    assert "there is no folder data" in refusal("data/train.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "train.jsonl: the file is empty"),
        (b"\n  \r\n\n", "train.jsonl: the file is blank"),
        (b"\xef\xbb\xbf", "train.jsonl: the file is blank"),
        (b"\x1f\x8b\x08\x00", "train.jsonl: this is a gzip file"),
        (b"PAR1....", "train.jsonl: this is a Parquet file"),
        ('{"text": "a"}'.encode("utf-16"), "train.jsonl: this is a UTF-16 file"),
        (
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            "train.jsonl:2: not UTF-8: byte 0xe9 at byte 24 of the file",
        ),
        (
            b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n',
            "train.jsonl:2: not UTF-8: byte 0xe9 at byte 27 of the file",
        ),
    ],
)
def test_file_that_is_no_text_is_refused(write, content, why):
    assert refusal(write(content)).startswith(why)


def test_folder_is_refused(tmp_path):
    assert "this is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        (PAIR | {"completion": " 2\n"}, "1+1=", "2"),
        (TEXT, None, None),
        (
            {
                "messages": [
                    *turns("system", "user", "assistant", "user"),
                    {"role": "assistant", "content": "last "},
                ]
            },
            "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\n",
            "last",
        ),
        (
            {"system": "S", "prompt": turns("user"), "completion": turns("assistant", content="y")},
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\n",
            "y",
        ),
    ],
)
def test_question_of_a_row_is_all_before_its_last_answer(row, asked, reference):
    questions = make_questions([row], toy_tokenizer(), Reading())
    found = [(shown(question.prompt), question.reference) for question in questions]
    assert found == ([] if asked is None else [(asked, reference)])
    assert has_answer(row) == (asked is not None)
