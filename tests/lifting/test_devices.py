"""`lift` on several devices: sharded parameters, and `shard_map` around, inside and across."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lifted_nodes import adapted, numbers

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes

D, WIDE, ROWS = 8, 16, 8
BASE = {
    "up": 0.3 * numbers(1, 2, D, WIDE),
    "down": 0.3 * numbers(2, 2, WIDE, D),
    "norm": 1.0 + 0.1 * numbers(3, D),
}
AXES = {name: Axes((1,), (2,), (0,)) for name in ("up", "down")}
BOUND, MERGED = adapted(BASE, AXES)
X = numbers(4, ROWS, D)
MESH = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def block(y, w, constrain=lambda y, spec: y):
    h = constrain(jnp.tanh(y @ w[0]), P("data", "tensor"))
    return y + constrain(h @ w[1], P("data"))


def model(p, x, constrain=lambda y, spec: y):
    step = jax.checkpoint(lambda y, w: (block(y, w, constrain), None))
    return jax.lax.scan(step, x, (p["up"], p["down"]))[0] * p["norm"]


def sharded(y, spec):
    return jax.lax.with_sharding_constraint(y, NamedSharding(MESH, spec))


def put(tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(MESH, spec)), tree, specs)


def specs(of_raw, node):
    """A spec for every array of the nodes: the raw array's, A by rows and B by columns of it."""
    return node.replace(
        base=node.base.replace(raw=of_raw),
        a=P(None, of_raw[1]),
        b=P(None, None, of_raw[2]),
        scale=P(),
        dropout=P(),
    )


SPECS = {
    "up": specs(P(None, None, "tensor"), BOUND["up"]),
    "down": specs(P(None, "tensor", None), BOUND["down"]),
    "norm": P(),
}


def slope(apply, bound, x):
    """The loss and its gradients by the factors and the inputs."""

    def loss(factors, x):
        nodes = {name: bound[name].replace(a=a, b=b) for name, (a, b) in factors.items()}
        return jnp.square(apply({**bound, **nodes}, x)).sum()

    factors = {name: (bound[name].a, bound[name].b) for name in AXES}
    return jax.value_and_grad(loss, argnums=(0, 1))(factors, x)


def assert_same(actual, expected):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1, np.abs(other).max()))


def test_sharded_parameters_give_what_one_device_gives():
    on_many = put(BOUND, SPECS), put(X, P("data"))
    run = jax.jit(lambda bound, x: slope(jp.lift(lambda p, x: model(p, x, sharded)), bound, x))
    alone = jax.jit(lambda bound, x: slope(jp.lift(model), bound, x))(BOUND, X)
    assert_same(run(*on_many), alone)
    assert_same(jax.jit(jp.lift(model))(BOUND, X), jax.jit(model)(MERGED, X))
    # The base is not gathered: no array of the compiled program has a whole kernel's shape.
    text = run.lower(*on_many).compile().as_text()
    assert f"f32[2,{D},{WIDE // 4}]" in text
    assert f"f32[2,{D},{WIDE}]" not in text
    assert f"f32[{D},{WIDE}]" not in text


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_goes_around_lift(check):
    """Each device has columns of one kernel and rows of the other, and sums over them by itself."""

    def local(p, x):
        def step(y, w):
            return y + jax.lax.psum(jnp.tanh(y @ w[0]) @ w[1], "tensor"), None

        return jax.lax.scan(step, x, (p["up"], p["down"]))[0] * p["norm"]

    around = jax.shard_map(
        jp.lift(local),
        mesh=MESH,
        in_specs=(SPECS, P("data")),
        out_specs=P("data"),
        check_vma=check,
    )
    assert_same(jax.jit(around)(BOUND, X), jax.jit(model)(MERGED, X))
    assert_same(
        jax.jit(lambda bound, x: slope(around, bound, x))(BOUND, X),
        jax.jit(lambda bound, x: slope(jp.lift(model), bound, x))(BOUND, X),
    )


def by_device(body, specs):
    return jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=P("data"))


def test_a_shard_map_that_no_node_enters_stays():
    def function(p, x):
        centred = by_device(
            lambda y, norm: y * norm - jax.lax.pmean(y.mean(0), "data"), (P("data"), P())
        )
        return centred(x @ p["up"][0], jnp.tile(p["norm"], 2)) @ p["down"][1]

    assert_same(jax.jit(jp.lift(function))(BOUND, X), jax.jit(function)(MERGED, X))
    assert_same(
        jax.jit(lambda bound, x: slope(jp.lift(function), bound, x))(BOUND, X)[1][1],
        jax.jit(jax.grad(lambda x: jnp.square(function(MERGED, x)).sum()))(X),
    )
    assert "shard_map" in str(jax.make_jaxpr(jp.lift(function))(BOUND, X))


def test_a_shard_map_that_a_node_enters_is_an_error():
    def function(p, x):
        return by_device(lambda y, w: y @ w, (P("data"), P()))(x, p["up"][0])

    with pytest.raises(jp.UserError) as caught:
        jax.eval_shape(jp.lift(function), BOUND, X)
    assert str(caught.value).startswith("up, shard_map at ")
    assert "test_devices.py" in str(caught.value)
    assert "crosses the boundary of a shard_map; call lift inside of it" in str(caught.value)
    formed = jax.jit(jp.lift(function, materialize=True))(BOUND, X)
    assert_same(formed, jax.jit(function)(MERGED, X))


@pytest.mark.parametrize("sharded", ["up", "the input"])
def test_explicit_axes_are_an_error(sharded):
    """Under them a reshape may need to be told how its result is sharded."""
    explicit = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x: jax.device_put(x, NamedSharding(explicit, P(None, "tensor")))  # noqa: E731
    if sharded == "up":
        node = BOUND["up"]
        bound, x = {**BOUND, "up": node.replace(a=put(node.a))}, X
    else:
        bound, x = BOUND, put(X)
    with pytest.raises(jp.UserError, match=r"Explicit mesh axis 'tensor', and .* Auto axes only"):
        jax.jit(jp.lift(model))(bound, x)
