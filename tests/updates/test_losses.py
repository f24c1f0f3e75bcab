"""Chunked cross-entropy against float64 NumPy, its gradients, its memory, its cost on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_decoder import CONFIG, decoder, make_adapter, make_batch

from jaxpeft.core import backend
from jaxpeft.methods.binding import bind
from jaxpeft.ops.linear import attend
from jaxpeft.updates.losses import cross_entropy, make_lm_loss

D, VOCAB = 8, 20


def head(table, x):
    return attend(x, table)


def make_inputs(batch=3, seq=11, vocab=VOCAB, seed=0):
    """Weights are uneven: whole, half and none; one row has no supervised token."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((batch, seq, D), np.float32)
    table = rng.standard_normal((vocab, D), np.float32)
    targets = rng.integers(0, vocab, (batch, seq))
    weights = rng.choice(np.float32([0, 0, 1, 0.5]), (batch, seq))
    weights[-1] = 0
    return jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(targets), jnp.asarray(weights)


def reference(hidden, table, targets, weights):
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    top = logits.max(-1)
    total = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    weights = np.asarray(weights, np.float64)
    right = logits.argmax(-1) == np.asarray(targets)
    return (weights * (total - chosen)).sum(), weights.sum(), (weights * right).sum()


def naive(hidden, table, targets, weights):
    logits = hidden @ table.T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(weights * chosen).sum()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 9, 33, 512])
def test_sums_equal_float64_numpy_whatever_the_chunks(frozen, chunk_tokens):
    inputs = make_inputs()
    hidden, table, targets, weights = inputs

    def loss(hidden, table):
        return cross_entropy(
            hidden, head, table, targets, weights, head_frozen=frozen, chunk_tokens=chunk_tokens
        )

    expected, weight, correct = reference(*inputs)
    differentiated = jax.value_and_grad(loss, 0 if frozen else (0, 1), has_aux=True)
    for actual, aux in (jax.jit(loss)(hidden, table), jax.jit(differentiated)(hidden, table)[0]):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        assert float(aux["weight"]) == weight
        assert float(aux["correct"]) == correct


