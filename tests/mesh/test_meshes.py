"""On every mesh of eight devices a run is the run of one device; the compiled step is read."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mesh_run import LEARNING_RATE, METHODS, STEPS, base_of, make_run, mesh_of, rows_of, train
from rounding import UNIT, most_roundings

import jaxpeft as jp
from jaxpeft.config.sections import MeshSection
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.mesh import layouts, placement
from jaxpeft.mesh.constraints import traced_on

SHAPES = [
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes, dtype=int) == 8
]
USUAL = {("lora", (1, 4, 2)), ("prompt", (2, 1, 4))}
CASES = [
    pytest.param(
        name,
        sizes,
        marks=() if (name, sizes) in USUAL else pytest.mark.slow,
        id=f"{name}-{'x'.join(map(str, sizes))}",
    )
    for name in METHODS
    for sizes in SHAPES
]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def on_one_device(name, **changes):
    run = make_run(name, mesh_of(), **changes)
    losses = train(run)
    return losses, jax.device_get(run.state.trained["adapter"]), answers(run)


def answers(run):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    return generate_ids(run.model(), prompts, adapter=run.state.adapter, max_new_tokens=6)


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_every_mesh_gives_the_run_of_one_device(name, sizes):
    losses, adapter, said = on_one_device(name)
    run = make_run(name, mesh_of(*sizes))
    before = jax.device_get(run.state.trained["adapter"])
    np.testing.assert_allclose(train(run), losses, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), adapter, before)
    assert min(jax.tree.leaves(moved)) > LEARNING_RATE
    for a, b in zip(
        jax.tree.leaves(run.state.trained["adapter"]), jax.tree.leaves(adapter), strict=True
    ):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-2 * LEARNING_RATE * STEPS)
    assert answers(run) == said


@pytest.mark.parametrize(
    "sizes", [pytest.param(s, marks=() if s == (2, 2, 2) else pytest.mark.slow) for s in SHAPES]
)
def test_in_float64_meshes_differ_by_nothing_but_the_order_of_sums(sizes):
    with jax.enable_x64(True):
        losses = []
        for mesh in (mesh_of(), mesh_of(*sizes)):
            run = make_run("lora", mesh, dtype="float64")
            wide = jax.tree.map(lambda x: x.astype(jnp.float64), run.state.trained)
            moments = jax.tree.map(
                lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
                run.state.opt_state,
            )
            run.state = run.state.replace(trained=wide, opt_state=moments)
            losses.append(train(run))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


def test_dropout_does_not_depend_on_the_mesh():
    method = jp.LoRA(rank=4, alpha=8, dropout=0.5, targets=("q_proj", "lm_head"))
    one, other = (
        train(make_run("lora", mesh, method=method), steps=2)
        for mesh in (mesh_of(), mesh_of(2, 2, 2))
    )
    np.testing.assert_allclose(other, one, rtol=1e-5)
    assert one[1] != pytest.approx(on_one_device("lora")[0][1], rel=1e-5)


@pytest.mark.slow
def test_fewer_key_heads_than_tensor_shards_are_replicated():
    changes = {"num_kv_heads": 2}
    one = train(make_run("lora", mesh_of(), **changes), steps=3)
    run = make_run("lora", mesh_of(1, 2, 4), **changes)
    kernels = run.base.params["layers"]["self_attn"]
    assert kernels["k_proj"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert kernels["q_proj"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    notes = dict(run.describe()[0])
    assert "2 heads do not divide by tensor 4" in str(notes)
    whole = Program(make_run("lora", mesh_of(), **changes).compile_step().as_text()).flops
    # The two projections are computed by every shard of the tensor axis, and nothing else is.
    twice = Program(run.compile_step().as_text()).flops * 8 / whole
    assert 1.0 < twice < 1.3
    np.testing.assert_allclose(train(run, steps=3), one, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "adapted"), [(8, 2, True), (6, 2, False), (6, 3, False), (9, 3, False)]
)
def test_heads_that_the_tensor_axis_cannot_spread_give_the_same_logits(heads, kv_heads, adapted):
    """With the keys of a prefix too, which are as many as the model's own."""
    base = base_of(num_heads=heads, num_kv_heads=kv_heads)
    ids, adapter = np.arange(24).reshape(2, 12), None
    if adapted:
        adapter = jp.init_adapter(jp.PrefixTuning(num_tokens=3), base, jax.random.key(1))
    layout = layouts.Layout(mesh_of(2, 1, 4), model=base.config)
    placed = base.replace(params=placement.shard_params(base.params, layout))
    expected = base(ids, adapter=adapter)
    bound = most_roundings(base.config, ids.shape[1] + 3) * UNIT * np.abs(expected).max()
    np.testing.assert_allclose(placed(ids, adapter=adapter), expected, rtol=0, atol=bound)


