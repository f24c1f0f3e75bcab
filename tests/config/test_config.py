"""The YAML config: what is read, what is refused, and where an error points."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from config_values import SMALL, value

from jaxpeft.config import run_config as cfg
from jaxpeft.config import sections
from jaxpeft.config.schema import fields_of, is_section
from jaxpeft.core.errors import UserError
from jaxpeft.core.foreign_names import ELSEWHERE, FOREIGN
from jaxpeft.data.settings import DataConfig
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.registry import METHODS
from jaxpeft.updates.optimizers import OptimConfig


def test_the_design_page_config_becomes_dataclasses(load):
    config = load(
        """
model: {path: some/model, revision: null, dtype: bfloat16, compute_dtype: auto}
method: {name: lora, rank: 16, alpha: 32, targets: all-linear, dropout: 0.0}
data: {train: train.jsonl, eval: test.jsonl, max_length: 512, packing: true, on_long: error}
optim: {name: adamw, learning_rate: 2.0e-4, schedule: cosine, warmup_steps: 10, clip_norm: 1.0}
train: {steps: 200, batch_size: 8, microbatch_size: null, remat: full, seed: 0}
evaluation: {every: 50, exact_match: false, max_new_tokens: 32, max_rows: null}
checkpoint: {every: 50, keep: 2, best: null}
mesh: {data: -1, fsdp: 1, tensor: 1}
output_dir: runs/quickstart
"""
    )
    assert config == cfg.RunConfig(
        model=sections.ModelSection(path="some/model", dtype="bfloat16"),
        method=LoRA(rank=16, alpha=32.0),
        data=DataConfig(train="train.jsonl", eval="test.jsonl"),
        optim=OptimConfig(warmup_steps=10),
        train=sections.TrainSection(steps=200),
        evaluation=sections.EvaluationSection(every=50),
        checkpoint=sections.CheckpointSection(every=50),
        output_dir="runs/quickstart",
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("2.0e-4", 2e-4), ("3", 3.0), (".5", 0.5), ("1.", 1.0), ("+1E3", 1e3)],
)
def test_numbers_are_read_by_yaml_1_2(text, number):
    actual = value("number", text)
    assert isinstance(actual, float)
    assert actual == number


@pytest.mark.parametrize("text", ["no", "yes", "010", "1e-4", "true", "1:30", "0x10", "2024-01-01"])
def test_text_fields_keep_what_was_written(text):
    assert value("text", text) == text
    assert value("maybe", text) == text
    assert value("names", f"[{text}]") == (text,)


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("8", 8), ("-1", -1)])
def test_whole_numbers_are_decimal(text, number):
    assert value("count", text) == number


def test_null_is_null_only_where_allowed_and_unquoted():
    assert value("maybe", "null") is value("maybe", "~") is value("maybe", "") is None
    assert value("maybe", '"null"') == "null"
    with pytest.raises(UserError, match=r"v\.yaml:1: text: expected text, got null"):
        value("text", "null")


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("count", "eight", "expected a whole number, got eight"),
        ("count", "8.0", "expected a whole number, got 8.0"),
        ("count", "1e3", "expected a whole number, got 1e3"),
        ("count", "true", "expected a whole number, got true"),
        ("count", '"8"', 'expected a whole number, got the text "8"; drop the quotes'),
        ("count", "[8]", "expected a whole number, got a list"),
        ("number", ".nan", "expected a number, got .nan"),
        ("number", "inf", "expected a number, got inf"),
        ("number", "1e999", "expected a number, got 1e999; it is too large"),
        ("flag", "yes", "expected true or false, got yes; write true"),
        ("flag", "1", "expected true or false, got 1"),
        ("names", "{a: b}", "expected a list of text or text, got keys and values"),
        ("names", "[a, [b]]", "expected a list of text or text, got a list"),
    ],
)
def test_wrong_type_names_field_type_and_value(key, text, message):
    with pytest.raises(UserError) as caught:
        value(key, text)
    assert str(caught.value) == f"v.yaml:1: {key}: {message}"


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("method", "rnak: 8", 'method.rnak: unknown key, did you mean "rank"?'),
        ("method", "r: 8", 'method.r: unknown key, PEFT\'s r is "rank" here'),
        ("train", "lora_alpha: 8", 'PEFT\'s lora_alpha is "method.alpha" here'),
        ("train", "max_steps: 8", "train.max_steps: unknown key, Hugging Face's max_steps is \"st"),
        ("train", "learning_rate: 1", 'belongs under "optim": optim.learning_rate'),
        ("model", "max_length: 1", 'belongs under "data": data.max_length'),
        ("data", "every: 1", '"evaluation" or "checkpoint": '),
        ("optim", "beta1: 0.8", 'is "b1" here'),
        ("data", "optim: adamw", '"optim" is a section at the top level'),
        ("data", "output_dir: x", 'belongs under "the top level": output_dir'),
        ("model", "load_in_4bit: true", 'PEFT\'s load_in_4bit is "quantization" here'),
        ("method", "layers_to_transform: [0]", 'PEFT\'s layers_to_transform is "layers" here'),
        (
            "method",
            "trainable_token_indices: [3]",
            '"token_ids" here (of the head: head_token_ids)',
        ),
        ("method", "modules_to_save: [norm]", 'is "save_modules" here'),
        ("model", "bias: all", 'is "method.bias" here (with name: lora, all or lora_only; '),
        ("model", "Path: x", 'did you mean "path"?'),
        ("optim", "zzzzz: 3", "optim.zzzzz: unknown key, known here: name, learning_rate,"),
    ],
)
def test_unknown_key_is_answered_with_the_right_one(problems, section, line, message):
    text = SMALL.replace(f"{section}: {{", f"{section}: {{{line}, ")
    text = text if section in SMALL else f"{SMALL}{section}: {{{line}}}\n"
    (problem,) = problems(text)
    where = text.split("\n").index(next(t for t in text.split("\n") if line in t)) + 1
    assert problem.startswith(f"c.yaml:{where}: {section}.")
    assert message in problem


CLASSES = [
    *METHODS.values(),
    *(hint for field, hint in fields_of(cfg.RunConfig) if is_section(field, hint) and hint != Any),
]


@pytest.mark.parametrize("cls", [*CLASSES, cfg.RunConfig], ids=lambda cls: cls.__name__)
def test_a_class_of_the_config_answers_a_wrong_keyword_as_yaml_does(cls):
    with pytest.raises(UserError, match=rf"^{cls.__name__}\.zzzzz: unknown key, known here: "):
        cls(zzzzz=1)
    with pytest.raises(TypeError, match="positional argument"):
        cls(1, 2)
    assert list(inspect.signature(cls).parameters) == [field.name for field, _ in fields_of(cls)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_of_the_config_is_pickled_copied_and_replaced(cls):
    given = {"path": "a", "train": "b", "steps": 3, "token_ids": (1,), "num_tasks": 2}
    names = [field.name for field, _ in fields_of(cls)]
    one = cls(**{name: value for name, value in given.items() if name in names})
    again = (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), dataclasses.replace(one))
    assert all(other == one and type(other) is cls for other in again)


def test_every_foreign_name_leads_to_a_key_that_exists():
    known = {key.path for key in cfg.SCHEMA.keys} | set(cfg.SCHEMA.sections())
    assert {name: f for name, f in FOREIGN.items() if f.path and f.path not in known} == {}
    assert all(foreign.path or foreign.remark for foreign in FOREIGN.values())
    leaves = {key.path.rpartition(".")[2] for key in cfg.SCHEMA.keys if not key.variant}
    assert leaves & set(FOREIGN) == set()
    assert {place.path for place in ELSEWHERE.values()} <= known


def test_all_problems_are_told_together_in_order(problems):
    text = (
        "model: {path: 3, pth: x}\nmethod:\n  name: lora\n  rank: eight\n  alpha: [1]\nbf16: true\n"
    )
    assert [": ".join(line.split(": ")[:2]) for line in problems(text)] == [
        "c.yaml: data.train",
        "c.yaml: train",
        "c.yaml:1: model.pth",
        "c.yaml:1: output_dir",
        "c.yaml:4: method.rank",
        "c.yaml:5: method.alpha",
        "c.yaml:6: bf16",
    ]


def test_at_most_twenty_problems_are_listed(problems):
    lines = problems(SMALL + "".join(f"unknown{i}: 1\n" for i in range(30)))
    assert len(lines) == 21
    assert lines[-1] == "c.yaml: 10 more problems"


def test_doubled_key_names_both_lines(problems):
    text = SMALL.replace("train: {steps: 20}", "train:\n  steps: 20\n  seed: 1\n  steps: 30")
    assert problems(text) == [
        "c.yaml:7: train.steps: given twice, also on line 5; keep one of the two"
    ]
    assert "output_dir: given twice, also on line 5" in problems(SMALL + "output_dir: b\n")[0]


@pytest.mark.parametrize(
    ("text", "start", "part"),
    [
        ("model:\n\tpath: x\n", "c.yaml:2:1: not valid YAML", "indent with spaces"),
        ("model: {path: x\n", "c.yaml:2:1: not valid YAML", "expected ',' or '}'"),
        ("a: b: c\n", "c.yaml:1:5: not valid YAML", "mapping values are not allowed"),
        ("a: *b\n", "c.yaml:1:4: not valid YAML", "undefined alias"),
        ("a: 1\n---\na: 2\n", "c.yaml:2:1: not valid YAML", "single document"),
        ("a: \x01\n", "c.yaml:1: character U+0001", "not allowed"),
        ("# nothing\n", "c.yaml: ", "only comments"),
        ("- a\n", "c.yaml:1: ", "expected keys and values (key: value), got a list"),
        ("a: 1\nb: !!python/object:os.system x\n", "c.yaml:2: ", "tags are not allowed"),
        ("a: " + "[" * 5000, "c.yaml:1: ", "nested too deeply"),
        ("  \n", "c.yaml: ", "is empty; for example: python -m jaxpeft.train"),
    ],
)
def test_broken_file_is_one_sentence_with_its_place(problems, text, start, part):
    (problem,) = problems(text)
    assert problem.startswith(start)
    assert part in problem


def test_merge_key_and_listed_key_are_refused(problems):
    text = SMALL.replace("train: {steps: 20}", "train: &t {steps: 20}\n<<: *t\n? [a]\n: b")
    assert problems(text) == [
        "c.yaml:5: merge keys (<<) are not allowed; write the keys out",
        "c.yaml:6: a key must be a word",
    ]


def test_an_anchor_stands_for_its_value(load):
    text = SMALL.replace("train.jsonl", "&rows rows.jsonl").replace("test.jsonl", "*rows")
    assert load(text).data == DataConfig(train="rows.jsonl", eval="rows.jsonl")


def test_missing_file_folder_and_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/tiny.yaml").write_text(SMALL)
    Path("model.gguf").write_bytes(b"a: \xff\xfe")
    Path("large.yaml").write_bytes(b"#" * (2 << 20))
    for path, parts in {
        "configs/tniy.yaml": [
            "no such config file",
            "did you mean configs/tiny.yaml?; for example",
        ],
        "configs": ["a folder, not a config file (it holds tiny.yaml); for example"],
        "model.gguf": ["byte 3 is not UTF-8"],
        "large.yaml": ["2,097,152 bytes are too large, at most 262,144 are read: a config file"],
    }.items():
        with pytest.raises(UserError) as caught:
            cfg.load_config(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert all(part in str(caught.value) for part in parts)


def test_byte_order_mark_and_crlf_are_fine(load):
    assert load("\ufeff" + SMALL.replace("\n", "\r\n")) == load(SMALL)


def test_an_empty_section_is_its_defaults(load):
    assert load(SMALL + "evaluation:\ncheckpoint: {}\n") == load(SMALL)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: 3", "c.yaml:2: method: expected keys and values (key: value), got 3"),
        ("method: {rank: 3}", "c.yaml:2: method.name: missing, one of: lora, full"),
        (
            "method: {name: lroa}",
            f"c.yaml:2: method.name: expected one of {', '.join(METHODS)}, got lroa, did",
        ),
        ("method: {name: full, rank: 8}", 'c.yaml:2: method.rank: unknown key for name "full", it'),
    ],
)
def test_method_is_chosen_by_its_name(problems, load, text, problem):
    (line,) = problems(SMALL.replace("method: {name: lora}", text))
    assert line.startswith(problem)
    assert load(SMALL.replace("lora", "full")).method == Full()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--method.rank 0", "--method.rank: must be a whole number of at least 1, got 0"),
        ("--method.dropout 1", "--method.dropout: must be in [0, 1), got 1.0"),
        ("--optim.learning_rate 0", "--optim.learning_rate: must be finite and positive, got 0.0"),
        ("--optim.learning_rate nan", "--optim.learning_rate: expected a number, got nan"),
        ("--data.max_length 1", "--data.max_length: must be at least 2, got 1"),
        ("--train.steps 0", "--train.steps: must be at least 1, got 0"),
        ("--train.steps null", "--train.steps: train: give steps or epochs, e.g. steps: 200"),
        ("--train.epochs 2", "--train.epochs: train: give steps or epochs, not both, got steps 20"),
        ("--train.batch_size 6 --train.microbatch_size 4", "--train.microbatch_size: must divide"),
        ("--train.seed -1", "--train.seed: must lie in [0, 2**32), got -1"),
        ("--train.remat dot", "--train.remat: expected one of none, dots, full, got dot, did you"),
        ("--optim.warmup_steps 21", "--optim.warmup_steps: must be at most train.steps, got 21"),
        ("--evaluation.every 0", "--evaluation.every: must be at least 1, got 0"),
        ("--evaluation.every 1 --data.eval null", "--evaluation.every: needs rows to evaluate on"),
        ("--checkpoint.best eval_exact_match", "--checkpoint.best: needs eval_exact_match; set ev"),
        ("--mesh.fsdp -1", "--mesh.fsdp: mesh: at most one axis may be -1, got data and fsdp"),
        ("--mesh.tensor 0", "--mesh.tensor: must be at least 1, or -1, got 0"),
        ("--optim.lr 3", '--optim.lr: unknown key, Hugging Face\'s lr is "learning_rate" here'),
        ("--trian.steps 3", '--trian.steps: trian: unknown key, did you mean "train"?'),
        ("--model.path.x 3", "--model.path.x: model.path is a value and has no keys"),
        ("--model.path", "--model.path: needs a value, as in --model.path VALUE"),
        ("model.path 3", "model.path: expected an override such as --optim.learning_rate 3e-4"),
    ],
)
def test_nonsense_is_refused_at_the_flag_that_said_it(problems, flags, problem):
    (line,) = problems(SMALL, *flags.split())
    assert line.startswith(problem)


def test_nonsense_is_refused_at_the_line_that_said_it(problems):
    text = SMALL + "mesh:\n  data: 1\n  fsdp: 0\noptim:\n  warmup_steps: 50\n"
    assert problems(text) == ["c.yaml:8: mesh.fsdp: must be at least 1, or -1, got 0"]
    assert problems(text.replace("fsdp: 0", "fsdp: 1")) == [
        "c.yaml:10: optim.warmup_steps: must be at most train.steps, got 50 and 20"
    ]


def test_overrides_win_over_the_file(load):
    config = load(
        SMALL,
        *("--optim.learning_rate", "3e-4", "--data.max_length=256", "--mesh.data", "-1"),
        *("--method.targets", "q_proj, v_proj", "--method.exclude", "[a, b]"),
        *("--optim.trainable", "norm/scale", "--output_dir", "a: #b", "--track.wandb=x=y"),
        *("--train.steps", "5", "--train.steps", "6"),
    )
    assert config.optim == OptimConfig(learning_rate=3e-4, trainable=("norm/scale",))
    assert config.data.max_length == 256
    assert config.method == LoRA(targets=("q_proj", "v_proj"), exclude=("a", "b"))
    assert (config.output_dir, config.track.wandb, config.train.steps) == ("a: #b", "x=y", 6)


@pytest.mark.parametrize("regex", [r".*\.(q|v)_proj", "a{1,2}b", "[qv]_proj", "(a,b)"])
def test_a_regex_override_is_not_a_list(load, regex):
    assert load(SMALL, "--method.targets", regex).method.targets == regex


def test_a_whole_section_can_be_overridden(load):
    text = SMALL.replace("{name: lora}", "{name: lora, rank: 4}")
    assert load(text, "--method", "{name: full}").method == Full()
    assert load(text, "--method", "{name: lora, alpha: 1}").method == LoRA(alpha=1.0)


def test_an_override_through_an_anchor_changes_one_place_only(load):
    text = SMALL + "evaluation: &e {}\ncheckpoint: *e\n"
    config = load(text, "--evaluation.every", "3")
    assert (config.evaluation.every, config.checkpoint.every) == (3, None)
