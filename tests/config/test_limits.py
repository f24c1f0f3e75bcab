"""Absurd numbers in a config or on a command line are refused with the key and the limit."""

import dataclasses
import re
import typing

import pytest
from config_values import SMALL
from places import CONFIGS

import jaxpeft as jp
from jaxpeft.config import run_config as cfg
from jaxpeft.config import sections
from jaxpeft.core import float32, limits
from jaxpeft.core.errors import UserError
from jaxpeft.data.settings import DataConfig
from jaxpeft.methods.registry import METHODS
from jaxpeft.training.output.folder import check_folder, write_config
from jaxpeft.updates.optimizers import OptimConfig

README = CONFIGS / "README.md"
HUGE = 10**12


def whole_numbers():
    """Every key of a config that holds a whole number, with the method that has it."""
    for key in cfg.SCHEMA.keys:
        kinds = [*typing.get_args(key.hint), key.hint]
        if int in kinds and key.path != "train.seed":
            yield key.path, key.variant


@pytest.mark.parametrize(("path", "variant"), sorted(whole_numbers()))
@pytest.mark.parametrize("value", [HUGE, 10**299])
def test_every_whole_number_of_a_config_has_a_limit(problems, path, variant, value):
    method = ["--method", f"{{name: {variant}}}"] if variant else []
    text = f"{{q_proj: {value}}}" if path == "method.rank_pattern" else str(value)
    found = problems(SMALL, *method, f"--{path}", text)
    told = [line for line in found if f"--{path}: " in line]
    assert len(told) == 1, found
    assert "must be at most " in told[0]
    assert len(told[0]) < 300


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.steps", 999_999_999_999),
        ("train.batch_size", 1_000_000_000),
        ("train.microbatch_size", 1_000_000_000),
        ("train.epochs", 1e300),
        ("data.max_length", 10**12),
        ("data.workers", 10**6),
        ("evaluation.max_new_tokens", 10**9),
        ("evaluation.batch_size", 10**9),
        ("optim.warmup_steps", 10**12),
        ("checkpoint.keep", 10**12),
        ("method.rank", 10**9),
    ],
)
def test_absurd_values_name_the_key_and_the_limit(problems, path, value):
    flags = ["--train.steps", "null"] if path == "train.epochs" else []
    lines = problems(SMALL, *flags, f"--{path}", str(value))
    most = limits.CONFIG.get(path.rpartition(".")[2], limits.WHOLE).most
    assert any(line.startswith(f"--{path}: must be at most {most:,}, got ") for line in lines), (
        lines
    )


def test_products_have_limits_too(problems):
    lines = problems(SMALL, "--train.batch_size", "1048576", "--data.max_length", "16777216")
    assert any("times data.max_length must be at most 268,435,456" in line for line in lines)
    method = ["--method", "{name: multitask_prompt_tuning, num_tokens: 65536, num_tasks: 65536}"]
    (line,) = problems(SMALL, *method)
    assert "method.num_tokens: times num_tasks must be at most 4,194,304, got 4,294,967,296" in line


def test_classes_say_the_same_as_files():
    with pytest.raises(UserError, match=r"^LoRA\.rank must be at most 65,536, got 1000000000: "):
        jp.LoRA(rank=10**9)
    with pytest.raises(UserError, match=r"^LoRA\.token_ids must have at most 1,048,576 entries"):
        jp.LoRA(token_ids=tuple(range(2**20 + 1)))
    values = {"peft_type": "LORA", "r": 10**9}
    with pytest.raises(UserError, match=r"adapter_config.json: r: must be at most 65,536"):
        jp.LoRA.from_peft(values)
    values = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}
    with pytest.raises(UserError, match=r"num_virtual_tokens: must be at most 65,536"):
        jp.PromptTuning.from_peft(values)


def test_flags_of_commands_have_the_same_limits():
    from jaxpeft.evaluate import main as evaluate_main
    from jaxpeft.generate import main as generate_main

    for flag in ("--max_new_tokens", "--batch_size"):
        with pytest.raises(UserError, match=rf"^{flag} must be at most "):
            generate_main(["--model", "absent/m.gguf", flag, "1000000000", "Who?"])
    with pytest.raises(UserError, match=r"^--max_length must be at most "):
        evaluate_main(["--model", "a/m.gguf", "--data", "b", "--max_length", "1000000000000"])


def test_limits_are_far_from_all_that_is_in_use():
    """The sizes of Llama 3.1 405B, Qwen3 and Gemma 3's vocabulary, and of a file of 10 MB a row."""
    used = {
        "num_layers": 126, "d_model": 16384, "d_ff": 53248, "num_heads": 128, "num_kv_heads": 8,
        "head_dim": 256, "vocab_size": 262_208,
    }  # fmt: skip
    assert used.keys() == limits.MODEL.keys()
    assert all(limits.MODEL[name].most >= 8 * size for name, size in used.items())
    assert limits.ROW_BYTES.most >= 10_000_000
    assert limits.CONFIG["rank"].most >= 16384


