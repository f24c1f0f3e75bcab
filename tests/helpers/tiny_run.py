"""A tiny model folder, rows to learn, and a config of a run over them, for tests of the trainer."""

import dataclasses
import json
import pathlib
import random

import jax
import yaml
from toy_model import toy_model

import jaxpeft as jp

STEPS = 12


@dataclasses.dataclass(frozen=True)
class Files:
    """What a run reads; never changed."""

    model: pathlib.Path
    train: pathlib.Path
    eval: pathlib.Path


def make_files(folder: pathlib.Path) -> Files:
    """Writes a Hugging Face folder with random weights, and rows "which letter is doubled"."""
    files = Files(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")
    model = toy_model(jax.random.key(0), d_model=32, d_ff=48, initializer_range=0.3)
    jp.save_model(str(files.model), model)
    draw = random.Random(0)
    write_rows(files.train, [make_row(draw) for _ in range(120)])
    write_rows(files.eval, [make_row(draw, "uvwxyz") for _ in range(10)])
    return files


def make_row(draw: random.Random, letters: str = "abcdefgh") -> dict[str, str]:
    word = draw.sample(letters, 3)
    double = draw.choice(word)
    word.insert(word.index(double), double)
    return {"prompt": "".join(word) + "=", "completion": double}


def write_rows(path: pathlib.Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(files: Files, output: pathlib.Path, **changes) -> dict:
    """A config as nested dicts; `changes` replace keys of sections, or named sections."""
    config = {
        "model": {"path": str(files.model)},
        "method": {"name": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(files.train), "eval": str(files.eval), "max_length": 32},
        "optim": {"learning_rate": 0.01},
        "train": {"steps": STEPS, "batch_size": 8},
        "evaluation": {"every": 6},
        "checkpoint": {"every": 3},
        "output_dir": str(output),
    }
    for section, values in changes.items():
        if isinstance(values, dict) and "name" not in values:
            values = {**config.get(section, {}), **values}
        config[section] = values
    return config


def write_config(files: Files, output: pathlib.Path, **changes) -> str:
    """Writes such a config beside the run's folder; its path."""
    path = output.with_name(output.name + ".yaml")
    path.write_text(yaml.safe_dump(settings(files, output, **changes)))
    return str(path)


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(output: pathlib.Path) -> list[dict]:
    return [line for line in read_lines(output / "metrics.jsonl") if "loss" in line]


def evaluation_lines(output: pathlib.Path) -> list[dict]:
    return [line for line in read_lines(output / "metrics.jsonl") if "eval_loss" in line]
