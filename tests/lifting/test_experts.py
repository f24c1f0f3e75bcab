"""Experts whose tokens are sorted: a stack of nodes answers for `jax.lax.ragged_dot`.

What is expected comes from a copy of the summed weight of its expert for every row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import METHODS, moved
from lifted_nodes import adapted, numbers, shapes_made

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes
from jaxpeft.lifting.grouped import by_group

EXPERTS, D, WIDE = 3, 8, 12
X = numbers(3, 10, D)
PARAMS = {
    "router": numbers(1, D, EXPERTS),
    "up": 0.3 * numbers(2, EXPERTS, D, WIDE),
    "down": 0.3 * numbers(3, EXPERTS, WIDE, D),
}
METHOD = jp.LoRA(rank=2, targets="all-linear")


def sorted_rows(p, x, product):
    """Every token goes to one expert, with the others of that expert."""
    scores = jax.nn.softmax(x @ p["router"])
    expert = scores.argmax(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS)
    h = jnp.tanh(product(x[order], p["up"], sizes))
    y = product(h, p["down"], sizes)
    return jnp.zeros_like(x).at[order].set(y) * scores.max(-1, keepdims=True)


def model(p, x):
    return sorted_rows(p, x, jax.lax.ragged_dot)


def copied(p, x):
    def product(x, w, sizes):
        ends = jnp.cumsum(sizes)
        expert = (jnp.arange(len(x))[:, None] >= ends).sum(-1)
        return (x[:, :, None] * w[expert]).sum(1)

    return sorted_rows(p, x, product)


ROLES = jp.describe(model, PARAMS, X)


def started(method):
    return moved(jp.init_adapter(method, PARAMS, jax.random.key(0), roles=ROLES))


def lifted(adapter, x, **options):
    return jp.lift(model)(jp.bind(PARAMS, adapter, **options)["params"], x)


def assert_same(actual, expected):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


def test_a_stack_of_experts_is_a_kernel():
    assert {path: (row.role, row.axes) for path, row in ROLES.items()} == {
        "router": ("kernel", Axes((0,), (1,))),
        "up": ("kernel", Axes((1,), (2,), (0,))),
        "down": ("kernel", Axes((1,), (2,), (0,))),
    }
    sizes = np.bincount(np.asarray(X @ PARAMS["router"]).argmax(-1), minlength=EXPERTS)
    assert (sizes > 0).sum() > 1


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha", "lokr", "vera", "oft"])
def test_every_method_gives_what_the_experts_give_one_by_one(name):
    own = {"ia3": jp.IA3(feedforward=("down",), targets="all-linear")}
    adapter = started((METHODS | own)[name])

    def run(function):
        def loss(tree, x):
            y = function(adapter.replace(params=tree), x)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(adapter.params, X)

    ours, actual = run(lifted)
    theirs, expected = run(lambda one, x: copied(jp.merge(PARAMS, one), x))
    assert_same(actual, expected)
    assert np.abs(actual - copied(PARAMS, X)).max() > 1e-2
    if name != "dora":  # it holds its norm constant in one of the two
        assert_same(ours, theirs)


SIZES = jnp.array([4, 0, 3], jnp.int32)  # the last three rows have no expert
LAYOUTS = {
    "in front": (lambda w: w, (3, 8, 6), Axes((1,), (2,), (0,))),
    "second": (lambda w: w.transpose(1, 0, 2), (8, 3, 6), Axes((0,), (2,), (1,))),
    "turned": (lambda w: w.transpose(0, 2, 1), (3, 6, 8), Axes((2,), (1,), (0,))),
    "heads": (lambda w: w.reshape(3, 8, 6), (3, 8, 2, 3), Axes((1,), (2, 3), (0,))),
    "of heads": (lambda w: w.reshape(3, 8, 6), (3, 2, 4, 6), Axes((1, 2), (3,), (0,))),
    "used turned": (lambda w: w.transpose(0, 2, 1), (3, 6, 8), Axes((1,), (2,), (0,))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_lie_on_any_axis(name):
    move, shape, axes = LAYOUTS[name]

    def function(p, x):
        return jax.lax.ragged_dot(x, move(p["w"]), SIZES)

    bound, merged = adapted({"w": numbers(1, *shape)}, {"w": axes})
    if name != "used turned":
        (row,) = jp.describe(function, {"w": numbers(1, *shape)}, X).values()
        assert row.axes == axes
    actual = jax.jit(jp.lift(function))(bound, X)
    weights, expert = np.asarray(move(merged["w"]), np.float64), [0, 0, 0, 0, 2, 2, 2]
    rows = [np.asarray(x, np.float64) @ weights[e] for x, e in zip(X, expert, strict=False)]
    np.testing.assert_allclose(actual[:7], rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(actual[7:], function(merged, X)[7:])


def test_layers_of_experts_run_in_a_loop():
    layers = {"w": 0.3 * numbers(5, 2, EXPERTS, D, D)}

    def function(p, x):
        step = jax.checkpoint(lambda y, w: (y + jax.lax.ragged_dot(y, w, SIZES), None))
        return jax.lax.scan(step, x, p["w"])[0]

    roles = jp.describe(function, layers, X)
    assert roles["w"].axes == Axes((2,), (3,), (0, 1))
    adapter = moved(jp.init_adapter(METHOD, layers, jax.random.key(0), roles=roles))
    actual = jax.jit(jp.lift(function))(jp.bind(layers, adapter)["params"], X)
    assert_same(actual, jax.jit(function)(jp.merge(layers, adapter), X))
    assert np.abs(actual - function(layers, X)).max() > 1e-2


def test_rows_of_an_expert_drop_inputs_of_their_own():
    adapter = started(jp.LoRA(rank=2, dropout=0.5, targets=("up",)))
    same = jnp.tile(X[:1], (10, 1))
    assert np.ptp(lifted(adapter, same), axis=0).max() < 1e-6
    rows = lifted(adapter, same, dropout_key=jax.random.key(1))
    assert len(np.unique(np.asarray(rows).round(4), axis=0)) > 3


def test_the_program_is_that_of_lora_by_hand():
    """Operations are counted by rows, not by rows times experts, and no sum is formed."""
    adapter = started(jp.LoRA(rank=2, targets=("up",)))

    def ours(tree):
        return jnp.sin(lifted(adapter.replace(params=tree), X)).sum()

    def by_hand(tree):
        scale = adapter.buffers["up"]["scale"][0]
        low = tree["up"]

        def product(x, w, sizes):
            dot = jax.lax.ragged_dot
            if w is not PARAMS["up"]:
                return dot(x, w, sizes)
            return dot(x, w, sizes) + scale * dot(dot(x, low["a"], sizes), low["b"], sizes)

        return jnp.sin(sorted_rows(PARAMS, X, product)).sum()

    flops = [jp.count_flops(jax.grad(f), adapter.params) for f in (ours, by_hand)]
    assert flops[0] == flops[1]
    made = shapes_made(jax.make_jaxpr(jax.grad(ours))(adapter.params).jaxpr)
    moves = {name for shape, name in made if shape[-3:] == (EXPERTS, D, WIDE)}
    assert moves <= {"broadcast_in_dim", "transpose", "reshape", "squeeze", "split"}


REFUSED = {
    "as the rows": lambda p, x: jax.lax.ragged_dot(p["w"], x[None, :6], SIZES[:1]),
    "another axis as the stack": lambda p, x: jax.lax.ragged_dot(
        x, p["cube"].transpose(1, 0, 2), jnp.ones(8, jnp.int32)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_ragged_products_are_refused(name):
    bound, _ = adapted(
        {"w": numbers(1, 8, 6), "cube": numbers(2, 8, 8, 8)},
        {"w": Axes((0,), (1,)), "cube": Axes((1,), (2,), (0,))},
    )
    with pytest.raises(jp.UserError, match=r"^\w+, ragged_dot_general at .*test_experts.py"):
        jax.eval_shape(jp.lift(REFUSED[name]), bound, X)


def test_what_one_row_does_with_its_group_is_done_for_all():
    """Products on either side, values of groups alone, and elementwise use of both."""
    w, shift = numbers(1, 3, 4, 4), numbers(2, 3, 4)
    x, sizes = numbers(3, 6, 4), np.array([2, 1, 3])

    def one(arrays, row):
        w, shift = arrays
        h = jnp.einsum("ij,kj->ik", w, jnp.stack([row, 2 * row])).T
        return (h.sum(0) * jnp.tanh(shift) + jnp.linalg.norm(w)) @ jnp.ones((4, 2)), None

    actual = by_group(lambda arrays, row: one(arrays, row)[0], [w, shift], x, jnp.asarray(sizes))
    groups = np.repeat(np.arange(3), sizes)
    expected = [one((w[g], shift[g]), row)[0] for g, row in zip(groups, x, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
