"""Checkpoints come back bit for bit, or not at all."""

import contextlib
import json
import os
import resource
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

from jaxpeft import checkpoint_folder, manifest
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.errors import CheckpointError, ResourceError, UserError

ROOT = Path(__file__).parents[1]


def small_state(value: float = 1.0) -> dict:
    return {
        "adapter": {
            "q_proj": {"a": jnp.full((2, 3, 4), value, "float32"), "b": jnp.zeros((2, 4, 3))}
        },
        "optimizer": {"0": {"count": jnp.int32(7), "mu": jnp.full((5,), -value, "float32")}},
        "step": jnp.int32(7),
        "key": jax.random.key(3),
    }


def bits(tree) -> list:
    """Every leaf as dtype, shape and bytes."""
    found = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append(str(leaf.dtype))
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        found.append((str(leaf.dtype), leaf.shape, leaf.tobytes()))
    return found


def save_and_wait(opened, step) -> None:
    opened.save(step, small_state(step), meta={})
    opened.wait()


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings):
    with Checkpoints(tmp_path / "checkpoints", warn=warnings.append) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 10 and 20; copy it, don't change it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(folder) as opened:
        for step in (10, 20):
            opened.save(step, small_state(step), meta={"seed": 5})
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "copied"))


def test_every_kind_of_leaf_comes_back_bit_for_bit(checkpoints):
    odd = np.array([np.nan, -0.0, 1e-45, np.inf, 3.5], np.float32)
    odd.view(np.uint32)[0] |= 123  # a NaN with a payload
    state = {
        "f32": jnp.asarray(odd),
        "bf16": jnp.asarray(odd, jnp.bfloat16),
        "f8": jnp.ones((2,), jnp.float8_e4m3fn),
        "bool": jnp.array([True, False]),
        "uint8": jnp.arange(255, dtype=jnp.uint8),
        "scalar": jnp.float32(0.1),
        "numpy64": np.arange(3, dtype=np.int64) + 2**40,
        "numpy_scalar": np.float32(0.3),
        "number": 12,
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2), 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "list": [jnp.zeros(1), None, {}, (jnp.ones(2),)],
    }
    checkpoints.save(1, state, meta={})
    restored = checkpoints.restore(1, like=state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(
        jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), state)
    )


def test_keys_that_orbax_confuses_stay_apart(checkpoints):
    state = {
        "a.b": jnp.full(2, 1.0),
        "a": {"b": jnp.full(2, 2.0), "b/c": jnp.full(2, 3.0), "%2F": jnp.full(2, 4.0)},
        "a%2Eb": jnp.full(2, 5.0),
    }
    checkpoints.save(1, state, meta={})
    assert bits(checkpoints.restore(1, like=state)) == bits(state)


def test_restored_arrays_follow_the_placement_of_like(checkpoints):
    state = small_state()
    checkpoints.save(1, state, meta={})
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = checkpoints.restore(1, like=jax.device_put(state, sharding))
    assert {leaf.sharding for leaf in jax.tree.leaves(placed["adapter"])} == {sharding}
    free = checkpoints.restore(1, like=jax.eval_shape(small_state))
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))
    assert bits(placed) == bits(free) == bits(state)


def test_arrays_may_be_donated_as_soon_as_save_returns(checkpoints):
    def ramp():
        return {str(i): jnp.arange(200_000, dtype=jnp.float32) + i for i in range(20)}

    state = ramp()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints.save(1, state, meta={})
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    assert bits(checkpoints.restore(1, like=state)) == bits(ramp())


def test_numpy_arrays_may_be_changed_as_soon_as_save_returns(checkpoints):
    state = {"x": np.ones(300_000)}
    checkpoints.save(1, state, meta={})
    state["x"][:] = 2.0
    assert (checkpoints.restore(1, like=state)["x"] == 1.0).all()


