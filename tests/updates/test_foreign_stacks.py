"""Optimizers, schedules and checks on stacks of other models: called anything, on any axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign_models import MODELS, ROLES, moved, start

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.lifting.trees import named_leaves
from jaxpeft.methods.adalora.schedule import Schedule, allocate_ranks
from jaxpeft.methods.registry import KINDS
from jaxpeft.methods.summary import count_parameters, count_trainable, describe_adapter
from jaxpeft.updates.lora_rules import lora_plus_groups, without_a
from jaxpeft.updates.reached import Reached

DEPTH, EXPERTS, WIDTH = 3, 2, 8
ALL = {"targets": "all-linear"}


def stacked(params, x):
    """Layers on the second axis and experts on the third, under names of no library."""
    w, v = (jnp.moveaxis(params["tower"][name], (1, 2), (0, 1)) for name in ("w", "v"))

    def step(x, pair):
        each = jnp.broadcast_to(x, (EXPERTS, *x.shape))  # every expert sees every row
        each = jnp.tanh(jnp.einsum("ebd,edf->ebf", each, pair[0]))
        return jnp.einsum("ebf,efd->ebd", each, pair[1]).sum(0), None

    return jax.lax.scan(step, x, (w, v))[0]


def apart(params, x):
    """The same with every kernel alone, in a list called layers."""
    for layer in params["layers"]:
        x = sum(jnp.tanh(x @ one["w"]) @ one["v"] for one in layer)
    return x


def both_trees():
    rng = np.random.default_rng(0)
    w, v = (
        jnp.asarray(0.4 * rng.standard_normal((WIDTH, DEPTH, EXPERTS, WIDTH)), jnp.float32)
        for _ in "wv"
    )
    each = [
        [{"w": w[:, layer, expert], "v": v[:, layer, expert]} for expert in range(EXPERTS)]
        for layer in range(DEPTH)
    ]
    return {"tower": {"w": w, "v": v}}, {"layers": each}


TOWER, LAYERS = both_trees()
X = jnp.asarray(np.random.default_rng(1).standard_normal((5, WIDTH)), jnp.float32)
TOWER_ROLES, LAYERS_ROLES = jp.describe(stacked, TOWER, X), jp.describe(apart, LAYERS, X)


def both_adapters(method):
    """The same adapter, for the stacked kernels and for those alone."""
    one = jp.init_adapter(method, TOWER, jax.random.key(0), roles=TOWER_ROLES)
    other = jp.init_adapter(method, LAYERS, jax.random.key(0), roles=LAYERS_ROLES)
    values = {
        path: paths.get(one.params, f"tower/{name}/{array}")[int(layer), int(expert)]
        for path in paths.flatten(other.params)
        for _, layer, expert, name, array in [path.split("/")]
    }
    return one, dataclasses.replace(other, params=paths.unflatten(values))


def trained(method, tx, steps, trainable=jp.adapter_only):
    """Both adapters after some steps, the second one's arrays stacked like those of the first."""
    out = []
    for function, params, adapter in zip(
        (stacked, apart), (TOWER, LAYERS), both_adapters(method), strict=True
    ):

        def loss(params, adapter, batch, key, function=function):
            del key
            y = jp.lift(function)(jp.bind(params, adapter)["params"], batch)
            return jnp.square(y - 1.0).mean()

        wrapped = jp.masked(tx, trainable)
        state = jp.init_train_state(params, adapter, wrapped, jax.random.key(0))
        step = jp.make_train_step(loss, wrapped)
        for _ in range(steps):
            state, metrics = step(state, params, X)
        assert int(metrics["skipped"]) == 0
        out.append(paths.flatten(state.adapter.params))
    for path in out[0]:
        _, name, array = path.split("/")
        places = [
            [out[1][f"layers/{layer}/{expert}/{name}/{array}"] for expert in range(EXPERTS)]
            for layer in range(DEPTH)
        ]
        yield path, np.asarray(out[0][path]), np.asarray(places)


def optimizer(method, **changes):
    fixed = {"learning_rate": 0.02, "schedule": "constant", "clip_norm": None}
    return jp.make_optimizer(jp.OptimConfig(**fixed | changes), 20, method)


SGD = {"name": "sgd", "b1": 0.0}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (jp.LoRA(rank=2, **ALL), {}),
        (jp.LoRA(rank=2, dora=True, **ALL), {"lora_plus_ratio": 8.0, **SGD}),
    ],
    ids=str,
)
def test_a_stack_is_trained_like_its_kernels_alone(method, changes):
    for path, ours, alone in trained(method, optimizer(method, **changes), 6):
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-4, err_msg=path)


