"""Attention against the softmax formula, query by query, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.core import backend
from jaxpeft.models.attention import attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
BLOCK = backend.CPU.tile


def reference(q, k, v, qp, kp, qs, ks, window):
    """The formula with loops over rows, heads and queries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        kv = h // (q.shape[2] // k.shape[2])
        seen = (qs[b, i] == ks[b]) & (kp[b] <= qp[b, i]) & (qs[b, i] != 0)
        if not seen.any():
            continue
        if window:
            seen &= qp[b, i] - kp[b] < window
        scores = k[b, seen, kv] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = (weights / weights.sum()) @ v[b, seen, kv]
    return out


def make_inputs(seq, segments=None, seed=0, dtype=np.float32):
    """Two rows; each is cut into `segments` of these lengths, the rest is padding."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, seq, HEADS, HEAD_DIM), np.float32).astype(dtype)
    k = rng.standard_normal((2, seq, KV_HEADS, HEAD_DIM), np.float32).astype(dtype)
    v = rng.standard_normal((2, seq, KV_HEADS, HEAD_DIM), np.float32).astype(dtype)
    ids, positions = np.zeros((2, seq), np.int32), np.tile(np.arange(seq, dtype=np.int32), (2, 1))
    for row, lengths in enumerate(segments or ([seq], [seq])):
        start = 0
        for number, length in enumerate(lengths, 1):
            ids[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return q, k, v, positions, ids


def call(q, k, v, positions, ids, window=None, block=None):
    there = {"q_positions": positions, "k_positions": positions}
    segments = {"q_segments": ids, "k_segments": ids}
    return attention(q, k, v, **there, **segments, window=window, block=block)


run = jax.jit(call)


@pytest.mark.parametrize("window", [None, 0, 1, 3, 100])
def test_packed_rows_and_windows_equal_the_formula(window):
    q, k, v, positions, ids = make_inputs(12, ([5, 4], [1, 10]))
    given = None if window is None else jnp.int32(window)
    actual = run(q, k, v, positions, ids, given)
    expected = reference(q, k, v, positions, positions, ids, ids, window)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [127, 128, 129, 300])
def test_long_rows_equal_the_formula_on_both_sides_of_a_block(seq):
    q, k, v, positions, ids = make_inputs(seq, ([seq], [seq // 3, seq // 2]))
    actual = run(q, k, v, positions, ids, jnp.int32(70))
    expected = reference(q, k, v, positions, positions, ids, ids, 70)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_equal_finite_differences_of_the_formula(window):
    q, k, v, positions, ids = make_inputs(10, ([6, 3], [10]))
    rng = np.random.default_rng(1)
    probe = rng.standard_normal(q.shape)
    given = None if window is None else jnp.int32(window)

    def value(q, k, v):
        out = call(q, k, v, jnp.asarray(positions), jnp.asarray(ids), given, block=8)
        return (out * jnp.asarray(probe, jnp.float32)).sum()

    actual = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)
    for which, gradient in enumerate(actual):
        direction, step = rng.standard_normal(gradient.shape), 1e-5
        values = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (q, k, v)]
            moved[which] += sign * step * direction
            out = reference(*moved, positions, positions, ids, ids, window)
            values.append((out * probe).sum())
        slope = (values[0] - values[1]) / (2 * step)
        assert (np.asarray(gradient) * direction).sum() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_slots_of_a_cache_are_masked_by_their_own_positions():
    """Two new tokens read a cache whose rows hold prompts of different lengths, padded."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 2, HEADS, HEAD_DIM), np.float32)
    k, v = (rng.standard_normal((2, 9, KV_HEADS, HEAD_DIM), np.float32) for _ in range(2))
    ks = np.array([[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0, 0]], np.int32)
    kp = np.array([[0, 1, 2, 3, 4, 5, 6, 0, 0], [0, 1, 0, 0, 0, 2, 3, 0, 0]], np.int32)
    qp, qs = np.array([[5, 6], [2, 3]], np.int32), np.ones((2, 2), np.int32)
    there = {"q_positions": qp, "k_positions": kp, "q_segments": qs, "k_segments": ks}
    actual = jax.jit(attention)(q, k, v, **there)
    np.testing.assert_allclose(
        actual, reference(q, k, v, qp, kp, qs, ks, None), rtol=1e-5, atol=1e-5
    )


def test_padding_reaches_no_other_token():
    q, k, v, positions, ids = make_inputs(8, ([5], [3, 3]))
    before = np.asarray(run(q, k, v, positions, ids))
    changed = [np.where((ids == 0)[..., None, None], 1e4, x).astype(np.float32) for x in (q, k, v)]
    after = np.asarray(run(*changed, positions, ids))
    np.testing.assert_array_equal(before[ids > 0], after[ids > 0])
    assert np.isfinite(after).all()


@pytest.mark.parametrize("seq", [64, 300])
def test_bfloat16_inputs_are_summed_in_float32(seq):
    q, k, v, positions, ids = make_inputs(seq, dtype=jnp.bfloat16)
    actual = run(q, k, v, positions, ids)
    assert actual.dtype == jnp.bfloat16
    expected = reference(q, k, v, positions, positions, ids, ids, None)
    # One rounding of the weights and one of the result, each of at most 2^-9 relative.
    np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64), expected, rtol=2**-7, atol=2**-7
    )


def test_later_keys_are_not_even_multiplied():
    """Blocks of queries end where they end: products shrink towards half of the full square."""
    from jaxpeft.core.flops import count_flops

    q, k, v, positions, ids = make_inputs(8 * BLOCK)
    full = 4 * 2 * HEADS * HEAD_DIM * q.shape[1] ** 2
    assert count_flops(run, q, k, v, positions, ids) == pytest.approx(full * (8 + 1) / 16)
