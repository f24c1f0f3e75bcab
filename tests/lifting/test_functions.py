"""Functions of every form are lifted: state, keys, static arguments, results that are no arrays."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_models import MODELS, bound, every_model, moved, start
from lifted_nodes import adapted, numbers

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes

D = 4
X = numbers(2, 6, D)
BASE = {"w": numbers(1, D, D), "v": numbers(3, D)}
BOUND, MERGED = adapted(BASE, {"w": Axes((0,), (1,))})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool, *, twice: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "inside", x)
        x = nn.Dense(3)(x)
        return x + x if twice else x


VARIABLES = jax.jit(lambda key, x: Net().init(key, x, False))(jax.random.key(0), X)
KERNELS = {f"Dense_{i}/kernel": Axes((0,), (1,)) for i in (0, 1)}
NET_BOUND, NET_MERGED = adapted(VARIABLES["params"], KERNELS)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lifting", ["the parameters", "all variables"])
def test_collections_keys_and_static_arguments_of_linen_pass_through(train, lifting):
    rngs = {"dropout": jax.random.key(7)}
    state = {"batch_stats": VARIABLES["batch_stats"]}
    options = {"mutable": ["batch_stats", "intermediates"], "rngs": rngs, "twice": True}

    def of_params(params, state, x):
        return Net().apply({"params": params, **state}, x, train, **options)

    if lifting == "the parameters":
        actual = jax.jit(jp.lift(of_params))(NET_BOUND, state, X)
    else:
        apply = jp.lift(Net().apply)
        run = lambda p, state, x: apply({"params": p, **state}, x, train, **options)  # noqa: E731
        actual = jax.jit(run)(NET_BOUND, state, X)
    assert_same(actual, jax.jit(of_params)(NET_MERGED, state, X))
    y, new = actual
    mean = new["batch_stats"]["BatchNorm_0"]["mean"]
    assert (np.abs(mean).max() > 1e-3) == train
    (inside,) = new["intermediates"]["inside"]
    assert (np.mean(np.asarray(inside) == 0) > 0.2) == train
    assert y.shape == (6, 3)


def test_keys_may_differ_from_call_to_call():
    apply = jp.lift(Net().apply)
    variables = {"params": NET_BOUND, "batch_stats": VARIABLES["batch_stats"]}

    def run(key):
        return apply(variables, X, True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    first, second = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    assert np.abs(first - second).max() > 1e-2


class WithState(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(D, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


def test_state_and_keys_of_nnx_pass_through():
    graph, params, rest = nnx.split(WithState(nnx.Rngs(0)), nnx.Param, ...)
    kernels = {f"{name}/kernel": Axes((0,), (1,)) for name in ("first", "last")}
    nodes, sums = adapted(params, kernels)

    def step(params, rest, x):
        model = nnx.merge(graph, params, rest)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat, nnx.RngState)

    actual, expected = jax.jit(jp.lift(step))(nodes, rest, X), jax.jit(step)(sums, rest, X)
    assert_same(*(jax.tree.map(plain, one) for one in (actual, expected)))
    stats, keys = actual[1]
    assert np.abs(stats["norm"]["mean"][...]).max() > 1e-3
    assert keys["dropout"]["rngs"]["count"][...] == 1


def plain(leaf):
    """A key as its numbers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@flax.struct.dataclass
class Output:
    logits: Any
    name: str = flax.struct.field(pytree_node=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    hidden: Any
    count: Any


RESULTS = {
    "a dict": lambda p, x: {"y": x @ p["w"], "more": {"x": x}},
    "a dataclass of flax": lambda p, x: Output(x @ p["w"], "logits"),
    "a dataclass": lambda p, x: Plain(x @ p["w"], 3),
    "nothing": lambda p, x: None,
    "nothing, and something": lambda p, x: (None, x @ p["w"], ()),
    "numbers of Python": lambda p, x: (x @ p["w"], 3, 2.5, True),
    "arrays of NumPy": lambda p, x: (x @ p["w"], np.arange(3)),
    "shapes": lambda p, x: (p["w"].shape, p["w"].ndim, x @ p["w"]),
    "inputs": lambda p, x: (x, p["v"]),
    "a constant": lambda p, x: (jnp.arange(3), x @ p["w"]),
    "the same twice": lambda p, x: [x @ p["w"]] * 2,
    "moved weights, used": lambda p, x: (p["w"].T @ x.T).T @ p["w"].reshape(-1).reshape(D, D),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_have_the_form_that_the_function_gives_them(name):
    actual, expected = jp.lift(RESULTS[name])(BOUND, X), RESULTS[name](MERGED, X)
    assert_same(actual, expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        if not isinstance(other, jax.Array):
            assert type(one) is type(other)


ARGUMENTS = {
    "by keyword": lambda apply, p: apply(p, x=X),
    "the parameters by keyword": lambda apply, p: apply(x=X, p=p),
    "a choice": lambda apply, p: apply(p, X, how="twice"),
    "a function": lambda apply, p: apply(p, X, then=jnp.tanh),
    "nothing": lambda apply, p: apply(p, X, offset=None),
    "a number": lambda apply, p: apply(p, X, offset=2),
    "an array of NumPy": lambda apply, p: apply(p, np.asarray(X), offset=np.float32(0.5)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_arrive_as_they_are_given(name):
    seen = []

    def function(p, x, how="once", then=None, offset=None):
        seen.append((type(x), how, then, type(offset)))
        y = x @ p["w"] * (2 if how == "twice" else 1)
        y = y if then is None else then(y)
        return y if offset is None else y + offset

    assert_same(ARGUMENTS[name](jp.lift(function), BOUND), ARGUMENTS[name](function, MERGED))
    assert seen[0] == seen[1]


def test_static_arguments_of_jit_stay_static():
    def function(p, x, times):
        for _ in range(times):
            x = jnp.tanh(x @ p["w"])
        return x

    actual = jax.jit(jp.lift(function), static_argnums=2)(BOUND, X, 3)
    assert_same(actual, function(MERGED, X, 3))


def test_the_lifted_function_keeps_its_name_and_its_text():
    def apply_all(p):
        """Does it."""

    assert (jp.lift(apply_all).__name__, jp.lift(apply_all).__doc__) == ("apply_all", "Does it.")


@every_model
def test_switching_adapters_traces_once_and_the_base_stays_bit_identical(model):
    function, params, _, inputs = MODELS[model]
    traced = []

    def counted(*args):
        traced.append(1)
        return function(*args)

    def slope(tree, adapter, params, *inputs):
        one = adapter.replace(params=tree)
        return jnp.square(jp.lift(counted)(bound(model, params, one), *inputs)).sum()

    before = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    run, results = jax.jit(jax.grad(slope)), []
    for scale in (0.1, 0.2, 0.3):
        adapter = moved(start(model, "lora"), scale)
        results.append(jax.tree.leaves(run(adapter.params, adapter, params, *inputs))[0])
    assert len(traced) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-3
    for leaf, old in zip(jax.tree.leaves(params), before, strict=True):
        np.testing.assert_array_equal(leaf, old)
