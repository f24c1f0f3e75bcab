"""What the trainer is made of takes every kind of tree, and gives back the kind that it got."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.sharding import PartitionSpec
from tree_kinds import KINDS, SIZES, forward, layers, lifted, same_kind, start

import jaxpeft as jp
from jaxpeft.lifting.trees import map_named, named_leaves

every_kind = pytest.mark.parametrize("kind", KINDS)
X = jnp.asarray(np.random.default_rng(1).standard_normal((4, SIZES[0])), jnp.float32)
STEPS, RATE = 4, 0.05


def loss_of(kind):
    def loss(params, adapter, x, key):
        del key
        return jnp.square(lifted(kind, params, adapter, x)).mean()

    return loss


def with_biases(tree):
    """Trains the adapter and every bias of the base."""
    base = map_named(lambda path, leaf: path.endswith("bias"), tree["base"])
    return {"base": base, "adapter": jax.tree.map(lambda leaf: True, tree["adapter"])}


def by_position(tree):
    """The leaves of the layers, in their order, whatever the tree."""
    return [np.asarray(leaf) for _, leaf in sorted(named_leaves(tree).items())]


def factors_of(adapter):
    """A and B of both layers, in their order."""
    leaves = named_leaves(adapter.params)
    return [{name: leaves[f"{path}/{name}"] for name in "ab"} for path in adapter.spec.paths]


def plain_loop(factors, scale, biases):
    """The same training by optax alone, with LoRA written by hand."""

    def loss(trained):
        each = [
            {
                "kernel": layer["kernel"] + scale * ab["a"] @ ab["b"],
                "bias": trained["biases"][at] if biases else layer["bias"],
            }
            for at, (layer, ab) in enumerate(zip(layers(), trained["factors"], strict=True))
        ]
        return jnp.square(forward(each, X)).mean()

    trained = {"factors": factors}
    if biases:
        trained["biases"] = [layer["bias"] for layer in layers()]
    tx = optax.adam(RATE)

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = tx.init(trained), []
    for _ in range(STEPS):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    return trained, losses


@every_kind
@pytest.mark.parametrize("biases", [False, True], ids=["adapter only", "and biases"])
def test_a_step_does_what_a_loop_of_optax_does(kind, biases):
    params, adapter = KINDS[kind][1], start(kind)
    before = by_position(params)
    expected, losses = plain_loop(factors_of(adapter), 8.0, biases)
    tx = jp.masked(optax.adam(RATE), with_biases if biases else jp.adapter_only)
    state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert numbers == 2 * (8 + 16 + 16 + 8) + biases * (16 + 8)
    assert moments == 2 * numbers + 1  # and the count of steps: frozen leaves have none
    step = jp.make_train_step(loss_of(kind), tx)
    for value in losses:
        state, metrics = step(state, params, X)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for ours, theirs in zip(factors_of(state.adapter), expected["factors"], strict=True):
        for name in "ab":
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    trained = state.base(params)
    assert same_kind(trained, params)
    assert state.adapter.spec == adapter.spec
    for path, leaf in named_leaves(trained).items():
        moved = bool((leaf != named_leaves(params)[path]).any())
        assert moved == (biases and path.endswith("bias"))
    for ours, theirs in zip(by_position(params), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_kind
def test_a_fixed_tree_of_labels_is_taken_too(kind):
    params, adapter = KINDS[kind][1], start(kind)
    labels = with_biases({"base": params, "adapter": adapter.params})
    assert same_kind(labels["base"], jax.tree.map(lambda leaf: True, params))
    tx = jp.masked(optax.adam(RATE), labels)
    state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(state.trained["base"])] == [(16,), (8,)]


@every_kind
def test_gradients_of_single_examples_are_those_of_one_after_the_other(kind):
    params, adapter = KINDS[kind][1], start(kind)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapter.params)

    def loss(tree, x):
        return loss_of(kind)(params, adapter.replace(params=tree), x[None], None)

    together = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(moved, X)
    assert same_kind(together, adapter.params)
    for row, x in enumerate(X):
        alone = jax.grad(loss)(moved, x)
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[row], theirs, rtol=1e-5, atol=1e-6)


@every_kind
def test_the_work_of_an_adapted_model_is_the_base_s_and_the_factors(kind):
    function, params = KINDS[kind]
    rows, base = len(X), 2 * 2 * len(X) * 8 * 16
    assert jp.count_flops(function, params, X) == base
    adapter = start(kind)
    factors = 2 * rows * 2 * (8 + 16 + 16 + 8)
    count = jp.count_flops(lambda *args: lifted(kind, *args), params, adapter, X)
    assert count == base + factors


@every_kind
@pytest.mark.parametrize("with_roles", [False, True])
def test_parameters_are_placed_and_stay_the_same_tree(kind, with_roles):
    function, params = KINDS[kind]
    mesh = jp.make_mesh(data=2, fsdp=2, tensor=2)
    roles = jp.describe(function, params, X) if with_roles else None
    placed = jp.shard_params(params, mesh, roles)
    assert same_kind(placed, params)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    for path, leaf in named_leaves(placed).items():
        kernel = PartitionSpec("fsdp", "tensor") if with_roles else PartitionSpec(None, "fsdp")
        expected = kernel if path.endswith("kernel") else PartitionSpec()
        assert leaf.sharding.spec == expected, path


def test_a_frozen_dict_stays_one_in_the_state():
    params = KINDS["FrozenDict"][1]
    state = jp.init_train_state(
        params, start("FrozenDict"), jp.masked(optax.sgd(0.1), with_biases), jax.random.key(0)
    )
    assert type(state.trained["base"]) is FrozenDict
