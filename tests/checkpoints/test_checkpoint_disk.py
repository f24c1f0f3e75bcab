"""Full disks, read-only folders and processes killed while they save."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import bits, contents, save_and_wait, small_state
from full_disk import files_no_larger_than
from places import ROOT

from jaxpeft.checkpoints import folder as checkpoint_folder
from jaxpeft.checkpoints import manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core.errors import ResourceError
from jaxpeft.files import patience


def test_a_disk_that_fills_up_costs_only_the_new_step(checkpoints, tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    big = {"x": np.random.default_rng(0).normal(size=(400_000,))}
    checkpoints.save(1, big, meta={})
    checkpoints.wait()
    before = contents(folder)
    with files_no_larger_than(1_000_000):
        checkpoints.save(2, big, meta={})
        with pytest.raises(ResourceError, match=r"checkpoints/2: .*no room.*3,2\d\d,\d\d\d bytes"):
            checkpoints.wait()
    assert contents(folder) == before
    assert sorted(os.listdir(folder)) == ["1"]
    assert "Traceback" not in capfd.readouterr().err
    checkpoints.save(3, big, meta={})
    assert bits(checkpoints.restore(3, like=big)) == bits(big)


def test_a_manifest_that_cannot_be_written_costs_only_the_new_step(copied, monkeypatch):
    before = contents(copied)

    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(copied) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(manifest.os, "replace", full)
            opened.save(30, small_state(), meta={})
            with pytest.raises(ResourceError, match="no room"):
                opened.wait()
        assert contents(copied) == before
        assert sorted(os.listdir(copied)) == ["10", "20"]


def test_too_little_space_is_said_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="bytes needed, 1 free") as caught:
        checkpoints.save(1, small_state(), meta={})
    assert caught.value.exit_code == 5
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.fixture
def unprivileged():
    """Root writes everywhere: become someone else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_folder_that_became_read_only_costs_only_the_new_step(two_steps, request):
    folder = Path(tempfile.mkdtemp()) / "checkpoints"
    try:
        shutil.copytree(two_steps, folder)
        folder.parent.chmod(0o755)
        folder.chmod(0o555)
        request.getfixturevalue("unprivileged")
        opened = Checkpoints(folder)
        with pytest.raises(ResourceError, match="30: cannot be saved: not allowed"):
            save_and_wait(opened, 30)
        assert opened.steps() == [10, 20]
        assert opened.latest() == 20
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder.parent)