def test_a_base_on_a_mesh_of_the_users_own_axes_is_called_as_it_lies():
    base = base_of()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    params = jax.device_put(base.params, NamedSharding(mesh, PartitionSpec()))
    ids = np.arange(12)[None]
    np.testing.assert_allclose(base.replace(params=params)(ids), base(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("remat", "passes"), [pytest.param("none", 2, marks=pytest.mark.slow), ("full", 3)]
)
def test_the_compiled_step_moves_weights_once_a_pass_and_no_gradient_of_the_base(remat, passes):
    vocab_size = 4096  # so that a layer is smaller than the table and than the head
    make = functools.partial(
        make_run, "lora", remat=remat, microbatch_size=16, vocab_size=vocab_size
    )
    run, one = make(mesh_of(1, 4, 2)), make(mesh_of())
    program = Program(run.compile_step().as_text())
    assert program.flops * 8 < 1.1 * Program(one.compile_step().as_text()).flops
    # As a whole, as shards of it, and as what is gathered over fsdp.
    kernels = {
        (leaf.shape[-2] // rows, leaf.shape[-1] // columns)
        for leaf in jax.tree.leaves(run.base.params)
        if leaf.ndim > 1
        for rows, columns in itertools.product((1, 2, 4), repeat=2)
    }
    adapter = {leaf.shape[-2:] for leaf in jax.tree.leaves(run.state.trained["adapter"])}
    for collective in program.collectives:
        if collective.kind in ("all-reduce", "reduce-scatter"):
            for shape in collective.shapes:
                assert len(shape) > 2 or shape[-2:] not in kernels - halves(adapter), collective
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(run.base.params))
    assert 0 < program.moved("all-gather") <= passes * base / 2
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(run.base.params["layers"])) / 2
    assert max(c.nbytes for c in program.collectives if c.kind == "all-gather") <= layer / 2
    # The head's shard changes its form; rows of the table are exchanged for those of the batch.
    head, rows = vocab_size * 64 * 4 / 8, 16 * 16 * 64 * 4 / 4
    assert program.moved("all-to-all") <= head + rows
    assert program.moved("collective-permute", "reduce-scatter") == 0
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.trained["adapter"]))
    reduced = sum(
        4 * int(np.prod(shape)) * c.times
        for c in program.collectives
        if c.kind == "all-reduce"
        for shape in c.shapes
        if shape in halves(adapter)
    )
    assert trained / 2 <= reduced <= 2 * trained


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_of_a_trained_head_is_summed_over_devices_once(tied):
    make = functools.partial(
        make_run, "full", method=jp.Full(), microbatch_size=16, tie_embeddings=tied
    )
    run = make(mesh_of(2, 2, 2))
    program = Program(run.compile_step().as_text())
    assert any(c.times == 4 for c in program.collectives)  # the chunks of the loss
    vocab = {96 // parts for parts in (1, 2, 4)}
    sums = [
        c
        for c in program.collectives
        if c.kind == "all-reduce"
        for shape in c.shapes
        if len(shape) == 2 and vocab & {*shape}
    ]
    assert sums
    assert {c.times for c in sums} == {1}
    one = train(make(mesh_of()), steps=3)
    np.testing.assert_allclose(train(run, steps=3), one, rtol=1e-5)


def test_stacked_adapters_on_the_head_have_the_gradients_of_one_device():
    base, keys = base_of(), jax.random.split(jax.random.key(1), 2)
    method = jp.LoRA(rank=2, alpha=4, targets=("lm_head",))
    stacked = jp.stack_adapters([jp.init_adapter(method, base, key) for key in keys])
    stacked = stacked.replace(params=jax.tree.map(lambda x: x + 0.1, stacked.params))
    plan = rows_of(base.config.vocab_size, 0).plan
    batch = plan.batch(0) | {"index": np.arange(plan.batch_size) % 2}
    batch = jax.tree.map(jnp.asarray, batch)
    loss = jp.make_lm_loss(base.module, head_frozen=False)

    def gradients(mesh):
        layout = layouts.Layout(mesh, model=base.config)
        params = placement.shard_params(base.params, layout)

        def total(trained):
            return loss(params, stacked.replace(params=trained), batch)[0]

        with traced_on(layout):
            return jax.device_get(jax.jit(jax.grad(total))(stacked.params))

    one, other = (jax.tree.leaves(gradients(mesh)) for mesh in (mesh_of(), mesh_of(2, 2, 2)))
    for expected, found in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_gives_the_same_loss():
    one = train(make_run("lora", mesh_of(), vocab_size=98), steps=2)
    run = make_run("lora", mesh_of(1, 2, 4), vocab_size=98)
    np.testing.assert_allclose(train(run, steps=2), one, rtol=1e-5)


def halves(shapes):
    """The shapes, and the same cut in two along one axis."""
    return {
        (a // x, b // y) for a, b in shapes for x, y in ((1, 1), (2, 1), (1, 2)) if a % x == b % y
    }


def test_rules_of_the_config_go_first():
    path = "layers/mlp/up_proj/kernel"
    section = MeshSection(rules={path: "- - fsdp"})
    layout = layouts.Layout(mesh_of(1, 8), layouts.parse_rules(section.rules))
    assert placement.param_sharding(path, (2, 64, 128), layout).spec == PartitionSpec(
        None, None, "fsdp"
    )
    other = "layers/mlp/down_proj/kernel"
    expected = PartitionSpec(None, "tensor", "fsdp")
    assert placement.param_sharding(other, (2, 128, 64), layout).spec == expected
    one = on_one_device("lora")[0][:2]
    np.testing.assert_allclose(train(make_run("lora", layout), steps=2), one, rtol=1e-5)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"(": "fsdp"}, "no regular expression"),
        ({"norm/scale": "model"}, "expected '-' or one of data, fsdp, tensor"),
        ({"norm/scale": "fsdp fsdp"}, "none twice"),
    ],
)
def test_bad_rules_are_refused(rules, words):
    with pytest.raises(ValueError, match=words):
        MeshSection(rules=rules)
