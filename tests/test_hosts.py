"""One run in several processes: the whole command, in processes of two CPU devices each."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import make_files, training_lines, write_config

HERE = pathlib.Path(__file__).parent
COMMAND = [sys.executable, str(HERE / "faulty_train.py")]
SETTINGS = {
    "method": {"dropout": 0.1},
    "data": {"eval": None},
    "evaluation": None,
    "train": {"steps": 10},
    "checkpoint": {"every": 4},
}
LOST = "error: another process of this run ended or cannot be reached"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def start(config, flags=(), fault=("-", "-"), devices=2, states=None, **environment):
    """Starts one process."""
    hidden = ("PYTEST_VERSION", "PYTEST_CURRENT_TEST", "JAXPEFT_REEXECUTED", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if states is not None:
        env["STATES"] = str(states)
    return subprocess.Popen(
        [*COMMAND, *fault, *([config] if isinstance(config, str) else config), *flags],
        cwd=HERE.parent,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def flags_of(index, address, count=2):
    values = {"coordinator": address, "num_processes": count, "process_id": index, "heartbeat": 10}
    return [f"--distributed.{name}={value}" for name, value in values.items()]


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_two(config, faults=((), ()), **options):
    address = free_address()
    return [
        start(config, flags_of(index, address), faults[index] or ("-", "-"), **options)
        for index in range(2)
    ]


def ends(processes, seconds=120) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of processes."""
    return [(p.returncode, *said) for p in processes for said in [p.communicate(timeout=seconds)]]


def run_two(config, faults=((), ()), **options):
    return ends(start_two(config, faults, **options))
