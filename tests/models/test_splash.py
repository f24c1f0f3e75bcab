"""The kernel for TPUs, interpreted: the formula's numbers; and what is lowered for a TPU."""

import functools
import importlib.util
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import draw, formula, rows_of, seen
from jax.extend import core as jex_core
from jax.sharding import NamedSharding, PartitionSpec
from mesh_run import make_run, mesh_of, train

from jaxpeft.core import backend
from jaxpeft.core.flops import count_flops
from jaxpeft.mesh import layouts, placement
from jaxpeft.mesh.constraints import traced_on
from jaxpeft.methods.registry import KINDS
from jaxpeft.models.attention import Prefix, attention
from jaxpeft.models.splash import splash_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
BLOCK = 128
KERNELS = ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals")


@pytest.fixture
def interpreted(monkeypatch):
    """Attention chooses the kernel on CPU, for rows of more than 8 tokens."""
    monkeypatch.setattr(backend, "CPU", backend.CPU._replace(splash=True, dense=8, tile=BLOCK))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def inputs(batch, seq, heads=HEADS, kv_heads=KV_HEADS):
    counts = enumerate((heads, kv_heads, kv_heads, heads))
    return [draw((batch, seq, count, HEAD_DIM), seed) for seed, count in counts]


def value_and_grads(function, q, k, v, slope):
    out, back = jax.vjp(function, q, k, v)
    return out, *back(slope)


def packed(lengths, seq):
    """Arguments of `attention` for packed rows, and their mask as a function of the window."""
    ids, positions = rows_of(lengths, seq)
    slots, segments = jnp.asarray(positions), jnp.asarray(ids)
    there = {"q_positions": slots, "k_positions": slots}
    there |= {"q_segments": segments, "k_segments": segments, "in_order": True}
    return there, functools.partial(seen, positions, ids)


def interpret(ids, **options):
    return functools.partial(
        splash_attention, segment_ids=jnp.asarray(ids), block=BLOCK, interpret=True, **options
    )


ROWS = ([130, 1, 60], [37, 100, 3, 110])


@pytest.mark.parametrize("windows", [(), (70, 1, 300)])
def test_packed_rows_have_the_values_and_gradients_of_the_formula(windows):
    """Of the tiles as well. Rows are no multiple of a block, and end in padding or at the end."""
    there, mask = packed(ROWS, 250)
    arrays = inputs(2, 250)

    @jax.jit
    def kernel(window):
        function = interpret(there["q_segments"], window=window, windows=windows or (0,))
        return value_and_grads(function, *arrays)

    @jax.jit
    def tiles(window):
        function = functools.partial(attention, **there, window=window, block=BLOCK)
        return value_and_grads(function, *arrays)

    for size in windows or (None,):
        window = None if size is None else jnp.int32(size)
        exact = formula(*arrays[:3], mask(size), arrays[3])
        for one, other, tiled in zip(kernel(window), exact, tiles(window), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(one, tiled, rtol=1e-5, atol=1e-5)


def test_bfloat16_has_the_gradients_of_the_formula_but_for_rounding():
    ids, positions = rows_of(ROWS, 250)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(2, 250)]
    wide = [np.asarray(x, np.float32) for x in arrays]
    expected = formula(*wide[:3], seen(positions, ids, None), wide[3])
    actual = jax.jit(functools.partial(value_and_grads, interpret(ids)))(*arrays)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2**-6, atol=2**-4)