def test_the_table_in_the_guide_is_the_module():
    text = README.read_text().partition("# Limits")[2].partition("\n# ")[0]
    told = dict(re.findall(r"^\| `([\w.]+)`[^|]* \| ([\d,]+) \|", text, re.MULTILINE))
    ours = {**limits.CONFIG, **limits.MODEL, **limits.FILES, **limits.TEMPLATES}
    ours |= {name: getattr(limits, name) for name in ("BATCH_TOKENS", "PROMPT_TOKENS")}
    ours |= {"LIST_ITEMS": limits.LIST_ITEMS, "WHOLE": limits.WHOLE}
    assert told == {name: f"{limit.most:,}" for name, limit in ours.items()}
    module = {name for name, value in vars(limits).items() if isinstance(value, limits.Limit)}
    assert module <= told.keys()


LARGEST = {  # keys of `method`, and the entries of the list that they end with
    "numbers": ("name: trainable_tokens, token_ids", lambda i: str(2**31 - 1 - i)),
    "names": ("name: lora, targets", lambda i: f"model.layers.{i:05}.mlp.down_proj"),
}


@pytest.mark.parametrize("kind", [pytest.param("numbers", marks=pytest.mark.slow), "names"])
def test_a_run_reads_the_config_that_it_wrote_of_the_largest_one_allowed(tmp_path, kind):
    keys, entry = LARGEST[kind]
    text = SMALL.replace("output_dir: out", f"output_dir: {tmp_path / 'run'}")
    before, after = text.split("name: lora")
    room = limits.CONFIG_BYTES.most - len(before + keys + ": [" + "]" + after)
    body = ",".join(map(entry, range((room + 1) // (len(entry(0)) + 1))))
    file = tmp_path / "c.yaml"
    file.write_text(f"{before}{keys}: [{body.ljust(room)}]{after}")
    assert file.stat().st_size == limits.CONFIG_BYTES.most
    config = cfg.load_config(str(file))
    (tmp_path / "run").mkdir()
    write_config(config)
    assert (tmp_path / "run" / "config.yaml").stat().st_size > limits.CONFIG_BYTES.most
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
    with pytest.raises(UserError, match=r"run: train\.steps: 20 -> 40: under optim\.schedule"):
        check_folder(more)


LISTS = "lora, token_ids: [3, 1, 2], targets: [q_proj, v_proj]"


def test_lists_of_numbers_take_one_line(tmp_path):
    config = cfg.load_config(str(written(tmp_path, SMALL.replace("lora", LISTS))))
    assert "  token_ids: [3, 1, 2]\n" in cfg.to_yaml(config)
    assert cfg.load_config(str(written(tmp_path, cfg.to_yaml(config)))) == config


def written(folder, text):
    file = folder / "written.yaml"
    file.write_text(text)
    return file


def test_a_run_of_a_config_that_could_not_be_read_again_does_not_begin(tmp_path, monkeypatch):
    text = SMALL.replace("output_dir: out", f"output_dir: {tmp_path / 'run'}")
    config = cfg.load_config(str(written(tmp_path, text)))
    monkeypatch.setattr(limits, "WRITTEN_CONFIG_BYTES", limits.Limit(100, "too small"))
    with pytest.raises(UserError, match=r"config\.yaml: [\d,]+ bytes are too large, at most 100"):
        check_folder(config)
    assert not (tmp_path / "run").exists()


def fields_of_all_classes():
    """Every field of every class of a config."""
    ours = (
        sections.TrainSection,
        sections.EvaluationSection,
        sections.CheckpointSection,
        sections.MeshSection,
    )
    for kind in (*METHODS.values(), OptimConfig, DataConfig, *ours):
        for field in dataclasses.fields(kind):
            yield kind, field.name


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_of_more_digits_than_python_writes_are_refused_in_a_line(sign):
    """Of any field, alone or in a list or by name; else the text would be Python's own."""
    told, number = 0, sign * 10**5000
    for kind, name in fields_of_all_classes():
        for value in (number, (number,), {"q_proj": number}):
            with pytest.raises((ValueError, TypeError)) as error:
                kind(**{name: value})
            text = str(error.value)
            assert text.startswith(f"{kind.__name__}.{name} "), text
            assert "got a number of about 5001 digits" in text
            assert len(text) < 300
            told += 1
    assert told > 300
    with pytest.raises(UserError, match=r"^LoRA\.rank must be at most 65,536, got a number of abo"):
        jp.LoRA(rank=10**5000)
    assert float32.misfit(number).endswith("infinite, got a number of about 5001 digits")