def test_gradients_with_a_frozen_head_equal_those_of_plain_autodiff():
    hidden, table, targets, weights = make_inputs()

    def fused(hidden):
        loss, _ = cross_entropy(
            hidden, head, table, targets, weights, head_frozen=True, chunk_tokens=9
        )
        return 0.7 * loss

    actual = jax.jit(jax.grad(fused))(hidden)
    expected = 0.7 * jax.jit(jax.grad(naive))(hidden, table, targets, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_with_a_trained_head_equal_those_of_plain_autodiff():
    hidden, table, targets, weights = make_inputs()

    def chunked(hidden, table):
        return cross_entropy(hidden, head, table, targets, weights, chunk_tokens=9)[0]

    actual = jax.jit(jax.grad(chunked, argnums=(0, 1)))(hidden, table)
    expected = jax.jit(jax.grad(naive, argnums=(0, 1)))(hidden, table, targets, weights)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_targets_and_hidden_states_that_do_not_count_may_be_anything(frozen):
    hidden, table, targets, weights = make_inputs()

    @jax.jit
    @jax.value_and_grad
    def run(hidden, targets):
        return cross_entropy(hidden, head, table, targets, weights, head_frozen=frozen)[0]

    expected, slope = run(hidden, targets)
    actual, other = run(hidden, jnp.where(weights == 0, -100, targets))
    assert actual == expected
    np.testing.assert_array_equal(other, slope)
    assert not slope[-1].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_without_supervised_tokens_are_skipped(frozen):
    """The supervised tokens of a row move to its front: two of eight chunks are worked on."""
    calls = []

    def counting(table, x):
        jax.debug.callback(lambda: calls.append(1))
        return x @ table.T

    hidden, table, targets, _ = make_inputs(batch=2, seq=32)
    weights = jnp.zeros((2, 32)).at[0, 20:27].set(1.0)

    def run(hidden, table):
        return cross_entropy(
            hidden, counting, table, targets, weights, head_frozen=frozen, chunk_tokens=8
        )[0]

    loss = run(hidden, table).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 2
    calls.clear()
    jax.block_until_ready(jax.grad(run, 0 if frozen else (0, 1))(hidden, table))
    jax.effects_barrier()
    assert len(calls) == 2
    np.testing.assert_allclose(loss, reference(hidden, table, targets, weights)[0], rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("seq", "chunk"), [(512, {"chunk_tokens": 64}), (4096, {})])
def test_memory_at_a_vocabulary_of_49152_is_far_below_the_logits(frozen, seq, chunk):
    rows, vocab, d = 4, 49152, 64
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, seq), jnp.int32)
    wrt = (0,) if frozen else (0, 1)

    def temporary_bytes(loss):
        function = jax.jit(jax.value_and_grad(loss, argnums=wrt))
        lowered = function.lower(f32((rows, seq, d)), f32((vocab, d)), targets, f32((rows, seq)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def chunked(hidden, table, targets, weights):
        return cross_entropy(hidden, head, table, targets, weights, head_frozen=frozen, **chunk)[0]

    logits_bytes = rows * seq * vocab * 4
    assert temporary_bytes(naive) >= logits_bytes  # the bound can fail
    # A few copies of one chunk's logits; a trained head adds its own gradient, twice.
    tokens = chunk.get("chunk_tokens", backend.CPU.loss_tokens)
    bound = 4 * tokens * vocab * 4 + (0 if frozen else 3 * vocab * d * 4) + 2 * rows * seq * d * 4
    assert temporary_bytes(chunked) < bound < logits_bytes / 4


def dot_flops(text):
    """FLOPs of the products in one device's program, each body counted once."""
    total = 0
    shapes = dict(re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text))
    product = r"= \w+\[([\d,]*)\]\S* dot\((?:\S+ )?%?([\w.-]+),.*lhs_contracting_dims=\{(\d+)\}"
    for out, left, contracted in re.findall(product, text):
        left = [int(n) for n in shapes[left].split(",")]
        total += 2 * np.prod([int(n) for n in out.split(",") if n]) * left[int(contracted)]
    return total


@pytest.mark.parametrize("frozen", [False, True])
def test_each_of_eight_devices_does_an_eighth_of_the_products(frozen):
    hidden, table, targets, weights = make_inputs(batch=16, seq=12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    wrt = (0,) if frozen else (0, 1)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=wrt)
    def run(hidden, table, targets, weights):
        return cross_entropy(
            hidden, head, table, targets, weights, head_frozen=frozen, chunk_tokens=64
        )[0]

    spread = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
    whole = jax.device_put(table, NamedSharding(mesh, PartitionSpec()))
    spread = (spread[0], whole, *spread[1:])
    one = run.lower(hidden, table, targets, weights).compile()
    many = run.lower(*spread).compile()
    assert dot_flops(many.as_text()) * 8 == dot_flops(one.as_text()) > 0
    assert "all-gather" not in many.as_text()
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5),
        many(*spread),
        one(hidden, table, targets, weights),
    )


def test_the_loss_of_a_decoder_is_that_of_its_logits():
    module, params = decoder()
    adapter, batch = make_adapter(trained=True), make_batch(3, 9)
    loss_fn = make_lm_loss(module, head_frozen=True)
    actual, aux = jax.jit(loss_fn)(params, adapter, batch)
    logits = jax.jit(module.apply)(bind(params, adapter), batch["tokens"])
    flat = np.asarray(logits, np.float64).reshape(-1, CONFIG.vocab_size)
    identity = np.eye(CONFIG.vocab_size)
    expected, weight, _ = reference(
        flat, identity, np.ravel(batch["targets"]), np.ravel(batch["weights"])
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert float(aux["weight"]) == weight == 8 + 7 + 6
