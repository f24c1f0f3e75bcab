"""Only finite numbers are kept by a step, and only numbers that float32 holds by a config."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_decoder import make_adapter
from tiny_run import Files, settings

import jaxpeft as jp
from jaxpeft.config.schema import fields_of
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.registry import METHODS
from jaxpeft.updates.optimizers import OptimConfig, masked
from jaxpeft.updates.step import adapter_only, init_train_state, make_train_step

FEW = LoRA(rank=2, targets=("v_proj", "down_proj"))


def slope_of_one(params, adapter, batch, key):
    """A loss whose gradient is 1 everywhere, times the batch."""
    del params, key
    return batch * sum(leaf.sum() for leaf in jax.tree.leaves(adapter.params))


def steps(tx, count, batch=1.0):
    """The states and metrics of some steps, the first state in front."""
    tx = masked(tx, adapter_only)
    state = init_train_state({}, make_adapter(FEW), tx, jax.random.key(0))
    step, seen = make_train_step(slope_of_one, tx), [(jax.device_get(state.trained), {})]
    for _ in range(count):
        state, metrics = step(state, {}, jnp.float32(batch))
        seen.append((jax.device_get((state.trained, state.opt_state)), jax.device_get(metrics)))
    return seen


def numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def test_an_update_that_would_overflow_a_parameter_is_skipped():
    _, first, second, third = steps(optax.sgd(3e38), 3)
    assert np.isfinite(first[1]["loss"])
    assert np.isfinite(first[1]["grad_norm"])
    assert [int(seen[1]["skipped_in_a_row"]) for seen in (first, second, third)] == [0, 1, 2]
    np.testing.assert_array_equal(numbers(second[0]), numbers(first[0]))
    assert np.isfinite(numbers(third[0])).all()


def test_an_update_that_would_overflow_a_moment_alone_is_skipped():
    grows = optax.chain(optax.trace(1e13), optax.scale(-1e-38))  # 1, 1e13, 1e26, then 1e39
    seen = steps(grows, 4)
    assert [int(metrics["skipped"]) for _, metrics in seen[1:]] == [0, 0, 0, 1]
    np.testing.assert_array_equal(numbers(seen[4][0]), numbers(seen[3][0]))
    assert np.isfinite(numbers(seen[4][0])).all()


def test_an_optimizer_that_begins_with_infinity_trains():
    def update(updates, state, params=None, **extra):
        del params, extra
        return jax.tree.map(lambda g: -0.5 * g, updates), state

    best_so_far = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(jnp.inf), update)
    (before, _), (after, metrics) = steps(best_so_far, 1)
    assert int(metrics["skipped"]) == 0
    moved = numbers(after[0]) - numbers(before)
    np.testing.assert_allclose(moved, -0.5, rtol=1e-6)


def test_an_overflow_on_one_device_of_a_mesh_skips_the_update_on_all():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    tx = masked(optax.sgd(1.0), adapter_only)
    state = init_train_state({}, make_adapter(FEW), tx, jax.random.key(0))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, state)
    leaf = "layers/mlp/down_proj/kernel/a"
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    placed = paths.put(shardings.trained["adapter"], {leaf: split})
    shardings = shardings.replace(trained={**shardings.trained, "adapter": placed})
    state = jax.device_put(state, shardings)
    before = jax.device_get(state.trained)

    def loss(params, adapter, batch, key):
        del params, key
        return (paths.get(adapter.params, leaf)[0] * batch).sum()

    batch = np.zeros(paths.get(before["adapter"], leaf).shape[1:], np.float32)
    batch[-1, -1] = 3.2e38  # on the last device
    step = make_train_step(loss, tx, state_shardings=shardings)
    grown, metrics = step(state, {}, batch / 2)
    for _ in range(2):
        grown, metrics = step(grown, {}, batch / 2)
    assert int(metrics["skipped"]) == 3  # the norm overflows already
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(grown.trained), before)

    large = masked(optax.sgd(1e20), adapter_only)
    step = make_train_step(loss, large, state_shardings=shardings)
    grown, metrics = step(grown, {}, batch * 1e-20)
    assert int(metrics["skipped"]) == 3
    grown, metrics = step(grown, {}, batch * 1e-20)
    assert int(metrics["skipped"]) == 4
    assert np.isfinite(metrics["grad_norm"])
    assert np.isfinite(numbers(jax.device_get(grown.trained))).all()


def float_fields():
    """All fields of methods and the optimizer that hold floats, by class."""
    for cls in (*METHODS.values(), OptimConfig):
        for field, hint in fields_of(cls):
            if "float" in str(hint):
                yield pytest.param(
                    cls, field.name, "Mapping" in str(hint), id=f"{cls.__name__}.{field.name}"
                )


FIELDS = list(float_fields())


def test_the_table_has_the_fields():
    found = {parameter.id for parameter in FIELDS}
    assert {"LoRA.alpha", "LoRA.alpha_pattern", "OptimConfig.b2", "VeRA.d_initial"} <= found
    assert len(found) >= 17


@pytest.mark.parametrize("value", [1e39, 3.5e38, 1e-46, 1e-39, pytest.param(10**400, id="10**400")])
@pytest.mark.parametrize(("cls", "field", "mapping"), FIELDS)
def test_a_number_that_float32_does_not_hold_is_refused_by_name(cls, field, mapping, value):
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(value) if value < 1e300 else np.float32(np.inf)
    assert not np.isfinite(held) or held < np.finfo(np.float32).smallest_normal
    with pytest.raises(ValueError, match=rf"\b{field}\b") as error:
        cls(**{field: {"q_proj": value} if mapping else value})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("cls", "field"),
    [(OptimConfig, "b1"), (OptimConfig, "b2"), (LoRA, "dropout")]
    + [(METHODS["adalora"], name) for name in ("dropout", "beta1", "beta2")]
    + [(METHODS["vera"], "dropout")],
)
def test_a_share_that_float32_makes_one_is_refused(cls, field):
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    assert getattr(cls(**{field: largest}), field) == largest
    share = 1 - 1e-9
    assert np.float32(share) == 1
    with pytest.raises(ValueError, match=f"{field} must be below 1 in float32"):
        cls(**{field: share})


PRODUCTS = {
    "lora_plus": lambda: OptimConfig(learning_rate=1e38, lora_plus_ratio=16),
    "decay": lambda: OptimConfig(learning_rate=1e30, weight_decay=1e10),
    "lycoris": lambda: METHODS["loha"](alpha=2e-38, rank=8),
    "adalora": lambda: METHODS["adalora"](alpha=2e-38, rank=8),
    "lora": lambda: jp.init_adapter(
        LoRA(rank=4, alpha=2e-38, targets=("q_proj",)), _base(), jax.random.key(0)
    ),
    "patterns": lambda: jp.init_adapter(
        LoRA(rank=4, targets=("q_proj",), alpha_pattern={"q_proj": 2e-38}),
        _base(),
        jax.random.key(0),
    ),
}


def _base():
    return {"layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((2, 8, 8))}}}}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_quotients_of_numbers_are_looked_at_too(name):
    with pytest.raises(ValueError, match="float32 makes it"):
        PRODUCTS[name]()


def test_the_largest_numbers_are_taken():
    assert OptimConfig(learning_rate=3.4e38).learning_rate == 3.4e38
    assert OptimConfig(weight_decay=0.0, learning_rate=1.2e-38).weight_decay == 0.0
    assert LoRA(alpha=1e-37, rank=1).alpha == 1e-37


def test_a_config_file_says_it_in_one_line_with_its_place(tmp_path):
    files = Files(*(tmp_path / name for name in ("model", "train.jsonl", "eval.jsonl")))
    draft = settings(files, tmp_path / "run", optim={"learning_rate": 1e39})
    draft["method"]["alpha"] = 1e-46
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(draft))
    with pytest.raises(UserError) as error:
        jp.load_config(str(path))
    lines = sorted(str(error.value).splitlines())
    assert len(lines) == 2
    assert re.fullmatch(r".*run\.yaml:\d+: method\.alpha: must be at least 1\.2e-38 .*", lines[0])
    assert re.fullmatch(r".*run\.yaml:\d+: optim\.learning_rate: must be at most .*", lines[1])
