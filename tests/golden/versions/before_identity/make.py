"""Wrote this folder, with the code of commit 6496e74: ``PYTHONPATH=.:tests python make.py FOLDER``.

A finished run's adapter, and the same run stopped after its second step.
"""

import os
import pathlib
import random
import shutil
import signal
import sys

import jax
import yaml
from tiny_run import make_row, write_rows
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft import manifest
from jaxpeft import train as program
from jaxpeft.errors import InterruptedRunError
from jaxpeft.run import Run

CONFIG = {
    "model": {"path": "model"},
    "method": {"name": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj"]},
    "data": {"train": "train.jsonl", "max_length": 32, "packing": False},
    "optim": {"learning_rate": 0.01, "schedule": "linear"},
    "train": {"epochs": 1.1, "batch_size": 4},
    "checkpoint": {"keep": 1},
    "output_dir": "run",
}


def forget_where(step: pathlib.Path) -> None:
    """Takes the folder that the checkpoint was made in out of Orbax's markers."""
    fields = manifest.read(step)
    (step / manifest.NAME).unlink()
    for marker in step.rglob("commit_success.txt"):
        marker.write_text("Checkpoint commit was successful")
    kept = {name: value for name, value in fields.items() if name not in ("files", "format")}
    manifest.write(step, kept)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    model = toy_model(jax.random.key(0), d_model=16, d_ff=16, initializer_range=0.3)
    jp.save_model("model", model)
    draw = random.Random(0)
    write_rows(pathlib.Path("train.jsonl"), [make_row(draw) for _ in range(16)])
    pathlib.Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
    program.main(["run.yaml"])
    shutil.move("run/adapter", "adapter")
    shutil.rmtree("run")

    def putting(run, batch, original=Run.put):
        if hasattr(run, "state") and int(run.state.step) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    Run.put = putting
    try:
        program.main(["run.yaml"])
    except InterruptedRunError as error:
        print(error)
    os.remove("run/.lock")
    os.remove("run/samples.jsonl")
    forget_where(pathlib.Path("run/checkpoints/2"))
