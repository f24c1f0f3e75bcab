"""Laws of composition: `lift` under, around and beside JAX's transformations.

What is expected comes from weights that are summed by hand, ``w + scale * a @ b``, in the same
program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from lifted_nodes import numbers

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes, Folded
from jaxpeft.methods.lora.nodes import LoRAKernel

D, LAYERS, RANK, ROWS = 4, 3, 2, 5
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "a name": jax.checkpoint_policies.save_only_these_names("wide"),
    "the products of nodes": jax.checkpoint_policies.save_only_these_names("product"),
}
BASE = {"w": 0.5 * numbers(1, LAYERS, D, D), "v": 0.5 * numbers(2, D, D), "b": numbers(3, D)}
AXES = {"w": Axes((1,), (2,), (0,)), "v": Axes((0,), (1,))}
STACKS = {"w": (LAYERS,), "v": ()}


def draw(seed):
    return {
        name: {
            "a": 0.5 * numbers(seed, *stack, D, RANK),
            "b": 0.5 * numbers(seed + 1, *stack, RANK, D),
            "scale": 0.5 + jnp.arange(np.prod(stack, dtype=int), dtype=jnp.float32).reshape(stack),
        }
        for name, stack in STACKS.items()
    }


FACTORS, X = draw(4), numbers(6, ROWS, D)


def with_nodes(factors, params=BASE):
    nodes = {
        name: LoRAKernel(
            Folded(params[name], AXES[name]), **one, dropout=jnp.zeros(one["scale"].shape)
        )
        for name, one in factors.items()
    }
    return {**params, **nodes}


def with_sums(factors, params=BASE):
    def add(base, a, b, scale):
        return base + scale[..., None, None] * jnp.matmul(a, b, precision="highest")

    sums = {name: add(params[name], **one) for name, one in factors.items()}
    return {**params, **sums}


def layer(y, w):
    return checkpoint_name(jnp.tanh(y @ w), "wide")


@jax.custom_jvp
def wrong(x):
    """Its derivative is 7, which nobody would find from what it computes."""
    return jnp.sin(x)


wrong.defjvp(lambda primals, tangents: (wrong(*primals), 7.0 * tangents[0]))


@jax.custom_vjp
def wrong_back(x):
    return jnp.cos(x)


wrong_back.defvjp(lambda x: (wrong_back(x), None), lambda _, slope: (11.0 * slope,))


def loop(until):
    """A while loop whose end depends on data."""

    def function(p, x):
        start = jnp.int32(0), x
        step = lambda c: (c[0] + 1, layer(c[1], p["w"][c[0]]) @ p["v"])  # noqa: E731
        return jax.lax.while_loop(lambda c: (c[0] < 3) & (until(p, c[1]) < 100), step, start)[1]

    return function


def scan_of_scan(p, x):
    inner = lambda z, _: (jnp.tanh(z @ p["v"]), None)  # noqa: E731
    outer = lambda y, w: (jax.lax.scan(inner, layer(y, w), length=2)[0], y.sum())  # noqa: E731
    y, sums = jax.lax.scan(outer, x, p["w"])
    return y + sums[0]


def remat(policy):
    def function(p, x):
        step = jax.checkpoint(lambda y, w: layer(y, w) @ p["v"] + p["b"], policy=policy)
        return jax.lax.scan(lambda y, w: (step(y, w), None), x, p["w"])[0]

    return function


PROGRAMS = {
    "a layer": lambda p, x: layer(x, p["v"]) + p["b"],
    "scan of scan": scan_of_scan,
    "a scan in turn": lambda p, x: jax.lax.scan(
        lambda y, w: (layer(y, w), None), x, p["w"], reverse=True, unroll=2
    )[0],
    "a loop of known length": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, y: layer(y, p["w"][i]) @ p["v"], x
    ),
    "branches": lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda y: y @ p["v"], lambda y: layer(y, p["w"][1]), x
    ),
    "a choice": lambda p, x: jax.lax.switch(
        2 * jnp.int32(x[0, 0] > -9),
        [lambda y: y, lambda y: y @ p["v"], lambda y: y @ p["v"].T @ p["w"][0]],
        x,
    ),
    "a rule beside": lambda p, x: wrong(x @ p["v"]) @ p["w"][2],
    "layers one by one": lambda p, x: sum(
        x @ part[0] @ w for part, w in zip(jnp.split(p["w"], 3), jnp.unstack(p["w"]), strict=True)
    ),
    "a gradient inside": lambda p, x: jax.grad(lambda x: jnp.sin(scan_of_scan(p, x)).sum())(x),
    "a derivative inside": lambda p, x: jax.jvp(lambda x: scan_of_scan(p, x), (x,), (x,))[1],
    "a batch inside": lambda p, x: jax.vmap(
        jax.grad(lambda row: jnp.sin(layer(row, p["v"]) @ p["w"][1]).sum())
    )(x),
    "a weight that is held constant": lambda p, x: (
        x @ jax.lax.stop_gradient(p["v"]) @ p["w"][0] @ p["v"]
    ),
    "jit": lambda p, x: jax.jit(lambda v, y: y @ v, inline=True)(p["v"], jax.jit(layer)(x, p["v"])),
    **{f"remat, {name}": remat(policy) for name, policy in POLICIES.items()},
}
ONLY_FORWARD = {
    "a loop of unknown length": lambda p, x: jax.lax.fori_loop(
        0, jnp.int32(2 + (x[0, 0] > -9)), lambda i, y: layer(y, p["w"][i]) @ p["v"], x
    ),
    "a loop until": loop(lambda p, y: y.sum()),
    "a loop whose test multiplies": loop(lambda p, y: (y @ p["v"]).sum()),
}


def loss(function, factors, x):
    return jnp.sin(1.0 + function(factors, x)).sum()


def gradient(function):
    return jax.grad(functools.partial(loss, function), argnums=(0, 1))


def forward_derivative(function):
    along = jax.tree.map(jnp.cos, (FACTORS, X))
    return lambda *args: jax.jvp(function, args, along)


def stacked(function):
    def several(factors, x):
        return jax.vmap(function, (0, None))(
            jax.tree.map(lambda one: jnp.stack([one, -one, 0.5 * one]), factors), x
        )

    return several


def per_example(function):
    slope = jax.grad(functools.partial(loss, function))
    return lambda factors, x: jax.vmap(lambda row: slope(factors, row[None]))(x)


def curvature(function):
    return forward_derivative(gradient(function))


FORWARD = {"value": lambda function: function, "jvp": forward_derivative, "vmap": stacked}
BACKWARD = {"gradient": gradient, "per example": per_example, "curvature": curvature}
AROUND = {
    f"remat, {name}": lambda f, policy=policy: gradient(jax.checkpoint(f, policy=policy))
    for name, policy in POLICIES.items()
}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


def both(function, transforms):
    """All of some transforms of a function of nodes, and of the sums, in a program each."""

    def lifted(factors, x):
        return jp.lift(function)(with_nodes(factors), x)

    def summed(factors, x):
        return function(with_sums(factors), x)

    def run(how):
        made = {name: transform(how) for name, transform in transforms.items()}
        return jax.jit(lambda *args: {name: one(*args) for name, one in made.items()})(FACTORS, X)

    return run(lifted), run(summed)


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivatives_and_batches_of_what_is_lifted_are_those_of_the_sums(name):
    actual, expected = both(PROGRAMS[name], FORWARD | BACKWARD)
    for transform, value in expected.items():
        assert_same(actual[transform], value)
    unchanged = PROGRAMS[name](BASE, X)
    assert np.abs(actual["value"] - unchanged).max() > 1e-2


@pytest.mark.parametrize("name", ONLY_FORWARD)
def test_loops_without_a_backward_pass_are_those_of_the_sums(name):
    actual, expected = both(ONLY_FORWARD[name], FORWARD)
    assert_same(actual, expected)
    assert np.abs(actual["value"] - ONLY_FORWARD[name](BASE, X)).max() > 1e-2


@pytest.mark.parametrize("name", ["a layer", "scan of scan"])
def test_checkpoint_goes_around_lift(name):
    actual, expected = both(PROGRAMS[name], AROUND)
    assert_same(actual, expected)


def test_the_rules_of_functions_that_no_node_enters_are_used():
    """The gradient is that of the rules, not that of what the functions compute."""

    def function(p, x):
        step = jax.checkpoint(lambda y, _: (wrong_back(wrong(y @ p["v"])), None))
        return jax.lax.scan(step, x, length=1)[0]

    actual = jax.grad(lambda f: jp.lift(function)(with_nodes(f), X).sum())({"v": FACTORS["v"]})
    straight = jax.grad(lambda f: 77.0 * (X @ with_sums(f)["v"]).sum())({"v": FACTORS["v"]})
    assert_same(actual, straight)


def saved(function):
    """The shapes of what the forward pass of a function of factors keeps for the backward pass."""
    kept = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], FACTORS, X)
    return [leaf.shape for leaf in jax.tree.leaves(kept)]


def test_policies_inside_of_what_is_lifted_are_kept():
    """What is kept for the backward pass is what the policy of the model says, not more."""

    def kept(policy):
        step = jax.checkpoint(lambda p, x: jnp.sin(layer(x, p["v"])).sum(), policy=policy)
        return saved(lambda factors, x: jp.lift(step)(with_nodes(factors), x))

    def count(policy):
        shapes = kept(POLICIES[policy])
        return shapes.count((ROWS, D)), shapes.count((ROWS, RANK))

    # The inputs are kept always. The node tags its product with the base, and that with A.
    assert count("nothing") == (1, 0)
    assert count("a name") == (2, 0)
    assert count("the products of nodes") == (2, 1)
    assert count("products") == (3, 1)


def test_lift_of_lift_is_lift():
    function = PROGRAMS["remat, products"]
    args = with_nodes(FACTORS), X
    once, twice = (jax.jit(f)(*args) for f in (jp.lift(function), jp.lift(jp.lift(function))))
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("name", ["a layer", "scan of scan", "remat, a name", "branches"])
def test_a_lifted_function_inside_another_adds_its_own_adapter(name):
    other = draw(9)

    def inside(params, x):
        return jp.lift(PROGRAMS[name])(with_nodes(other, params), x)

    def lifted(factors, x):
        return loss(lambda f, x: jp.lift(inside)(with_nodes(f), x), factors, x)

    def summed(factors, x):
        both = with_sums(other, with_sums(factors))
        return loss(lambda _, x: PROGRAMS[name](both, x), factors, x)

    actual, expected = (jax.jit(jax.value_and_grad(f))(FACTORS, X) for f in (lifted, summed))
    assert_same(actual, expected)


def test_collectives_over_rows_are_those_of_the_batch_around():
    def function(p, x):
        return x @ p["v"] - jax.lax.pmean(x @ p["v"], "rows") * jax.lax.axis_index("rows")

    def over_rows(apply, params):
        return jax.vmap(lambda row: apply(params, row), axis_name="rows")(X)

    actual = jax.jit(lambda f: over_rows(jp.lift(function), with_nodes(f)))(FACTORS)
    expected = jax.jit(lambda f: over_rows(function, with_sums(f)))(FACTORS)
    assert_same(actual, expected)


def test_what_the_function_closes_over_is_traced_too():
    """Gradients reach values that only the function itself refers to."""

    def lifted(x):
        return jp.lift(lambda p: jnp.sin(x @ p["v"]).sum())(with_nodes(FACTORS))

    def summed(x):
        return jnp.sin(x @ with_sums(FACTORS)["v"]).sum()

    assert_same(jax.jit(jax.grad(lifted))(X), jax.jit(jax.grad(summed))(X))


@pytest.mark.parametrize("name", ["a layer", "scan of scan", "remat, a name", "branches"])
def test_a_batch_may_be_empty(name):
    actual = jax.jit(jp.lift(PROGRAMS[name]))(with_nodes(FACTORS), X[:0])
    assert actual.shape == (0, D)


def test_no_value_of_a_trace_outlives_it():
    with jax.checking_leaks():
        for function in PROGRAMS.values():
            jax.make_jaxpr(jp.lift(function))(with_nodes(FACTORS), X)


def test_without_jit_every_step_runs_by_itself():
    with jax.disable_jit():
        for name in ("scan of scan", "branches", "a choice"):
            actual = jp.lift(PROGRAMS[name])(with_nodes(FACTORS), X)
            assert_same(actual, PROGRAMS[name](with_sums(FACTORS), X))
