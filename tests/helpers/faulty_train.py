"""The training command with a signal to itself at a named moment, for tests.

Usage: python faulty_train.py MOMENT SIGNAL [CONFIG ...]

Moments: load, compile, export, evaluate:STEP, step:STEP (before it), save:STEP (just begun); or
slow:SECONDS, which sends nothing and makes every step take so long.

With COMMIT=SECONDS in the environment every manifest takes that much longer to write.

With STATES=FOLDER in the environment every state that is saved or restored is written there,
gathered from all devices and processes: FOLDER/saved-STEP.npz, FOLDER/restored-STEP.npz.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from jaxpeft import train
from jaxpeft.checkpoints import manifest
from jaxpeft.cli import exits
from jaxpeft.mesh import processes
from jaxpeft.training.run import Run, leaves

MOMENT, SIGNAL = sys.argv[1:3]


def reach(moment: str) -> None:
    """Sends the signal if this is the moment, and gives its handler time to run."""
    if moment == MOMENT:
        os.kill(os.getpid(), getattr(signal, SIGNAL))
        time.sleep(0.5)


def before(owner, name, moment) -> None:
    """Lets a function reach a moment when it begins."""
    function = getattr(owner, name)

    def reaching(*args, **options):
        reach(moment(*args))
        return function(*args, **options)

    setattr(owner, name, reaching)


def put(run, batch, original=Run.put):
    if not hasattr(run, "state"):  # it begins with a look at the rows
        return original(run, batch)
    reach(f"step:{int(run.state.step) + 1}")
    if MOMENT.startswith("slow:"):
        time.sleep(float(MOMENT.removeprefix("slow:")))
    return original(run, batch)


def save(run, *args, original=Run.save):
    write_state(run, "saved")
    original(run, *args)
    reach(f"save:{int(run.state.step)}")


def restore(run, *args, original=Run.restore):
    original(run, *args)
    write_state(run, "restored")


def write_state(run, what) -> None:
    """Writes a state, if somebody wants to see it."""
    if "STATES" not in os.environ:
        return
    state = run.state.replace(key=jax.random.key_data(run.state.key))
    arrays = {name: processes.to_host(leaf) for name, leaf in leaves(state).items()}
    if processes.is_first():
        np.savez(pathlib.Path(os.environ["STATES"], f"{what}-{int(run.state.step)}.npz"), **arrays)


def write_manifest(*args, original=manifest.write):
    time.sleep(float(os.environ.get("COMMIT", "0")))
    original(*args)


def compile_step(run, call, original=Run.compile_step):
    def interrupted(compile_):
        reach("compile")
        return compile_()

    return original(run, lambda compile_: call(lambda: interrupted(compile_)))


if __name__ == "__main__":
    before(train, "load_model", lambda *_: "load")
    before(Run, "evaluate", lambda run: f"evaluate:{int(run.state.step)}")
    before(Run, "export", lambda *_: "export")
    manifest.write = write_manifest
    Run.put, Run.save, Run.restore, Run.compile_step = put, save, restore, compile_step
    sys.argv[1:] = sys.argv[3:]
    exits.run(train.main)
