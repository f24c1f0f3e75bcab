"""An NNX model that is lifted and trained on eight devices learns what one device learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign_models import MODELS, ROLES, start
from mesh_run import mesh_of

import jaxpeft as jp
from jaxpeft.lifting.trees import map_named, named_leaves
from jaxpeft.mesh import placement
from jaxpeft.methods.registry import KINDS

FUNCTION, PARAMS, _, (REST, _) = MODELS["nnx"]
STEPS, ROWS = 5, 16
RNG = np.random.default_rng(2)
BATCHES = [
    {
        "x": RNG.standard_normal((ROWS, 5, 4)).astype(np.float32),
        "y": RNG.standard_normal((ROWS, 5, 2, 4)).astype(np.float32),
    }
    for _ in range(STEPS)
]
TX = jp.masked(
    optax.adamw(0.02),
    lambda tree: {
        "base": map_named(lambda path, leaf: path == "last/bias", tree["base"]),
        "adapter": jax.tree.map(lambda leaf: True, tree["adapter"]),
    },
)


def loss(params, adapter, batch, key):
    del key
    out = jp.lift(FUNCTION)(jp.bind(params, adapter), REST, batch["x"])
    return jnp.square(out - batch["y"]).sum(), {"weight": jnp.float32(out.size)}


def train(mesh=None, roles=None, microbatches=1, placed=False):
    """Losses, and the leaves after training."""
    params, adapter, shardings = PARAMS, start("nnx", "lora"), None
    if mesh is not None:
        params = jp.shard_params(PARAMS, mesh, roles)
    state = jp.init_train_state(params, adapter, TX, jax.random.key(0))
    if placed:
        shardings = placement.state_shardings(state, mesh, KINDS[adapter.spec.kind].arrays)
        state = jax.device_put(state, shardings)
    step = jp.make_train_step(loss, TX, microbatches=microbatches, state_shardings=shardings)
    losses = []
    for batch in BATCHES:
        batch = batch if mesh is None else placement.put_batch(batch, mesh, ROWS)
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("placed", [False, True], ids=["state anywhere", "state placed"])
@pytest.mark.parametrize(
    ("sizes", "with_roles"),
    [
        ({"data": 8}, False),
        ({"fsdp": 8}, False),
        ({"data": 2, "fsdp": 4}, True),
        ({"data": 2, "fsdp": 2, "tensor": 2}, True),
    ],
    ids=str,
)
def test_eight_devices_learn_what_one_learns(sizes, with_roles, placed):
    expected, alone = train()
    assert expected[-1] < 0.95 * expected[0]
    mesh = mesh_of(**sizes)
    roles = ROLES["nnx"] if with_roles else None
    losses, state = train(mesh, roles, placed=placed, microbatches=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    theirs = named_leaves(alone.trained)
    for path, leaf in named_leaves(state.trained).items():
        assert len(leaf.sharding.device_set) == 8
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_weights_are_really_spread():
    placed = named_leaves(jp.shard_params(PARAMS, mesh_of(data=2, fsdp=4), ROLES["nnx"]))
    kernel = placed["attention/query/kernel"]
    assert kernel.shape == (8, 2, 4)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2, 4)}