def test_leftovers_of_killed_saves_are_cleared_at_the_next_save_and_not_before(copied, warnings):
    (copied / "30.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (copied / "5.deleting/state").mkdir(parents=True)
    shutil.copytree(copied / "20", copied / "30", ignore=lambda *_: ["manifest.json"])
    (copied / "notes.txt").write_text("mine")
    listed = sorted(os.listdir(copied))
    with Checkpoints(copied, warn=warnings.append) as opened:
        assert opened.latest() == 20
        assert sorted(os.listdir(copied)) == listed
        opened.save(30, small_state(30), meta={})
    assert sorted(os.listdir(copied)) == ["20", "30", "damaged", "notes.txt"]
    assert warnings == [f"{copied}/30: has no manifest; set aside in {copied}/damaged/30"]
    assert bits(Checkpoints(copied).restore(30, small_state())) == bits(small_state(30))


def test_a_step_that_a_killed_save_left_without_a_manifest_is_removed_as_ours(copied, warnings):
    """Only a step whose save noted that it began; any other is somebody's and is kept."""
    for step in ("30", "40"):
        shutil.copytree(copied / "20", copied / step, ignore=lambda *_: ["manifest.json"])
    (copied / "30.unfinished").touch()
    (copied / "20.unfinished").touch()  # killed right after its manifest
    (copied / "50.unfinished").touch()  # killed before Orbax began
    with Checkpoints(copied, warn=warnings.append) as opened:
        assert opened.latest() == 20
        opened.save(60, small_state(60), meta={})
    assert sorted(os.listdir(copied)) == ["20", "60", "damaged"]
    assert os.listdir(copied / "damaged") == ["40"]
    assert warnings == [f"{copied}/40: has no manifest; set aside in {copied}/damaged/40"]


def test_tidying_removes_what_killed_saves_left_and_steps_beyond_those_to_keep(copied, warnings):
    (copied / "30.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (copied / "5.deleting/state").mkdir(parents=True)
    shutil.copytree(copied / "20", copied / "30", ignore=lambda *_: ["manifest.json"])
    (copied / "30.unfinished").touch()
    (copied / "notes.txt").write_text("mine")
    with Checkpoints(copied, keep=1, warn=warnings.append) as opened:
        assert opened.latest() == 20
        opened.tidy()
    assert sorted(os.listdir(copied)) == ["20", "notes.txt"]
    assert warnings == []


def test_tidying_removes_no_step_while_the_newest_is_damaged(copied, warnings):
    file = next(path for path in (copied / "20").rglob("*") if path.stat().st_size > 9)
    file.write_bytes(file.read_bytes()[:-1])
    with Checkpoints(copied, keep=1, warn=warnings.append) as opened:
        assert opened.latest() == 10
        opened.tidy()
    assert sorted(os.listdir(copied)) == ["10", "20"]


def test_an_old_step_that_cannot_be_deleted_is_only_a_warning(copied, warnings, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", fail)
    with Checkpoints(copied, warn=warnings.append) as opened:
        opened.save(30, small_state(), meta={})
        opened.wait()
        assert opened.steps() == [20, 30]
    assert "10: old step cannot be deleted" in warnings[0]


def test_an_error_inside_the_block_still_ends_the_save_under_way(tmp_path):
    def fail_while_saving():
        with Checkpoints(tmp_path) as opened:
            opened.save(1, small_state(), meta={})
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_saving()
    assert Checkpoints(tmp_path).latest() == 1


# A child saves steps 1 and 2, then 3, and is killed in the middle of it by its own hook.
CHILD = """
import os, signal, sys
import jax, jax.numpy as jnp
from jaxpeft.checkpoints import folder, manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.files import patience

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def state(step):
    return {"x": jax.random.normal(jax.random.key(step), (300, 1000)), "step": jnp.int32(step)}

opened = Checkpoints(sys.argv[1], keep=2)
for step in (1, 2):
    opened.save(step, state(step), meta={})
opened.wait()
HOOK
opened.save(3, state(3), meta={})
opened.close()
sys.exit("was not killed")
"""
KILLS = {
    "as Orbax begins to write": "Checkpoints._finish = die",
    "while Orbax writes": (
        "import threading, time\n"
        "def watch():\n"
        "    while not any('tmp' in name for name in os.listdir(sys.argv[1])): time.sleep(0.0005)\n"
        "    time.sleep(0.004); die()\n"
        "threading.Thread(target=watch, daemon=True).start()"
    ),
    "after Orbax is done": "manifest._sync_and_hash = die",
    "before the manifest has its name": "manifest.os.replace = die",
    "right after": "folder.CheckpointFolder.prune = die",
    "while an old step is deleted": "folder.shutil.rmtree = die",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders of all killed children, which run two at a time."""
    root = tmp_path_factory.mktemp("killed")

    def run(name):
        folder = root / name
        code = CHILD.replace("HOOK", KILLS[name])
        done = subprocess.run(
            [sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        return folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KILLS, pool.map(run, KILLS), strict=True))


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_while_saving_goes_on_from_the_newest_whole_step(killed, warnings, moment):
    expected = {
        "while Orbax writes": (2, 3),  # a slow machine may notice late
        "right after": (3,),
        "while an old step is deleted": (3,),
    }
    with Checkpoints(killed[moment], warn=warnings.append) as opened:
        latest = opened.latest()
        assert latest in expected.get(moment, (2,))
        restored = opened.restore(latest, like=killed_state(0))
        assert bits(restored) == bits(killed_state(latest))
        opened.save(latest + 1, killed_state(latest + 1), meta={})
        opened.wait()
        assert opened.steps() == [latest, latest + 1]
        assert set(os.listdir(killed[moment])) == {str(latest), str(latest + 1)}


def killed_state(step):
    return {"x": jax.random.normal(jax.random.key(step), (300, 1000)), "step": jnp.int32(step)}


@pytest.mark.parametrize(("processes", "tries"), [(1, 1 + len(patience.DELAYS)), (2, 1)])
def test_a_save_that_fails_in_one_of_several_processes_is_not_tried_again(
    checkpoints, monkeypatch, processes, tries
):
    """It alone would ask the others for the next step's agreement, which go on training."""
    begun = []

    class Full:
        def save_async(self, *_, **__):
            begun.append(1)
            monkeypatch.setattr(jax, "process_count", lambda: processes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "_checkpointer", Full)
    alone = lambda _: monkeypatch.setattr(jax, "process_count", lambda: 1)  # noqa: E731
    monkeypatch.setattr(patience.time, "sleep", alone)
    with pytest.raises(ResourceError, match="no room") as caught:
        patience.persist(lambda: checkpoints.save(1, small_state(), meta={}), print)
    assert len(begun) == tries
    assert caught.value.alone == (processes > 1)
