"""Checkpoints of runs whose base is any kind of tree: all bits come back, and training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import bits
from tree_kinds import KINDS, SIZES, lifted, same_kind, start

import jaxpeft as jp
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core.errors import CheckpointError
from jaxpeft.lifting.trees import map_named

X = jnp.asarray(np.random.default_rng(1).standard_normal((12, 4, SIZES[0])), jnp.float32)
METHOD = jp.LoRA(rank=2, targets="all-linear", dropout=0.25)
TX = jp.masked(
    optax.adamw(0.05),
    lambda tree: {
        "base": map_named(lambda path, leaf: path.endswith("bias"), tree["base"]),
        "adapter": jax.tree.map(lambda leaf: True, tree["adapter"]),
    },
)


def new_state(kind, method=METHOD):
    params = KINDS[kind][1]
    return jp.init_train_state(params, start(kind, method), TX, jax.random.key(7))


def make_step(kind):
    def loss(params, adapter, x, key):
        return jnp.square(lifted(kind, params, adapter, x, key)).mean()

    return jp.make_train_step(loss, TX)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_ends_in_the_same_bits(kind, tmp_path):
    params, step = KINDS[kind][1], make_step(kind)
    whole = new_state(kind)
    for x in X[:6]:
        whole, _ = step(whole, params, x)
    with Checkpoints(tmp_path / "run") as checkpoints:
        state = new_state(kind)
        for x in X[:3]:
            state, _ = step(state, params, x)
        checkpoints.save(3, state, meta={})
        checkpoints.wait()
        saved = bits(state)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 3
        state = checkpoints.restore(3, like=new_state(kind))
    assert bits(state) == saved
    assert same_kind(state, whole)
    assert same_kind(state.base(params), params)
    for x in X[3:6]:
        state, _ = step(state, params, x)
    assert bits(state) == bits(whole)


def test_a_checkpoint_is_of_one_adapter(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, new_state("list"), meta={})
        wider = new_state("list", jp.LoRA(rank=3, targets="all-linear"))
        with pytest.raises(CheckpointError, match=r"float32\[8,2\] in the checkpoint"):
            checkpoints.restore(1, like=wider)
