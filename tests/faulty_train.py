"""The training command with a signal to itself at a named moment, for tests.

Usage: python faulty_train.py MOMENT SIGNAL [CONFIG ...]

Moments: load, compile, export, evaluate:STEP, step:STEP (before it), save:STEP (just begun); or
slow:SECONDS, which sends nothing and makes every step take so long.
"""

import os
import signal
import sys
import time

from jaxpeft import cli, train
from jaxpeft.run import Run

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
    reach(f"step:{int(run.state.step) + 1}")
    if MOMENT.startswith("slow:"):
        time.sleep(float(MOMENT.removeprefix("slow:")))
    return original(run, batch)


def save(run, *args, original=Run.save):
    original(run, *args)
    reach(f"save:{int(run.state.step)}")


def compile_step(run, call, original=Run.compile_step):
    def interrupted(compile_):
        reach("compile")
        return compile_()

    return original(run, lambda compile_: call(lambda: interrupted(compile_)))


if __name__ == "__main__":
    before(train, "load_model", lambda *_: "load")
    before(Run, "evaluate", lambda run: f"evaluate:{int(run.state.step)}")
    before(Run, "export", lambda *_: "export")
    Run.put, Run.save, Run.compile_step = put, save, compile_step
    sys.argv[1:] = sys.argv[3:]
    cli.run(train.main)
