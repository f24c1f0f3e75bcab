"""Attention in tiles: values and gradients of the formula in float64, and what is not visited."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import draw, formula, rows_of, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.core import backend
from jaxpeft.core.flops import count_flops
from jaxpeft.mesh.layouts import make_mesh
from jaxpeft.models.attention import Prefix, attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
BLOCK = backend.CPU.tile


def inputs(batch, seq):
    shapes = ((HEADS, 0), (KV_HEADS, 1), (KV_HEADS, 2), (HEADS, 3))
    return [draw((batch, seq, heads, HEAD_DIM), seed) for heads, seed in shapes]


def places(ids, positions):
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    there = {"q_positions": positions, "k_positions": positions}
    return {**there, "q_segments": ids, "k_segments": ids}


def value_and_grads(q, k, v, slope, block=8, **rest):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, block=block, **rest), q, k, v)
    return out, *back(slope)


run = jax.jit(value_and_grads, static_argnames="block")


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=2, max_size=2),
    window=st.sampled_from([None, 0, 1, 7, 30]),
)
def test_packed_rows_have_the_values_and_gradients_of_the_formula(lengths, window):
    ids, positions = rows_of(lengths, 44)
    q, k, v, slope = inputs(2, 44)
    given_window = None if window is None else jnp.int32(window)
    actual = run(q, k, v, slope, **places(ids, positions), window=given_window)
    expected = formula(q, k, v, seen(positions, ids, window), slope)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [None, (True, False)])
@pytest.mark.parametrize("window", [None, 9])
def test_a_prefix_is_seen_by_every_segment_and_gets_gradients(used, window):
    ahead, seq = 5, 36
    ids, positions = rows_of([[20, 11], [36]], seq, ahead)
    q, k, v, slope = inputs(2, seq)
    first_k, first_v = (draw((ahead, KV_HEADS, HEAD_DIM), seed) for seed in (4, 5))
    flags = None if used is None else jnp.array(used)
    given_window = None if window is None else jnp.int32(window)

    def value(q, k, v, first_k, first_v):
        prefix = Prefix(first_k, first_v, flags)
        there = places(ids, positions)
        return attention(q, k, v, **there, window=given_window, prefix=prefix, block=8)

    out, back = jax.vjp(value, q, k, v, first_k, first_v)
    dq, dk, dv, *of_prefix = back(slope)
    mask = seen(positions, ids, window, ahead, used)
    wide = [
        np.concatenate([np.broadcast_to(first, (2, *first.shape)), x], axis=1)
        for first, x in ((first_k, k), (first_v, v))
    ]
    expected_out, expected_dq, wide_dk, wide_dv = formula(q, *wide, mask, slope)
    expected = [expected_out, expected_dq, wide_dk[:, ahead:], wide_dv[:, ahead:]]
    expected += [x[:, :ahead].sum(axis=0) for x in (wide_dk, wide_dv)]
    for one, other in zip((out, dq, dk, dv, *of_prefix), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_tiles_that_no_query_sees_are_not_visited():
    """Numbers that are none would spread through a product with them, even by a weight of 0."""
    ids, positions = rows_of([[16, 16, 16], [16, 16, 16]], 48)
    q, k, v, slope = inputs(2, 48)
    clean = run(q, k, v, slope, **places(ids, positions))
    k[:, :16], v[:, :16] = np.nan, np.nan
    for one, other in zip(run(q, k, v, slope, **places(ids, positions)), clean, strict=True):
        np.testing.assert_array_equal(one[:, 16:], other[:, 16:])
    window = jnp.int32(8)  # of one segment; the blocks' nearest pair is 9 apart, two blocks on
    ids, positions = rows_of([[48], [48]], 48)
    out, *_ = run(q, k, v, slope, **places(ids, positions), window=window)
    assert np.isnan(out[:, 16:24]).all()
    assert np.isfinite(out[:, 24:]).all()


def test_a_row_with_nothing_to_see_is_zero_and_has_zero_gradients():
    ids, positions = rows_of([[], [20]], 20)
    for x in run(*inputs(2, 20), **places(ids, positions)):
        assert not np.asarray(x[0]).any()
        assert np.isfinite(x).all()


def test_vmapped_attention_is_each_one_s():
    ids, positions = rows_of([[30], [9, 11, 12]], 32)
    stacked = [np.stack([x, 2 * x]) for x in inputs(2, 32)]
    together = jax.jit(jax.vmap(lambda *a: value_and_grads(*a, **places(ids, positions))))(*stacked)
    for n in (0, 1):
        alone = run(*(x[n] for x in stacked), **places(ids, positions))
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one[n], other, rtol=2e-5, atol=2e-5)


def test_a_cache_s_empty_slots_and_other_rows_prompts_do_not_count():
    """A prompt of 20 is read into 40 slots that hold 10 older ones, at other places by row."""
    ids, positions = rows_of([[30], [24]], 40)
    ids[1] = np.roll(ids[1], 6)
    positions[1] = np.roll(positions[1], 6)
    q, k, v, slope = inputs(2, 40)
    now = slice(10, 30)
    out = jax.jit(functools.partial(attention, block=8))(
        jnp.asarray(q[:, now]),
        jnp.asarray(k),
        jnp.asarray(v),
        q_positions=jnp.asarray(positions[:, now]),
        k_positions=jnp.asarray(positions),
        q_segments=jnp.asarray(ids[:, now]),
        k_segments=jnp.asarray(ids),
    )
    mask = seen(positions, ids, None)[:, now]
    expected, *_ = formula(q[:, now], k, v, mask, slope[:, now])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_both_passes_count_the_tiles_of_a_whole_row():
    """Two products forward, five backward, for each of the 10 tiles up to the diagonal."""
    seq = 4 * BLOCK
    ids, positions = rows_of([[seq]], seq)
    tile = 2 * HEADS * HEAD_DIM * BLOCK**2
    function = functools.partial(value_and_grads, block=BLOCK)
    counted = count_flops(function, *inputs(1, seq), **places(ids, positions))
    assert counted == 10 * (2 + 5) * tile


def test_a_negative_segment_is_one_like_others():
    ids, positions = rows_of([[8, 12, 20], [40]], 40)
    ids[0] = np.where(ids[0] == 2, -1, ids[0])
    q, k, v, slope = inputs(2, 40)
    actual = run(q, k, v, slope, **places(ids, positions))
    for one, other in zip(actual, formula(q, k, v, seen(positions, ids, None), slope), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [20, 44])
def test_where_positions_go_back_later_slots_stay_unseen(seq):
    """One product, tiles of 8 and of 16: all see earlier slots of earlier positions alone."""
    ids = np.ones((1, seq), np.int32)
    positions = np.arange(seq, dtype=np.int32)[None] % (seq // 2)
    q, k, v, slope = inputs(1, seq)
    mask = seen(positions, ids, None) & np.tri(seq, dtype=bool)
    for block in (8, 16, 128):
        actual = run(q, k, v, slope, block=block, **places(ids, positions))
        for one, other in zip(actual, formula(q, k, v, mask, slope), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([0, 1, 5, 30]), shared=st.booleans())
def test_tiles_equal_one_product_for_any_segments_and_prefixes(seed, window, shared):
    """Segments come in any order and interleaved, positions have gaps, some rows no prefix."""
    rng, seq, ahead = np.random.default_rng(seed), 44, 5
    ids = rng.integers(-1, 3, (2, seq)).astype(np.int32)
    steps = rng.integers(1, 4, (2, seq)).astype(np.int32)
    positions = ahead + np.cumsum(steps, axis=1, dtype=np.int32)
    size = (ahead, KV_HEADS, HEAD_DIM) if shared else (2, ahead, KV_HEADS, HEAD_DIM)
    firsts = [draw(size, seed + 1), draw(size, seed + 2)]
    used = jnp.asarray(rng.integers(0, 2, 2).astype(bool))
    arrays = [draw(x.shape, seed + n) for n, x in enumerate(inputs(2, seq), 3)]
    there = {**places(ids, positions), "window": jnp.int32(window)}
    tiled, one = (both_grads(block, *arrays, *firsts, used, there) for block in (8, 128))
    for x, y in zip(tiled, one, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def both_grads(block, q, k, v, slope, first_k, first_v, used, there):
    def value(q, k, v, first_k, first_v):
        prefix = Prefix(first_k, first_v, used)
        return attention(q, k, v, **there, prefix=prefix, block=block)

    out, back = jax.vjp(value, q, k, v, first_k, first_v)
    return out, *back(slope)


def test_bfloat16_has_the_gradients_of_the_formula_but_for_rounding():
    ids, positions = rows_of([[30], [9, 11, 12]], 32)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(2, 32)]
    actual = run(*arrays, **places(ids, positions))
    wide = [np.asarray(x, np.float32) for x in arrays]
    expected = formula(*wide[:3], seen(positions, ids, None), wide[3])
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2**-6, atol=2**-4)


def test_float64_switched_on_changes_no_dtype():
    with jax.enable_x64(True):
        ids, positions = rows_of([[20], [20]], 20)
        for dtype in (np.float32, np.float64):
            arrays = [x.astype(dtype) for x in inputs(2, 20)]
            for x in jax.jit(value_and_grads)(*arrays, **places(ids, positions)):
                assert x.dtype == dtype


@pytest.mark.parametrize("block", [8, 128])
def test_steep_slopes_of_queries_that_see_nothing_reach_nothing(block):
    ids, positions = rows_of([[], [14]], 20)
    *arrays, slope = inputs(2, 20)
    steep = np.where((ids == 0)[..., None, None], 1e6, slope).astype(np.float32)
    plain = run(*arrays, slope, block=block, **places(ids, positions))
    for x, y in zip(run(*arrays, steep, block=block, **places(ids, positions)), plain, strict=True):
        np.testing.assert_array_equal(x, y)


def test_rows_and_heads_on_several_devices_stay_there():
    """Equal to one device's; what travels between devices is no larger than the list of tiles."""
    seq = 3 * BLOCK
    ids, positions = rows_of([[200, 150], [384], [9] * 40, [100, 100]], seq)
    arrays = inputs(4, seq)
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    whole = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    there = jax.device_put(places(ids, positions), rows)
    spread = jax.device_put(tuple(arrays), whole)
    function = functools.partial(value_and_grads, block=BLOCK)
    compiled = jax.jit(function, out_shardings=whole).lower(*spread, **there).compile()
    alone = run(*arrays, block=BLOCK, **places(ids, positions))
    for one, other in zip(compiled(*spread, **there), alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    lines = re.findall(r"= (.*?) (?:all|collective|reduce-scatter)[-\w]*\(", compiled.as_text())
    shapes = [shape.split(",") for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    assert shapes
    assert all(math.prod(map(int, shape)) <= 9 for shape in shapes)