def test_adalora_chooses_among_all_kernels_of_a_stack_as_among_kernels_alone():
    method = jp.AdaLoRA(rank=1, initial_rank=3, every=2, final_steps=4, **ALL)
    left = 0
    for path, ours, alone in trained(
        method, optimizer(method, **SGD | {"learning_rate": 0.05}), 20
    ):
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-3, err_msg=path)
        if path.endswith("/e"):
            assert ours.shape == (DEPTH, EXPERTS, 3)
            np.testing.assert_array_equal(ours != 0, alone != 0)
            left += int((ours != 0).sum())
    assert left == method.rank * 2 * DEPTH * EXPERTS


def test_lora_fa_freezes_a_of_kernels_of_any_name_and_projects_b_of_every_one():
    method = jp.LoRA(rank=2, alpha=6.0, **ALL)

    def only_b(tree):
        labels = jp.adapter_only(tree)
        return {**labels, "adapter": without_a(labels["adapter"], KINDS["lora"])}

    before = both_adapters(method)[0]
    for path, ours, alone in trained(method, optimizer(method, lora_fa=True), 3, only_b):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-6)
        start_of = np.asarray(paths.get(before.params, path))
        assert bool((ours == start_of).all()) == path.endswith("/a")
    grads = {"base": None, "adapter": jax.tree.map(jnp.ones_like, before.params)}
    whole = {"base": TOWER, "adapter": before.params}
    config = jp.OptimConfig(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=None, lora_fa=True)
    tx = jp.make_optimizer(dataclasses.replace(config, schedule="constant"), 1, method)
    updates, _ = tx.update(grads, tx.init(whole), whole, whole=whole, buffers=before.buffers)
    a = np.asarray(paths.get(before.params, "tower/w/a"), np.float64)
    expected = -np.linalg.inv(np.swapaxes(a, -1, -2) @ a) @ np.ones((2, WIDTH)) / 3.0**2
    actual = paths.get(updates["adapter"], "tower/w/b")
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.parametrize("model", ["unrolled", "scanned", "linen", "nnx"])
def test_groups_of_lora_plus_do_not_depend_on_the_stack(model):
    adapter = start(model, "dora")
    groups = lora_plus_groups({"base": {}, "adapter": adapter.params}, KINDS["lora"].arrays)
    expected = {"a": "a", "b": "b", "m": "b"}
    for path, group in paths.flatten(groups["adapter"]).items():
        assert group == expected[path.rpartition("/")[2]], path


def test_a_table_of_any_name_learns_as_tables_do():
    """Its A starts at zero: LoRA-FA trains it, and LoRA+ gives both factors their own rate."""
    params = {"wte": jnp.ones((6, 4)), "w": jnp.ones((4, 4))}
    ids = jnp.array([1, 2])
    roles = jp.describe(lambda p, ids: p["wte"][ids] @ p["w"], params, ids)
    method = jp.LoRA(rank=2, targets=("wte", "w"))
    adapter = jp.init_adapter(method, params, jax.random.key(0), roles=roles)
    on = jax.tree.map(lambda leaf: True, adapter.params)
    kept = paths.flatten(without_a(on, KINDS["lora"], adapter.spec))
    assert kept == {"wte/a": True, "wte/b": True, "w/a": False, "w/b": True}
    tree = {"base": {}, "adapter": adapter.params}
    groups = paths.flatten(lora_plus_groups(tree, KINDS["lora"].arrays, adapter.spec)["adapter"])
    assert groups == {"wte/a": "embedding", "wte/b": "embedding", "w/a": "a", "w/b": "b"}
    grads = {"base": {}, "adapter": jax.tree.map(jnp.ones_like, adapter.params)}
    tx = optimizer(method, lora_fa=True, **SGD | {"learning_rate": 1.0})
    known = {"whole": tree, "buffers": adapter.buffers, "spec": adapter.spec}
    updates = tx.update(grads, tx.init(tree), tree, **known)[0]["adapter"]
    np.testing.assert_array_equal(updates["wte"]["b"], -jnp.ones((2, 4)))
    assert (updates["w"]["b"] != -1).any()
    config = jp.OptimConfig(lora_plus_ratio=4.0, schedule="constant", clip_norm=None, **SGD)
    plus = jp.make_optimizer(config, 1, method, spec=adapter.spec)
    moves = plus.update(grads, plus.init(tree), tree)[0]["adapter"]
    np.testing.assert_allclose(moves["wte"]["b"], -1e-6, rtol=1e-5)
    np.testing.assert_allclose(moves["w"]["b"], -4.0 * 2e-4, rtol=1e-5)


