"""Several adapters trained at once against one base, equal to training each alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, decoder, make_batch

import jaxpeft as jp
from jaxpeft.methods.algebra.stacking import pad_rank
from jaxpeft.methods.lora.config import LoRA

RATES, RANKS = (1e-2, 3e-3, 2e-2), (1, 3, 2)


def setup(width=3, config=CONFIG):
    """One base, a step, and a state for each rank, padded to `width` unless it is None."""
    module, base = decoder(config)
    tx = jp.masked(optax.inject_hyperparams(optax.adam)(1e-3), jp.adapter_only)
    step = jp.make_train_step(jp.make_lm_loss(module, head_frozen=True), tx)
    states = []
    for rank, rate in zip(RANKS, RATES, strict=True):
        adapter = jp.init_adapter(LoRA(rank=rank, alpha=4.0), base, jax.random.key(rank))
        adapter = adapter if width is None else pad_rank(adapter, width)
        state = jp.init_train_state(base, adapter, tx, jax.random.key(0))
        opt_state = optax.tree.set(state.opt_state, learning_rate=jnp.float32(rate))
        states.append(state.replace(opt_state=opt_state))
    return base, step, states


def stack(states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@pytest.mark.slow
def test_training_several_at_once_equals_training_each_alone():
    base, step, states = setup()
    batches = [make_batch(2, 6, seed=seed) for seed in range(3)]
    together = stack(states)
    several = jax.jit(jax.vmap(step, in_axes=(0, None, None)))
    for batch in batches:
        together, _ = several(together, base, batch)
    for i, state in enumerate(setup(None)[2]):  # as narrow as it is
        for batch in batches:
            state, _ = step(state, base, batch)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5),
            one.adapter.params,
            pad_rank(state.adapter, 3).params,
        )


@pytest.mark.slow
def test_several_at_once_hold_one_copy_of_the_base():
    large = dataclasses.replace(CONFIG, d_model=128, d_ff=512)
    base, step, states = setup(config=large)
    several = jax.jit(jax.vmap(step, in_axes=(0, None, None)))
    batch = make_batch(2, 6)

    @functools.cache
    def memory(count):
        return several.lower(stack(states[:1] * count), base, batch).compile().memory_analysis()

    def argument_bytes(count):
        return memory(count).argument_size_in_bytes

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    state = size(states[0].replace(key=jax.random.key_data(states[0].key)))
    assert abs(argument_bytes(5) - argument_bytes(1) - 4 * state) < 1024
    assert argument_bytes(5) < size(base) + 5 * state + 8192
    more = memory(5).temp_size_in_bytes - memory(1).temp_size_in_bytes
    assert more < 4 * size(base) / 2  # gradients and activations of four, not four bases


def test_the_work_of_a_mixed_training_step_does_not_grow_with_the_adapters_stored():
    module, base = decoder()

    def flops(count):
        one = jp.init_adapter(LoRA(rank=2, alpha=4.0), base, jax.random.key(0))
        stacked, index = jp.stack_adapters([one] * count), jnp.array([0, 1])

        def loss(params, batch):
            variables = jp.bind(base, stacked.replace(params=params), index=index)
            return module.apply(variables, batch["tokens"]).mean()

        return jp.count_flops(jax.grad(loss), stacked.params, make_batch(2, 6))

    assert flops(64) == flops(2)