def test_padding_gives_zeros_and_reaches_no_other_token():
    ids, _ = rows_of(([], [100]), 140)
    *arrays, slope = inputs(2, 140)
    run = jax.jit(functools.partial(value_and_grads, interpret(ids)))
    before = run(*arrays, slope)
    padding = (ids == 0)[..., None, None]
    changed = [np.where(padding, 1e3, x).astype(np.float32) for x in (*arrays, slope)]
    for one, other in zip(before, run(*changed), strict=True):
        assert not np.asarray(one)[ids == 0].any()
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "local"),
    [(4, 6, 3, (2, 3, 3)), (3, 3, 1, (3, 3, 1))],
)
def test_devices_of_a_mesh_do_their_own_rows_and_heads(interpreted, batch, heads, kv_heads, local):
    """Two shards of rows and two of heads; what is odd is done by all, keys are repeated."""
    there, mask = packed([[100, 40], [140], [9] * 15, [3, 130]][:batch], 140)
    arrays = inputs(batch, 140, heads, kv_heads)
    layout = layouts.Layout(mesh_of(1, 2, 2))
    whole = jax.device_put(arrays, NamedSharding(layout.mesh, PartitionSpec()))
    run = jax.jit(functools.partial(value_and_grads, functools.partial(attention, **there)))
    with traced_on(layout):
        traced = run.trace(*whole)
    body = next(find("shard_map", traced.jaxpr)).params["jaxpr"]
    q, k, v = (x.aval.shape for x in body.invars if x.aval.ndim == 4)
    assert (q[0], q[2], k[2]) == local
    assert v == k
    actual = traced.lower().compile()(*whole)
    for one, other in zip(actual, formula(*arrays[:3], mask(None), arrays[3]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def find(name, jaxpr):
    """All equations of a primitive, those inside of others too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in jex_core.jaxprs_in_params(equation.params):
            yield from find(name, getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        (True, {}),
        (True, {"window": jnp.int32(8), "windows": (0, 8)}),
        (False, {"window": jnp.int32(8)}),
        (False, {"in_order": False}),
        (False, {"seq": 128}),
        (False, {"dtype": jnp.float16}),
        (False, {"prefix": 3}),
        (False, {"layout": None}),
        (True, {"layout": None, "devices": 1}),
        (False, {"platform": "cuda"}),
    ],
)
def test_the_kernel_is_chosen_on_tpus_where_it_is_exact(monkeypatch, kernel, changes):
    given = {"platform": "tpu", "layout": layouts.Layout(mesh_of()), "seq": 129}
    given |= {"dtype": jnp.bfloat16} | changes
    platform, layout, seq, dtype = (given.pop(x) for x in ("platform", "layout", "seq", "dtype"))
    count = given.pop("devices", 8)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    there, _ = packed([[100], [60, 60]], seq)
    if "prefix" in given:
        first = jnp.ones((given["prefix"], KV_HEADS, HEAD_DIM), dtype)
        given["prefix"] = Prefix(first, first)
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs(2, seq))
    with backend.traced_for(platform), traced_on(layout):
        traced = jax.make_jaxpr(functools.partial(attention, **there | given))(q, k, v)
    assert bool(list(find("pallas_call", traced.jaxpr))) == kernel


@pytest.mark.parametrize(
    ("remat", "windows", "times", "head_dim", "repeats"),
    [
        ("full", (0, 70), 2, 128, False),
        ("full", (), 1, 64, True),
        pytest.param("dots", (), 1, 128, False, marks=pytest.mark.slow),
        pytest.param("none", (70, 70), 1, 64, False, marks=pytest.mark.slow),
    ],
)
def test_the_packed_training_step_on_a_mesh_is_lowered_to_the_kernels(
    remat, windows, times, head_dim, repeats
):
    """Each once for every window, in loops over layers.

    The backward pass repeats the forward one only where keeping its result takes twice the room.
    """
    sizes = {"windows": windows, "head_dim": head_dim, "num_heads": 4, "num_kv_heads": 4}
    run = make_run("lora", mesh_of(1, 2, 2), remat=remat, seq=1024, **sizes)
    step = run.make_step()
    with backend.traced_for("tpu"), traced_on(run.layout):
        traced = step.trace(run.state, run.base.params, run.put(run.rows.plan.batch(0)))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r'@tpu_custom_call.*kernel_name = "splash_mha_(\w+)"', text)
    expected = Counter(dict.fromkeys(KERNELS, times))
    expected.update({name: times for name in KERNELS if repeats and name.startswith("fwd")})
    assert Counter(found) == expected
    shapes = re.findall(r"tensor<([0-9x]+)x[a-z]", text)
    assert all(shape.split("x").count("1024") < 2 for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(), (0, 5)])
def test_training_with_the_kernel_on_a_mesh_is_training_without_it(
    interpreted, monkeypatch, windows
):
    losses = train(make_run("lora", mesh_of(1, 2, 2), windows=windows), steps=2)
    monkeypatch.undo()
    expected = train(make_run("lora", mesh_of(), windows=windows), steps=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("windows", "tiles"), [((0,), 10), ((100,), 7), ((0, 100), 10)])
def test_products_of_the_kernels_are_counted_up_to_the_diagonal(windows, tiles):
    """Of 4 x 4 tiles. Two products forward; backward three for queries and four for keys.

    And the sum of outputs times their slopes, over channels.
    """
    there, _ = packed([[512]] * 2, 512)
    arrays = inputs(2, 512)
    options = {"window": jnp.int32(windows[0]), "windows": windows, "block": BLOCK}
    function = functools.partial(attention, **there, **options)
    for mesh in (mesh_of(), mesh_of(1, 2, 2)):
        with backend.traced_for("tpu"), traced_on(layouts.Layout(mesh)):
            counted = count_flops(functools.partial(value_and_grads, function), *arrays)
        products = (2 + 3 + 4) * tiles * BLOCK**2 + 512
        assert counted == 2 * products * 2 * HEADS * HEAD_DIM


@pytest.fixture
def tpus():
    """Devices of a 2x2 TPU v5e, which need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs and needs none, is not installed")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask the cloud what machine this is
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc("v5e:2x2", "tpu").devices


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "windows"), [(64, ()), (128, (0, 256))])
def test_kernels_are_in_the_program_that_is_compiled_for_tpus(tpus, head_dim, windows):
    sizes = {"head_dim": head_dim, "num_heads": 4, "num_kv_heads": 2, "windows": windows}
    run = make_run("lora", mesh_of(1, 2, 2), seq=1024, dtype="bfloat16", **sizes)
    mesh = layouts.make_mesh(1, 2, 2, devices=tpus)

    def there(leaf):
        place = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    run.layout = layouts.Layout(mesh, model=run.base.config)
    run.base, run.state = jax.tree.map(there, (run.base, run.state))
    run.shardings = placement.state_shardings(
        run.state, run.layout, KINDS[run.config.method.name].arrays
    )
    with backend.traced_for("tpu"):
        text = run.compile_step().as_text()
    called = re.findall(r'%splash_mha_(\w+).* custom_call_target="tpu_custom_call"', text)
    expected = Counter(dict.fromkeys(KERNELS, max(1, len(windows))))
    if head_dim < 128:  # the forward pass of such heads is repeated
        expected[KERNELS[0]] *= 2
    assert Counter(called) == expected