def test_vectors_of_a_base_whose_layers_are_apart_are_fast():
    base = {"layers": [{"norm": {"scale": jnp.ones(4)}, "w": {"kernel": jnp.ones((4, 4))}}]}
    tree = {"base": base, "adapter": {"w": {"b": jnp.ones((2, 4))}}}
    groups = named_leaves(lora_plus_groups(tree, KINDS["lora"].arrays))
    assert groups["base/layers/0/norm/scale"] == "b"
    assert groups["base/layers/0/w/kernel"] == "a"


def test_names_are_not_asked_for_an_adapter_made_with_roles():
    schedule = Schedule(
        steps=2, rank=1, initial_steps=0, final_steps=0, every=1, beta1=0.5, beta2=0.5
    )
    adapter = both_adapters(jp.AdaLoRA(rank=2, **ALL))[0]
    tx = allocate_ranks(optax.sgd(0.1), schedule, lambda shapes: pytest.fail("asked"))
    grads = jax.tree.map(jnp.ones_like, adapter.params)
    known = {"buffers": adapter.buffers, "spec": adapter.spec}
    tx.update(grads, tx.init(adapter.params), adapter.params, **known)


def judged(model, params, adapter, used):
    """What is told after five steps with a loss that reads only some slices of some arrays."""

    def loss(params, adapter, batch, key):
        del params, key
        leaves = paths.flatten(adapter.params)
        return sum(leaves[path][at].sum() for path in used for at in used[path]) * batch

    tx = jp.masked(optax.sgd(0.1), jp.adapter_only)
    state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
    step, reached = jp.make_train_step(loss, tx, watch_gradients=True), Reached(state, 0)
    for index in range(5):
        state, metrics = step(state, params, jnp.ones(()))
        note = reached.add(metrics["reached"], last=index == 4)
    return note


def test_what_no_gradient_reaches_is_named_by_its_place_in_the_stack():
    adapter = both_adapters(jp.LoRA(rank=2, **ALL))[0]
    every = dict.fromkeys(paths.flatten(adapter.params), (...,))
    assert judged("tower", TOWER, adapter, every) is None
    some = every | dict.fromkeys(("tower/w/a", "tower/w/b"), ((0,), (2,), (1, 0)))
    note = judged("tower", TOWER, adapter, some)
    assert "no gradient reached tower/w [1, 1] (a, b) in the first 5 steps" in note
    assert "tower/v (a, b) in the" in judged(
        "tower", TOWER, adapter, {"tower/w/a": every["tower/w/a"], "tower/w/b": (...,)}
    )


def test_a_layer_of_a_list_is_one_place_though_the_list_is_called_layers():
    adapter = start("unrolled", "lora")
    every = dict.fromkeys(paths.flatten(adapter.params), (...,))
    part = {path: at for path, at in every.items() if not path.startswith("layers/1/query")}
    first_row = dict.fromkeys(every, (0,))  # of A's and B's rows one is enough
    params = MODELS["unrolled"][1]
    assert judged("unrolled", params, adapter, first_row) is None
    assert "reached layers/1/query/kernel (a, b) in" in judged("unrolled", params, adapter, part)


@pytest.mark.parametrize(
    ("model", "layers", "shape"),
    [
        ("scanned", {"blocks/query/kernel": "3/3", "blocks/out/kernel": "3/3"}, "8 x 8"),
        (
            "unrolled",
            {f"layers/{at}/{m}/kernel": "1/1" for at in (0, 1) for m in ("query", "out")},
            "8 x 8",
        ),
    ],
)
def test_the_table_of_an_adapter_counts_layers_by_its_axes(model, layers, shape):
    params, adapter = MODELS[model][1], moved(start(model, "lora"))
    rows = describe_adapter(params, adapter)
    assert {row.path: row.layers for row in rows} == layers
    assert {row.shape for row in rows} == {shape}
    numbers = sum(leaf.size for leaf in jax.tree.leaves(adapter.params))
    assert sum(row.trainable for row in rows) == count_trainable(adapter) == numbers


def test_the_table_reads_any_tree():
    params, adapter = MODELS["nnx"][1], start("nnx", "lora")
    rows = {row.path: row for row in describe_adapter(params, adapter)}
    assert rows["attention/query/kernel"].shape == "8 x 2 x 4"
    assert rows["first/kernel"][1:4] == ("1/1", "4 x 8", "3")
    assert count_parameters(params) == sum(np.prod(row.shape) for row in ROLES["nnx"].values())
