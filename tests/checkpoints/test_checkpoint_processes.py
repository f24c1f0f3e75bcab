"""Two processes save, choose and restore one checkpoint together."""

import json
import os
import socket
import subprocess
import sys

import pytest
from places import ROOT

CHILD = """
import errno, json, os, shutil, sys, types
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxpeft.checkpoints import manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.checkpoints.folder import CheckpointFolder
from jaxpeft.core.errors import CheckpointError, ResourceError

folder, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))

def state(value):
    def make():
        return {"w": jnp.arange(32.0).reshape(8, 4) * value, "key": jax.random.key(value)}
    return jax.jit(make, out_shardings={"w": split, "key": whole})()

def empty(step):
    multihost_utils.sync_global_devices(f"before {step}")
    if index == 0:
        open(f"{folder}/{step}/manifest.json", "w").close()
    multihost_utils.sync_global_devices(f"after {step}")

report, warnings = [], []
with Checkpoints(folder, warn=warnings.append) as opened:
    report.append(opened.latest())
    for step in (1, 2, 3, 3):
        opened.save(step, state(step), meta={})
    report.append(opened.latest())
    restored = opened.restore(3, like=state(0))
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    report.append(all(map(bool, jax.tree.leaves(same(restored, state(3))))))
    report.append(restored["w"].sharding == split)
empty(3)
with Checkpoints(folder, warn=warnings.append) as opened:
    report.append(opened.latest())
empty(2)
with Checkpoints(folder) as opened:
    try:
        opened.latest()
    except CheckpointError:
        report.append("none is usable")

def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

write = manifest.write
with Checkpoints(folder + "-full") as opened:
    manifest.write = full  # which only the first process calls
    opened.save(1, state(1), meta={})
    try:
        opened.wait()
    except ResourceError as error:
        report.append("no room" in str(error))
    manifest.write = write
    opened.save(2, state(2), meta={})
    report.append(opened.latest())

said = []

def fails_alone(place, name, failing, number):
    # A save cannot begin in one of the processes: all raise the same, and can save then.
    kept = getattr(place, name)
    with Checkpoints(f"{folder}-alone-{number}") as opened:
        for step in (1, 2):  # the second time Orbax is there already
            if index == number:
                setattr(place, name, failing)
            try:
                opened.save(step, state(step), meta={})
            except ResourceError as error:
                said.append(str(error))
            setattr(place, name, kept)
            opened.save(step, state(step), meta={})
        report.append(opened.latest())

fails_alone(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0), 1)
fails_alone(CheckpointFolder, "clean", full, 0)  # which is called the first time only
print("report", json.dumps([report, len(warnings), said]))
"""


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_two_processes_agree_on_what_was_saved_and_what_is_damaged(tmp_path, address):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path / "checkpoints", address, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for index, child in enumerate(children):
        out, err = child.communicate(timeout=120)
        lines = [line for line in out.splitlines() if line.startswith("report ")]
        assert lines, err[-2000:]
        report, warnings, said = json.loads(lines[0].removeprefix("report "))
        # None before the first save; the damaged step 3 is named by the first process only.
        assert report == [None, 3, True, True, 2, "none is usable", True, 2, 2, 2]
        assert warnings == (1 if index == 0 else 0)
        failed = [(text.partition(":")[0][len(str(tmp_path)) :], text[-19:]) for text in said]
        assert failed == [
            ("/checkpoints-alone-1/1", "(in process 1 of 2)"),
            ("/checkpoints-alone-1/2", "(in process 1 of 2)"),
            ("/checkpoints-alone-0/1", "(in process 0 of 2)"),
        ]
        assert all("no room" in text for text in said)
