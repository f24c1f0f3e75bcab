"""The quickstart's closing table says what the run's files say."""

import importlib
import io
import json
import re
import shlex

import pytest
import quickstart_report as qr
from rich.console import Console


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sample(step, prompt, reference, answer):
    return {"step": step, "prompt": prompt, "reference": reference, "answer": answer}


class ArgumentsUnderstood(Exception):
    """Raised where a command has read its arguments and begins its work."""


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 40 steps with an evaluation before, halfway and after."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(4_900_000))
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "eval_loss": 3.5, "eval_exact_match": 0.0},
            {"step": 20, "eval_loss": 0.9, "eval_exact_match": 0.5},
            {"step": 40, "loss": 0.1},
            {"step": 40, "eval_loss": 0.3, "eval_exact_match": 0.815},
        ],
    )
    questions = [("Who ?", "human"), ("Whom ?", "human"), ("Where ?", "location")]
    write_jsonl(
        tmp_path / "samples.jsonl",
        [sample(0, q, r, f"[b]Well[/b],\n {q}") for q, r in questions]
        + [sample(20, q, r, "halfway") for q, r in questions]
        + [sample(40, q, r, r) for q, r in questions],
    )
    return tmp_path


def printed(run, **options):
    console = Console(file=io.StringIO(), width=100)
    qr.report(run, console, **options)
    return console.file.getvalue()


def test_exact_match_of_base_and_adapter_stand_side_by_side(run):
    (line,) = [line for line in printed(run).splitlines() if "exact match" in line]
    assert line.index("0.0%") < line.index("81.5%")


def test_samples_show_both_answers_in_plain_text(run):
    text = printed(run)
    assert "[b]Well[/b], Who ?" in text
    assert "halfway" not in text
    assert "4.9 MB" in " ".join(text.split())  # a long path breaks its line


def test_samples_have_different_right_answers_where_possible(run):
    rows = qr.read_jsonl(run / "samples.jsonl")
    assert [s.question for s in qr.pick_samples(rows, 0, 40)] == ["Who ?", "Where ?", "Whom ?"]


def test_output_is_plain_when_piped(run, capsys):
    assert qr.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    commands = [line.strip() for line in out.splitlines() if "-m jaxpeft." in line]
    assert [shlex.split(command)[2] for command in commands] == [
        "jaxpeft.generate",
        "jaxpeft.evaluate",
        "jaxpeft.merge",
    ]


def test_commands_that_come_next_understand_their_arguments(monkeypatch):
    def load_model(path, **_):
        assert path == "data/quickstart/smollm2-135m-instruct.gguf"
        raise ArgumentsUnderstood

    monkeypatch.setattr("jaxpeft.pretrained.load.load_model", load_model)
    monkeypatch.setattr("jaxpeft.data.rows.kinds.read_rows", lambda path: [])
    for _, command in qr.next_commands("runs/quickstart"):
        _, _, module, *arguments = shlex.split(command)
        with pytest.raises(ArgumentsUnderstood):
            importlib.import_module(module).main(arguments)


def test_a_resumed_run_counts_the_last_evaluation_of_a_step(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval_exact_match": 0.25}\n')
    assert "25.0%" in printed(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, r"metrics\.jsonl: no such file"),
        ("metrics.jsonl", '{"step": 0, "eval_loss": 1.0}\n', "exact_match: true"),
        ("samples.jsonl", '{}\n{"step": 0, "pro', r"samples\.jsonl:2: not JSON"),
        ("samples.jsonl", "[]\n", r"samples\.jsonl:1: expected a JSON object"),
        ("adapter", None, "adapter: no such folder"),
    ],
)
def test_what_a_run_lacks_is_named_with_exit_code_2(run, capsys, name, content, message):
    if content is None:
        (run / name).rename(run / "away")
    else:
        (run / name).write_text(content)
    assert qr.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