@pytest.mark.parametrize(("count", "shape"), [(400, (16, 8)), (400, (64, 8)), (14, (30, 64, 16))])
def test_checkpoint_takes_little_more_than_its_arrays(checkpoints, tmp_path, count, shape):
    rng = np.random.default_rng(0)

    def tree():
        return {
            f"layer_{i}": {"a": jnp.asarray(rng.normal(size=shape), "float32")}
            for i in range(count)
        }

    state = {"adapter": tree(), "optimizer": {"0": {"mu": tree(), "nu": tree()}}}
    checkpoints.save(1, state, meta={"config": {"rank": 8}})
    checkpoints.wait()
    arrays = 3 * count * int(np.prod(shape)) * 4
    assert bytes_on_disk(tmp_path / "checkpoints") <= 1.2 * arrays + 1e6


def test_meta_comes_back_with_the_versions_that_wrote_it(checkpoints):
    meta = {"config": {"rank": 8, "lr": 1e-4}, "data": "ü", "n": {1: [None, True]}}
    checkpoints.save(1, small_state(), meta=meta)
    checkpoints.wait()
    found = checkpoints.meta(1)
    environment = found.pop("environment")
    assert found == json.loads(json.dumps(meta))
    assert environment["versions"]["jax"] == jax.__version__
    assert set(environment["versions"]) == {"jaxpeft", "jax", "jaxlib", "flax", "orbax-checkpoint"}


def test_newest_few_and_the_best_are_kept(checkpoints):
    for step, metric in [(1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, 1.5)]:
        checkpoints.save(step, small_state(step), meta={}, metric=metric)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    assert checkpoints.restore(2, small_state())["adapter"]["q_proj"]["a"][0, 0, 0] == 2


def test_a_step_exists_only_once_its_manifest_is_written(checkpoints, monkeypatch):
    checkpoints.save(1, small_state(), meta={})
    checkpoints.wait()
    seen = []
    write = manifest.write

    def watched(folder, fields):
        seen.append(checkpoints.steps())
        write(folder, fields)

    monkeypatch.setattr(manifest, "write", watched)
    checkpoints._keep = 1
    checkpoints.save(2, small_state(), meta={})
    checkpoints.wait()
    assert seen == [[1]]
    assert checkpoints.steps() == [2]


def test_saving_the_same_step_again_changes_nothing(copied):
    with Checkpoints(copied) as opened:
        before = contents(copied)
        opened.save(20, small_state(99), meta={})
    assert contents(copied) == before


def test_saving_an_older_step_is_refused(copied):
    with Checkpoints(copied) as opened, pytest.raises(CheckpointError, match="step 20 is newer"):
        opened.save(15, small_state(), meta={})


