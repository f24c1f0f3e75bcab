"""Update rules against their formulas in NumPy, schedules at points, and the mask."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft.updates.optimizers import OptimConfig, make_optimizer, make_schedule, masked

PARAMS = {"w": np.float32([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]]), "v": np.float32([2.0])}
GRADS = [
    {"w": np.float32([[0.1, -0.2, 0.3], [1.0, 2.0, -3.0]]), "v": np.float32([0.5])},
    {"w": np.float32([[-0.3, 0.1, 0.0], [0.2, -1.0, 0.4]]), "v": np.float32([-2.0])},
    {"w": np.float32([[0.2, 0.2, -0.1], [0.0, 0.5, 1.0]]), "v": np.float32([0.1])},
]
RATE, DECAY = 0.1, 0.01


def config(name, **changes):
    base = {"learning_rate": RATE, "schedule": "constant", "clip_norm": None, "weight_decay": DECAY}
    return OptimConfig(**{"name": name, **base, **changes})


def run(tx, grads=GRADS):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw(p, gradients, b1=0.8, b2=0.95):
    """Loshchilov and Hutter 2019, algorithm 2."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        p = p - RATE * (step + DECAY * p)
    return p


def lion(p, gradients, b1=0.8, b2=0.95):
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(p)
    for g in gradients:
        step = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        p = p - RATE * (step + DECAY * p)
    return p


def sgd(p, gradients, b1=0.8, b2=None):
    """Momentum with decoupled decay."""
    m = np.zeros_like(p)
    for g in gradients:
        m = b1 * m + g
        p = p - RATE * (m + DECAY * p)
    return p


def adafactor(p, gradients, b1=None, b2=None):
    """Shazeer and Stern 2018, algorithm 5 without factors, for the small; decoupled decay."""
    v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        v = beta * v + (1 - beta) * (g**2 + 1e-30)
        step = g / np.sqrt(v)
        step = step / max(1.0, np.sqrt(np.mean(step**2)))
        p = p - RATE * (step + DECAY * p)
    return p


@pytest.mark.parametrize("rule", [adamw, lion, sgd, adafactor], ids=lambda rule: rule.__name__)
def test_three_updates_follow_the_formula(rule):
    actual = run(make_optimizer(config(rule.__name__, b1=0.8, b2=0.95), 10))
    for name, p in PARAMS.items():
        expected = rule(p.astype(np.float64), [g[name].astype(np.float64) for g in GRADS])
        np.testing.assert_allclose(actual[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_the_rate_of_each_update_is_that_of_the_schedule(name):
    """With a rate of zero from the second update on, nothing moves any more."""
    tx = make_optimizer(config(name, schedule="linear"), 1)
    jax.tree.map(np.testing.assert_array_equal, run(tx, GRADS[:1]), run(tx))


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_gradients_are_clipped_by_their_global_norm(clip):
    actual = run(make_optimizer(config("sgd", b1=0.0, clip_norm=clip), 10), GRADS[:1])
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in GRADS[0].values()))
    factor = min(1.0, clip / norm)
    for name, p in PARAMS.items():
        expected = p - RATE * (factor * GRADS[0][name] + DECAY * p)
        np.testing.assert_allclose(actual[name], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup", "points"),
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.0, 1: 0.25, 4: 1.0, 99: 1.0}),
        ("linear", 0, {0: 1.0, 50: 0.5, 75: 0.25, 100: 0.0}),
        ("linear", 20, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0, 120: 0.0}),
        ("cosine", 0, {0: 1.0, 25: (1 + math.cos(math.pi / 4)) / 2, 50: 0.5, 100: 0.0}),
        ("cosine", 20, {10: 0.5, 20: 1.0, 40: (1 + math.cos(math.pi / 4)) / 2, 60: 0.5, 100: 0.0}),
        ("cosine", 100, {0: 0.0, 50: 0.5, 99: 0.99}),  # nothing but warm-up
    ],
)
def test_schedules_pass_through_these_points(schedule, warmup, points):
    rate = make_schedule(
        OptimConfig(learning_rate=3.0, schedule=schedule, warmup_steps=warmup), steps=100
    )
    for count, share in points.items():
        assert float(rate(jnp.int32(count))) == pytest.approx(3.0 * share, abs=1e-6)


TREE = {"base": {"w": jnp.ones((4, 5)), "norm": jnp.ones(3)}, "adapter": {"a": jnp.ones((4, 2))}}
ON = {"base": {"w": False, "norm": True}, "adapter": {"a": True}}


def gradients(value=2.0):
    return jax.tree.map(lambda on, x: value * x if on else None, ON, TREE)


@pytest.mark.parametrize("trainable", [ON, lambda tree: ON], ids=["tree", "function"])
def test_frozen_leaves_have_neither_state_nor_update(trainable):
    tx = masked(optax.adam(0.1), trainable)
    state = tx.init(TREE)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == [(3,), (3,), (4, 2), (4, 2)]  # two moments for two trained leaves
    updates, new = jax.jit(tx.update)(gradients(), state, TREE)
    assert updates["base"]["w"] is None
    np.testing.assert_allclose(updates["base"]["norm"], -0.1 * np.ones(3), rtol=1e-5)
    np.testing.assert_allclose(updates["adapter"]["a"], -0.1 * np.ones((4, 2)), rtol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_clipping_counts_trained_leaves_only():
    tx = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-1.0)), ON)
    huge = {**gradients(), "base": {"w": 1e6 * TREE["base"]["w"], "norm": 2.0 * jnp.ones(3)}}
    for grads in (gradients(), huge):
        updates, _ = tx.update(grads, tx.init(TREE), TREE)
        expected = -2.0 / math.sqrt(4 * (3 + 8))  # eleven elements of 2
        np.testing.assert_allclose(updates["base"]["norm"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates["adapter"]["a"], expected, rtol=1e-6)


def test_weight_decay_leaves_frozen_leaves_alone():
    tx = masked(optax.adamw(0.1, weight_decay=0.5), ON)
    zeros = jax.tree.map(lambda on, x: 0 * x if on else None, ON, TREE)
    updates, _ = tx.update(zeros, tx.init(TREE), TREE)
    assert updates["base"]["w"] is None
    np.testing.assert_allclose(updates["adapter"]["a"], -0.05 * np.ones((4, 2)), rtol=1e-6)


def test_an_update_without_params_says_what_is_missing():
    tx = masked(optax.sgd(0.1), ON)
    with pytest.raises(ValueError, match="needs params, the whole tree"):
        tx.update(gradients(), tx.init(TREE))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("clip_norm", 0.0),
        ("clip_norm", float("nan")),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("b1", 1.0),
        ("b2", -0.5),
    ],
)
def test_nonsense_in_the_config_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
