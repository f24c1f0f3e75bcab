"""What tests of the training program do with runs and read of them."""

import os
import pathlib
import signal

import numpy as np
import yaml
from tiny_run import (
    training_lines,
    write_config,
)

from jaxpeft import train as program
from jaxpeft.training.run import Run

NO_EVAL = {"data": {"eval": None}, "evaluation": None}


def output_of(config: str) -> pathlib.Path:
    return pathlib.Path(yaml.safe_load(pathlib.Path(config).read_text())["output_dir"])


def adapter_bytes(output: pathlib.Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_of(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines]


def losses(files, output, **changes) -> list[float]:
    """The loss of every step of a run without evaluations."""
    program.main([write_config(files, output, **{**NO_EVAL, "checkpoint": None, **changes})])
    return curve(output)


def curve(output) -> list[float]:
    return [line["loss"] for line in training_lines(output)]


def poison(monkeypatch, steps) -> None:
    """Lets the batches of some steps weigh infinitely much."""
    iterate = program.iterate

    def poisoned(plan, first, last, **options):
        for step, batch in enumerate(iterate(plan, first, last, **options), first + 1):
            if step in steps:
                batch = {**batch, "weights": np.where(batch["weights"] > 0, np.inf, 0).astype("f")}
            yield batch

    monkeypatch.setattr(program, "iterate", poisoned)


def record_runs(monkeypatch) -> list[Run]:
    """Lets the program tell which runs it makes."""
    runs = []

    class Recorded(Run):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            runs.append(self)

    monkeypatch.setattr(program, "Run", Recorded)
    return runs


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal while it prepares a step, once."""
    put, left = Run.put, [True]

    def putting(run, batch):
        if left and int(run.state.step) + 1 == step:
            left.clear()
            os.kill(os.getpid(), number)
        return put(run, batch)

    monkeypatch.setattr(Run, "put", putting)