def test_an_empty_or_missing_folder_has_no_steps_and_stays_as_it_is(tmp_path):
    opened = Checkpoints(tmp_path / "none")
    assert (opened.steps(), opened.latest(), opened.best()) == ([], None, None)
    assert not (tmp_path / "none").exists()


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "bit flipped at the start": lambda path: flip(path, 0.0),
    "bit flipped inside": lambda path: flip(path, 0.37),
    "bit flipped near the end": lambda path: flip(path, 0.9),
    "bit flipped at the end": lambda path: flip(path, 1.0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zero length": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_is_noticed(two_steps, tmp_path, damage):
    names = [
        path.relative_to(two_steps) for path in (two_steps / "20").rglob("*") if path.is_file()
    ]
    assert len(names) >= 6
    for number, name in enumerate(names):
        folder = Path(shutil.copytree(two_steps / "20", tmp_path / str(number)))
        damage(folder / name.relative_to("20"))
        with pytest.raises(manifest.DamageError, match=name.name):
            manifest.verify(folder)


def test_a_damaged_newest_step_is_named_set_aside_and_the_one_before_used(copied, warnings):
    flip(next((copied / "20/state/ocdbt.process_0/d").iterdir()), 0.5)
    damaged = contents(copied / "20")
    opened = Checkpoints(copied, warn=warnings.append)
    assert opened.latest() == 10
    assert len(warnings) == 1
    assert "20: damaged: state/ocdbt.process_0/d/" in warnings[0]
    assert "step 10 is used" in warnings[0]
    assert contents(copied / "damaged/20") == damaged
    assert opened.steps() == [10]
    assert bits(opened.restore(10, small_state())) == bits(small_state(10))


def test_a_step_can_be_saved_again_after_its_damaged_copy_was_set_aside(copied, warnings):
    with Checkpoints(copied, warn=warnings.append) as opened:
        for _ in range(2):
            (copied / "20/manifest.json").write_bytes(b"")
            assert opened.latest() == 10
            opened.save(20, small_state(20), meta={})
            opened.wait()
    assert sorted(os.listdir(copied / "damaged")) == ["20", "20-2"]
    assert bits(Checkpoints(copied).restore(20, small_state())) == bits(small_state(20))


def test_all_steps_damaged_is_an_error_that_moves_nothing(copied, warnings):
    for step in (10, 20):
        flip(copied / str(step) / "manifest.json", 0.5)
    before = contents(copied)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no usable checkpoint.*--overwrite") as caught:
            Checkpoints(copied, warn=warnings.append).latest()
    assert caught.value.exit_code == 4
    assert contents(copied) == before
    assert warnings == []


def test_restore_of_a_damaged_step_is_refused(copied):
    (copied / "20/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(CheckpointError, match="_CHECKPOINT_METADATA: is missing"):
        Checkpoints(copied).restore(20, small_state())


def test_restore_of_an_unknown_step_lists_the_known_ones(copied):
    with pytest.raises(CheckpointError, match="has no step 30; steps: 20, 10"):
        Checkpoints(copied).restore(30, small_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": jnp.float32(0)}, r"step is int32\[\] in the checkpoint, float32\[\] in this run"),
        ({"adapter": {}}, r"adapter/q_proj/a is in the checkpoint but not in this run"),
        ({"more": jnp.zeros(1)}, r"more is not in the checkpoint"),
        (
            {"optimizer": {"0": {"count": jnp.int32(0), "mu": jnp.zeros(6)}}},
            r"optimizer/0/mu is float32\[5\] in the checkpoint, float32\[6\] in this run",
        ),
        ({"key": jax.random.key_data(jax.random.key(0))}, r"key is key<fry>\[\] .* uint32\[2\]"),
    ],
)
def test_another_structure_shape_or_dtype_is_refused_by_name(two_steps, change, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(two_steps).restore(20, {**small_state(), **change})


def test_bad_states_and_metas_are_refused_before_anything_is_written(checkpoints, tmp_path):
    with pytest.raises(TypeError, match="'name' holds <U5"):
        checkpoints.save(1, {"name": "hello"}, meta={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, small_state(), meta={"x": object()})
    assert not (tmp_path / "checkpoints").exists()


def test_bad_arguments_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match="not a URL"):
        Checkpoints("gs://bucket/run")
    with pytest.raises(UserError, match=r"checkpoint\.keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


@contextlib.contextmanager
def files_no_larger_than(limit: int):
    """What a full disk looks like to a writer, without filling one."""
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))


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
    assert warnings == [f"{copied}/30: has no manifest (killed?); set aside in {copied}/damaged/30"]
    assert bits(Checkpoints(copied).restore(30, small_state())) == bits(small_state(30))


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


def test_a_state_spread_over_devices_comes_back_spread_otherwise(checkpoints):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spread(*spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.device_put({"w": jnp.arange(64.0).reshape(8, 8)}, sharding)

    checkpoints.save(1, spread("x", "y"), meta={})
    for like in (spread("y"), spread(None, ("x", "y")), spread()):
        restored = checkpoints.restore(1, like=like)
        assert restored["w"].sharding == like["w"].sharding
        assert bits(restored) == bits(like)


# A child saves steps 1 and 2, then 3, and is killed in the middle of it by its own hook.
CHILD = """
import os, signal, sys
import jax, jax.numpy as jnp
from jaxpeft import checkpoint_folder, manifest
from jaxpeft.checkpoint import Checkpoints

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
    "right after": "checkpoint_folder.CheckpointFolder.prune = die",
    "while an old step is deleted": "checkpoint_folder.shutil.rmtree = die",
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
        assert set(os.listdir(killed[moment])) <= {str(latest), str(latest + 1), "damaged"}


def killed_state(step):
    return {"x": jax.random.normal(jax.random.key(step), (300, 1000)), "step": jnp.int32(step)}
