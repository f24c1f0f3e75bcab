"""Which trained leaves, layers and places no gradient reaches, by a loss that reads chosen ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mesh_run import make_run, mesh_of
from tiny_decoder import decoder, make_adapter

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.updates.optimizers import masked
from jaxpeft.updates.reached import Reached
from jaxpeft.updates.step import adapter_only, init_train_state, make_train_step

LORA = jp.LoRA(rank=2, targets=("v_proj", "layers.1.mlp.down_proj"))
V, DOWN = "layers/self_attn/v_proj/kernel", "layers/mlp/down_proj/kernel"
EVERY = {f"{place}/{name}": (0, 1) for place in (V, DOWN) for name in "ab"}
LAYER_0 = dict.fromkeys(EVERY, (0,)) | {f"{DOWN}/{name}": (1,) for name in "ab"}
FROM_START, FROM_HERE = "of the run: ", "of this start: "


def judge(used, steps=5, first=0, method=LORA, trainable=adapter_only, **options):
    """What is told after some steps with a loss that reads only these layers of these leaves."""

    def loss(params, adapter, batch, key):
        del params, key
        leaves = paths.flatten(adapter.params)
        return sum(leaves[path][layer].sum() for path in used for layer in used[path]) * batch.sum()

    tx = masked(optax.sgd(0.1), trainable)
    state = init_train_state(decoder()[1], make_adapter(method), tx, jax.random.key(0))
    step = make_train_step(loss, tx, watch_gradients=True, **options)
    reached, notes = Reached(state, first), []
    for index in range(steps):
        state, metrics = step(state, decoder()[1], jnp.ones(4))
        if not reached.judged:
            notes.append(reached.add(metrics["reached"], last=index == steps - 1))
    assert not any(notes[:-1])
    return notes[-1]


@pytest.mark.parametrize(
    ("used", "names"),
    [
        ({path: EVERY[path] for path in EVERY if V in path}, f"{DOWN} (a, b)"),
        ({path: EVERY[path] for path in EVERY if DOWN in path}, f"{V} (a, b)"),
        (LAYER_0, "model.layers.1.self_attn.v_proj (a, b)"),
        ({path: EVERY[path] for path in EVERY if path != f"{V}/a"}, f"{V} (a)"),
        ({f"{V}/a": (0,), f"{V}/b": (1,)}, f"{DOWN} (a, b)"),
        ({f"{V}/b": (0, 1)}, f"{DOWN} (a, b), {V} (a)"),
        ({f"{V}/b": (0,)}, f"{DOWN} (a, b), model.layers.1.self_attn.v_proj (a, b), {V} (a)"),
    ],
)
def test_what_the_loss_does_not_read_is_named(used, names):
    note = judge(used)
    assert f"no gradient reached {names} in the first 5 steps {FROM_START}" in note
    assert note.endswith("leave them out of method.targets or optim.trainable")


def test_layers_that_are_not_adapted_and_padding_are_no_fault():
    assert judge(EVERY) is None
    assert judge({path: EVERY[path] if V in path else (1,) for path in EVERY}) is None


def test_leaves_that_are_not_trained_are_no_fault():
    def only_b(tree):
        on = {path: path.endswith("/b") for path in paths.flatten(tree["adapter"])}
        return {**adapter_only(tree), "adapter": paths.unflatten(on)}

    assert (
        judge({path: EVERY[path] for path in EVERY if path.endswith("b")}, trainable=only_b) is None
    )


def test_a_trained_leaf_of_the_base_is_named():
    def and_norm(tree):
        labels = adapter_only(tree)
        return {**labels, "base": paths.put(labels["base"], {"norm/scale": True})}

    assert "no gradient reached norm/scale in the first" in judge(EVERY, trainable=and_norm)


@pytest.mark.parametrize(("steps", "told"), [(1, False), (2, False), (3, True), (7, True)])
def test_a_short_run_is_judged_at_its_end_but_not_by_one_or_two_steps(steps, told):
    note = judge({f"{V}/a": (0, 1)}, steps)
    assert (f"in the first {min(steps, 5)} steps" in (note or "")) == told


def test_single_leaves_of_a_run_that_goes_on_are_not_judged():
    kept = {path: EVERY[path] for path in EVERY if path != f"{V}/a"}
    assert judge(kept, first=20) is None
    note = judge({path: EVERY[path] for path in EVERY if V in path}, first=20)
    assert f"{DOWN} (a, b) in the first 5 steps {FROM_HERE}" in note


def test_parts_of_a_batch_count_together():
    tell = {f"{V}/{name}": (0, 1) for name in "ab"}
    assert judge(tell, microbatches=2) == judge(tell)


def test_the_step_of_the_public_function_has_no_flags():
    tx = masked(optax.sgd(0.1), adapter_only)
    state = init_train_state(decoder()[1], make_adapter(LORA), tx, jax.random.key(0))

    def loss(params, adapter, batch, key):
        del params, key
        return paths.get(adapter.params, f"{V}/a").sum() * batch.sum()

    _, metrics = jax.eval_shape(make_train_step(loss, tx), state, decoder()[1], jnp.ones(4))
    assert set(metrics) == {"loss", "grad_norm", "weight", "skipped", "skipped_in_a_row"}


def blocked(mesh):
    """A run whose base lets no gradient through to the queries and values of its last layer."""
    run = make_run("lora", mesh, method=jp.LoRA(rank=4, targets=("q_proj", "v_proj", "up_proj")))
    path = "layers/self_attn/o_proj/kernel"
    kernel = run.base.params["layers"]["self_attn"]["o_proj"]["kernel"]
    closed = jax.device_put(np.asarray(kernel) * np.array([1, 0])[:, None, None], kernel.sharding)
    run.base = run.base.replace(params=paths.put(run.base.params, {path: closed.astype("float32")}))
    return run


@pytest.fixture
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compiles")
def test_a_mesh_tells_what_one_device_tells():
    notes = []
    for mesh in (mesh_of(), mesh_of(2, 2, 2)):
        run = blocked(mesh)
        step, reached = run.compile_step(), Reached(run.state, 0)
        for index in range(5):
            batch = run.put(run.rows.plan.batch(index))
            run.state, metrics = step(run.state, run.base.params, batch)
            assert metrics["reached"].sharding.is_fully_replicated
            notes.append(reached.add(metrics["reached"], last=False))
    names = ", ".join(f"model.layers.1.self_attn.{name} (a, b)" for name in ("q_proj", "v_proj"))
    assert notes[4] == notes[9]
    assert f"no gradient reached {names} in the first 5 steps of the run: " in notes[4]
    assert notes[:4] == notes[5:9] == [None] * 4
