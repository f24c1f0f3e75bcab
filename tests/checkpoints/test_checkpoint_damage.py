"""Checkpoints that are damaged, of another form, or asked for wrongly."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import bits, contents, small_state

from jaxpeft.checkpoints import manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core.errors import CheckpointError, UserError


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


def test_a_damaged_newest_step_is_named_the_one_before_used_and_the_next_save_sets_it_aside(
    copied, warnings
):
    flip(next((copied / "20/state/ocdbt.process_0/d").iterdir()), 0.5)
    damaged, before = contents(copied / "20"), contents(copied)
    with Checkpoints(copied, warn=warnings.append) as opened:
        for _ in range(2):
            assert opened.latest() == 10
            assert contents(copied) == before
        assert len(warnings) == 1
        assert "20: damaged: state/ocdbt.process_0/d/" in warnings[0]
        assert "step 10 is used" in warnings[0]
        opened.save(15, small_state(15), meta={})
    assert warnings[1:] == [f"{copied}/20: set aside in {copied}/damaged/20"]
    assert contents(copied / "damaged/20") == damaged
    assert opened.steps() == [10, 15]
    assert bits(opened.restore(10, small_state())) == bits(small_state(10))


def test_a_damaged_step_that_was_saved_anew_meanwhile_stays(copied, warnings):
    whole = (copied / "20/manifest.json").read_bytes()
    (copied / "20/manifest.json").write_bytes(b"")
    with Checkpoints(copied, warn=warnings.append) as opened:
        assert opened.latest() == 10
        (copied / "20/manifest.json").write_bytes(whole)
        with pytest.raises(CheckpointError, match="step 20 is newer than step 15"):
            opened.save(15, small_state(15), meta={})
    assert opened.steps() == [10, 20]


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
    with pytest.raises(UserError, match=r"of object stores only gs:// is supported"):
        Checkpoints("s3://bucket/run")
    with pytest.raises(UserError, match=r"checkpoint\.keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
