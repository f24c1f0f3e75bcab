"""Checkpoints come back bit for bit, or not at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import bits, bytes_on_disk, contents, small_state

from jaxpeft.checkpoints import manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core.errors import CheckpointError


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


def test_metrics_of_other_data_are_not_compared_and_older_ones_without_are(tmp_path):
    def save(scored_on, step, metric):
        with Checkpoints(tmp_path / "checkpoints", keep=9, scored_on=scored_on) as opened:
            opened.save(step, small_state(step), meta={}, metric=metric)
            opened.wait()
            return opened.best(), opened.notes_on_scores()

    assert save("", 1, 0.5) == (1, [])  # as versions before wrote it
    best, (unknown,) = save("a", 2, 0.7)
    assert best == 1
    assert unknown.startswith("what the scores of steps 1 were measured on is not known")
    best, (changed, again) = save("b", 3, 0.6)
    assert (best, again) == (1, unknown)
    assert changed.startswith("what scores are measured on changed: those of steps 2 decide")
    assert save("b", 4, 0.4)[0] == 4
    assert save("a", 5, 0.45)[0] == 5
    assert save("", 6, 0.9)[0] == 1
