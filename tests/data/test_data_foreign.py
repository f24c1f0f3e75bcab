"""Files that are no rows of JSON: what they are is told, and the command that is told works."""

import json
import subprocess
import sys

import pytest

from jaxpeft.core.errors import UserError
from jaxpeft.data.rows.json_rows import read_json
from jaxpeft.data.rows.kinds import read_rows

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
DROP = "on_bad_row"


def refusal(path):
    with pytest.raises(UserError) as error:
        read_rows(path)
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    return text


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content, name="train.jsonl"):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return name

    return write


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


CSV = 'prompt,completion\n"a, ""b""",c\n"d\ne",\u00e9\n'
OTHERS = {
    "csv": (CSV, "this looks like CSV with the columns prompt, completion, not JSON; convert it: "),
    "csv after a mark": ("\ufeff" + CSV, "this looks like CSV with the columns prompt, completion"),
    "tsv": (
        "prompt\tcompletion\na\tb\n",
        "this looks like TSV with the columns prompt, completion",
    ),
    "semicolons": ("prompt;completion\na;b\n", "this looks like CSV (with semicolons)"),
    "csv of other columns": (
        "question,answer\na,b\n",
        "convert it, after its columns are renamed to prompt and completion, or to text: ",
    ),
    "python dicts": ("{'text': 'a'}\n{'text': 'b'}\n", "this looks like Python dicts, not JSON"),
    "plain text": (
        "Once upon\na time\n",
        "plain text, not JSON; write one object a line, such as ",
    ),
    "arrays of words": (lines(["a", "b"], ["c", "d"]), "every line is an array; write one object"),
    "arrays of numbers": (lines([1], [2]), "every line is an array; write one object a line"),
    "arrays of objects": (lines([{"text": "a"}], [{"text": "b"}]), "every line is an array of obj"),
    "arrays of messages": (lines(CHAT, CHAT), 'write {"messages": [...]} on each line'),
    "one array of messages": (lines(CHAT), 'a row of it is {"messages": [...]}'),
    "ShareGPT's messages": (lines(SHAREGPT, SHAREGPT), 'write {"messages": [...]} on each line'),
    "array of conversations": (json.dumps([CHAT, CHAT]), 'write {"messages": [...]} for each'),
    "one array of objects": (json.dumps([{"text": "a"}]), "rename it to .json or write one object"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid x\n", "`git lfs pull`"),
    "web page": ("<!DOCTYPE html>\n<html></html>\n", "this is a web page (HTML or XML)"),
    "gzip": (b"\x1f\x8b\x08\x00", "unpack it with gunzip first"),
    "parquet": (b"PAR1xxxx", "this is a Parquet file"),
    "spreadsheet": (b"PK\x03\x04", "of a spreadsheet (.xlsx) save the sheet as CSV"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "this is a UTF-16 file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_file_is_instead_is_told_with_the_way_out(write, name):
    content, why = OTHERS[name]
    text = refusal(write(content))
    assert text.startswith("train.jsonl:")
    assert why in text
    assert DROP not in text  # all rows are bad: there would be none left


def test_json_files_are_told_the_same_way(write):
    assert 'a row of it is {"messages": [...]}' in refusal(write(json.dumps(CHAT), "a.json"))
    indented = json.dumps(CHAT, indent=2)
    assert 'a row of it is {"messages": [...]}' in refusal(write(indented, "a.json"))
    assert "the file is an array of arrays" in refusal(write("[[1], [2]]", "a.json"))
    assert "this looks like CSV" in refusal(write(CSV, "a.csv"))


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (
            CSV,
            [{"prompt": 'a, "b"', "completion": "c"}, {"prompt": "d\ne", "completion": "\u00e9"}],
        ),
        ("prompt\tcompletion\na\tb\n", [{"prompt": "a", "completion": "b"}]),
        ("prompt;completion\na;b\n", [{"prompt": "a", "completion": "b"}]),
        (lines([{"text": "a"}], [{"text": "b"}, {"text": "\u00e9"}]), ["a", "b", "\u00e9"]),
    ],
)
def test_the_command_that_is_told_makes_rows_of_the_file(write, tmp_path, content, rows):
    text = refusal(write(content, "my rows.jsonl"))
    command = "python -c" + text.split("python -c", 1)[1].removesuffix(".")
    command = command.replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=60)
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    assert [row.value for row in read_rows("my rows.rows.jsonl")] == rows


def test_a_bad_line_among_good_ones_may_be_dropped(write):
    for bad in ("a,b\n", "[1]\n", "{'text': 'a'}\n"):
        path = write(lines({"text": "a"}) + bad)
        assert DROP in refusal(path)
    mixed = write(lines(CHAT, {"text": "a"}))
    assert [value for _, value in read_json(mixed).values] == [CHAT, {"text": "a"}]


def test_dropping_is_no_way_out_where_no_row_is_left(write):
    text = refusal(write('{"text": }\n'))
    assert text.startswith("train.jsonl:1:10: malformed JSON")
    assert DROP not in text


def test_a_folder_names_the_files_in_it(write, tmp_path):
    (tmp_path / "rows").mkdir()
    assert "it holds no .jsonl or .json file" in refusal("rows")
    (tmp_path / "rows" / "a.jsonl").write_text("")
    assert refusal("rows").endswith("give a file in it: a.jsonl.")


def test_a_dataset_of_the_hub_is_no_file(write):
    assert "datasets.load_dataset('org/rows', split='train').to_json" in refusal("org/rows")
    assert "load_dataset" not in refusal("org/rows.jsonl")
