"""Quantised kernels: codes by the published definition in float64; models on a coded base."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nf4_levels import normal_levels
from tiny_decoder import CONFIG, decoder, make_adapter, make_batch
from tiny_run import make_files, training_lines, write_config

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core import paths
from jaxpeft.mesh import layouts, placement
from jaxpeft.methods.algebra.merge_quantized import merge_quantized
from jaxpeft.methods.binding import bind
from jaxpeft.methods.merging import merge
from jaxpeft.methods.quantizing import quantize
from jaxpeft.ops.linear import linear
from jaxpeft.ops.quant import QuantTensor, quantize_kernel

KINDS = ("nf4", "int4", "int8")
LEVELS = {
    "nf4": normal_levels(),
    "int4": np.arange(-7, 8) / 7,
    "int8": np.arange(-127, 128) / 127,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
single_or_double = pytest.mark.parametrize("double", [False, True], ids=["float", "double"])


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(kernel, kind):
    """Nearest levels of blocks of 64 rows in float64, by a plain search, and the blocks' absmax."""
    out, tops = np.zeros(kernel.shape), []
    for start in range(0, len(kernel), 64):
        block = kernel[start : start + 64].astype(np.float64)
        top = np.abs(block).max(axis=0)
        tops.append(top)
        relative = block / np.where(top == 0, 1, top)
        nearest = np.abs(relative[..., None] - LEVELS[kind]).argmin(-1)
        out[start : start + 64] = LEVELS[kind][nearest] * top
    return out, np.stack(tops)


@every_kind
@pytest.mark.parametrize("d_in", [64, 192, 70, 5])
def test_codes_stand_for_the_nearest_levels_of_every_block(kind, d_in):
    kernel = normal((d_in, 24))
    node = quantize_kernel(jnp.asarray(kernel), kind)
    expected, tops = by_hand(kernel, kind)
    np.testing.assert_allclose(node.dequantize(), expected, rtol=1e-6, atol=1e-7)
    top = {"nf4": 1, "int4": 7, "int8": 127}[kind]
    np.testing.assert_allclose(node.scales() * top, tops, rtol=1e-6)
    assert node.shape == kernel.shape


def test_two_codes_share_a_byte_by_halves_of_a_block():
    kernel = np.zeros((64, 1), np.float32)
    kernel[0], kernel[32] = 1.0, -1.0  # codes 15 and 0 of the values of appendix E
    node = quantize_kernel(jnp.asarray(kernel))
    assert node.codes.dtype == jnp.uint8
    assert node.codes[0, 0, 0] == 15 + (0 << 4)
    assert np.unique(node.codes[0, 1:, 0]) == [7 + (7 << 4)]  # zero


@pytest.mark.parametrize(("kind", "low", "high"), [("nf4", 0.08, 0.10), ("int8", 0, 0.01)])
@single_or_double
def test_the_error_on_normal_numbers_is_the_published_one(kind, low, high, double):
    kernel = normal((1024, 256))
    change = np.asarray(quantize_kernel(jnp.asarray(kernel), kind, double).dequantize()) - kernel
    assert low < np.linalg.norm(change) / np.linalg.norm(kernel) < high


@pytest.mark.parametrize(
    ("kind", "double", "most"),
    [("nf4", False, 0.57), ("int4", False, 0.57), ("nf4", True, 0.53), ("int8", False, 1.07)],
)
def test_bytes_a_weight_are_bounded(kind, double, most):
    node = quantize_kernel(jnp.asarray(normal((3, 576, 512))), kind, double)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(node))
    assert held == node.nbytes
    assert held / (3 * 576 * 512) <= most


def test_quantised_scales_are_those_in_float_to_one_part_in_127():
    kernel = jnp.asarray(normal((2, 128, 300)) * np.linspace(0.5, 2, 300, dtype=np.float32))
    exact, coded = (quantize_kernel(kernel, "nf4", double).scales() for double in (False, True))
    np.testing.assert_allclose(coded, exact, atol=float(np.abs(exact - exact.mean()).max()) / 200)
    assert coded.shape == exact.shape


def test_a_block_of_zeros_stays_zero():
    for kind in KINDS:
        node = quantize_kernel(jnp.zeros((70, 2)), kind)
        np.testing.assert_array_equal(node.dequantize(), np.zeros((70, 2)))


@every_kind
@single_or_double
def test_products_and_their_gradients_are_those_of_the_dense_kernel(kind, double):
    x, kernel = jnp.asarray(normal((3, 5, 70))), jnp.asarray(normal((70, 24), seed=1))
    node = quantize_kernel(kernel, kind, double)
    dense = node.dequantize()
    weights = jnp.asarray(normal((3, 5, 24), seed=2))

    def total(x, kernel):
        return jnp.vdot(linear(x, kernel), weights)

    for make in (total, jax.grad(total)):
        np.testing.assert_allclose(make(x, node), make(x, dense), rtol=1e-4, atol=1e-4)


@every_kind
def test_a_stack_is_its_layers(kind):
    kernel = jnp.asarray(normal((3, 70, 8)))
    whole = quantize_kernel(kernel, kind, True)
    for layer in range(3):
        one = quantize_kernel(kernel[layer], kind, True)
        sliced = jax.tree.map(lambda leaf, layer=layer: leaf[layer], whole)
        np.testing.assert_array_equal(one.dequantize(), sliced.dequantize())
        assert one.shape == sliced.shape == (70, 8)


# In a model.


@functools.cache
def quantized(kind, double=False):
    return quantize(decoder()[1], kind, double=double)


def dense_of(params):
    return paths.unflatten(
        {
            path: leaf.materialize() if isinstance(leaf, QuantTensor) else leaf
            for path, leaf in paths.flatten(params).items()
        }
    )


def test_kernels_of_the_layers_are_quantised_and_nothing_else():
    params = quantized("nf4")
    coded = {p for p, leaf in paths.flatten(params).items() if isinstance(leaf, QuantTensor)}
    assert coded == {p for p in paths.flatten(decoder()[1]) if p.endswith("_proj/kernel")}


def loss(adapter, params, remat="none"):
    module = decoder(CONFIG, remat)[0]
    logits = module.apply(bind(params, adapter), make_batch(2, 8)["tokens"])
    return -jax.nn.log_softmax(logits)[..., 3].mean()


@every_kind
@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_losses_and_gradients_are_those_of_the_dequantised_base(kind, remat):
    adapter = make_adapter(trained=True)

    def run(params):
        return jax.jit(
            jax.value_and_grad(lambda p: loss(adapter.replace(params=p), params, remat))
        )(adapter.params)

    actual, expected = run(quantized(kind)), run(dense_of(quantized(kind)))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), actual, expected
    )


@pytest.mark.slow
def test_a_head_is_quantised_where_that_is_asked_for():
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    module, params = decoder(config)
    coded = quantize(params, "nf4", head=True)
    assert isinstance(coded["lm_head"]["kernel"], QuantTensor)
    assert not isinstance(quantize(params)["lm_head"]["kernel"], QuantTensor)
    adapter, batch = make_adapter(config=config, trained=True), make_batch(2, 6)

    def run(params, frozen):
        loss = jp.make_lm_loss(module, head_frozen=frozen)
        sums = lambda p: loss(params, adapter.replace(params=p), batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(sums))(adapter.params)

    expected = run(dense_of(coded), False)
    for frozen in (False, True):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
            run(coded, frozen),
            expected,
        )


def test_what_is_quantised_already_is_refused():
    with pytest.raises(jp.UserError, match="quantised already"):
        quantize(quantize(decoder()[1]))


def test_an_unknown_kind_is_refused():
    with pytest.raises(jp.UserError, match=r"quantization: must be one of 'nf4'.*got 'nf5'"):
        jp.quantize(decoder()[1], "nf5")


def test_temporaries_do_not_grow_with_depth_by_dequantised_kernels():
    """Under scan without remat: what 8 layers and 32 differ by is activations alone."""
    sizes = {}
    for kind in (None, "nf4"):
        for layers in (8, 32):
            kernel = jnp.asarray(normal((layers, 256, 256)))
            weight = kernel if kind is None else quantize_kernel(kernel, kind)

            def step(x, weight):
                def layer(x, one):
                    return jnp.tanh(linear(x, one)), None

                return jnp.sum(jax.lax.scan(layer, x, weight)[0])

            x = jax.ShapeDtypeStruct((16, 256), jnp.float32)
            compiled = jax.jit(jax.grad(step)).lower(x, weight).compile()
            sizes[kind, layers] = compiled.memory_analysis().temp_size_in_bytes
    activations = 24 * 16 * 256 * 4
    grown = sizes["nf4", 32] - sizes["nf4", 8]
    assert grown <= 3 * activations
    assert grown < 24 * 256 * 256 * 4 / 4


# Merging.


def test_merging_into_codes_is_refused_with_both_ways_out():
    with pytest.raises(jp.UserError, match=r"quantised.*without quantization.*merge_quantized"):
        merge(quantized("nf4"), make_adapter(trained=True))


@every_kind
def test_merging_on_purpose_rounds_again_and_says_what_it_costs(kind):
    adapter, params = make_adapter(trained=True), quantized(kind)
    merged, errors = merge_quantized(params, adapter)
    exact = merge(dense_of(params), adapter)
    assert set(errors) == set(adapter.spec.paths)
    for path, error in errors.items():
        wide, coded = paths.get(exact, path), paths.get(merged, path)
        assert isinstance(coded, QuantTensor)
        assert coded.quant_type == kind
        change = np.linalg.norm(coded.dequantize() - wide)
        brought = np.linalg.norm(wide - paths.get(params, path).dequantize())
        assert error.kernel == pytest.approx(change / np.linalg.norm(wide), rel=1e-4)
        assert error.change == pytest.approx(change / brought, rel=1e-4)


# On eight devices.


@single_or_double
def test_whole_blocks_are_spread_and_products_stay_the_same(double):
    mesh = layouts.make_mesh(data=1, fsdp=2, tensor=4)
    kernel = jnp.asarray(normal((2, 256, 128)))
    params = {"layers": {"self_attn": {"q_proj": {"kernel": kernel}}}}
    whole = jp.quantize(params, "nf4", double=double)
    placed = jp.shard_params(whole, mesh)
    node, again = (tree["layers"]["self_attn"]["q_proj"]["kernel"] for tree in (whole, placed))
    assert {shard.data.shape for shard in again.codes.addressable_shards} == {(2, 2, 32, 32)}
    x = jnp.asarray(normal((2, 3, 256), seed=1))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(linear))(x, again), jax.vmap(linear)(x, node), rtol=1e-5, atol=1e-5
    )


def test_blocks_that_do_not_divide_are_named():
    mesh = layouts.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((2, 64, 128))}}}}
    notes = placement.unsharded(quantize(params), mesh)
    assert notes == ["layers/self_attn/q_proj/kernel: 1 blocks of 64 do not divide by fsdp 2"]


def test_adapters_start_from_shapes_as_on_a_dense_base():
    key = jax.random.key(0)
    coded = jp.init_adapter(jp.LoRA(rank=2), quantized("nf4"), key)
    dense = jp.init_adapter(jp.LoRA(rank=2), decoder()[1], key)
    jax.tree.map(np.testing.assert_array_equal, coded, dense)
    with pytest.raises(jp.UserError, match=r"loftq.*quantised already"):
        jp.init_adapter(jp.LoRA(rank=2, init_weights="loftq"), quantized("nf4"), key)


# From files, and in a run.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 2, "tensor": 4}], ids=["one", "mesh"])
@single_or_double
def test_a_model_loads_as_it_would_be_quantised(files, mesh, double):
    mesh = mesh and layouts.make_mesh(**mesh)
    dense = jp.load_model(files.model)
    loaded = jp.load_model(files.model, quantization="nf4", double_quantization=double, mesh=mesh)
    expected = quantize(dense.params, "nf4", double=double)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert loaded.fingerprint == dense.fingerprint
    assert repr(loaded) == repr(dense)


@pytest.mark.slow
def test_a_run_trains_on_codes_and_its_adapter_belongs_to_the_base(files, tmp_path):
    model = {"path": str(files.model), "quantization": "nf4", "double_quantization": True}
    config = write_config(files, tmp_path / "run", model=model, evaluation=None)
    program.main([config])
    losses = [line["loss"] for line in training_lines(tmp_path / "run")]
    assert losses[-1] < losses[0]
    coded = jp.load_model(files.model, quantization="nf4", double_quantization=True)
    adapter = jp.load_adapter(tmp_path / "run", coded)
    dense = jp.load_model(files.model)
    note = "trained on a base in nf4, scales quantised, this one is in full precision"
    with pytest.warns(UserWarning, match=note):
        merged = merge(dense.params, jp.load_adapter(tmp_path / "run", dense))
    jp.save_adapter(tmp_path / "dense", jp.init_adapter(jp.LoRA(), dense, jax.random.key(0)), dense)
    with pytest.warns(UserWarning, match="in full precision, this one is in nf4, scales quantised"):
        jp.load_adapter(tmp_path / "dense", coded)
    assert all(not isinstance(leaf, QuantTensor) for leaf in paths.flatten(merged).values())
    batch = jnp.arange(8)[None]
    assert np.abs(coded(batch, adapter=adapter) - coded(batch)).max() > 1e-3


@pytest.mark.slow
def test_a_run_of_loftq_makes_up_for_what_the_codes_of_its_base_lose(files, tmp_path):
    method = {"name": "lora", "rank": 8, "alpha": 32, "init_weights": "loftq"}
    model, still = {"path": str(files.model), "quantization": "nf4"}, {"learning_rate": 1e-12}
    config = write_config(
        files, tmp_path / "run", method=method, model=model, optim=still, train={"steps": 4}
    )
    program.main([config])
    tensors = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for place in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "4"):
        shutil.rmtree(place)
    program.main([config])  # goes on after the third step
    assert tensors.read_bytes() == whole
    dense, coded = jp.load_model(files.model), jp.load_model(files.model, quantization="nf4")
    adapter = jp.load_adapter(tmp_path / "run", coded)
    for path in adapter.spec.paths:
        lost = np.asarray(paths.get(dense.params, path), np.float64)
        lost = lost - np.asarray(paths.get(coded.params, path).dequantize(), np.float64)
        a, b = (np.asarray(paths.get(adapter.params, f"{path}/{k}"), np.float64) for k in "ab")
        rest = np.linalg.norm(lost - 4 * a @ b, axis=(1, 2))
        s = np.linalg.svd(lost, compute_uv=False)
        np.testing.assert_allclose(rest, np.sqrt((s[:, 8:] ** 2).sum(-1)), rtol=1e-3)
        assert (rest < 0.8 * np.linalg.norm(s, axis=-1)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {}, "method": {"name": "lora", "init_weights": "loftq"}},
            "makes up for what NF4 loses of the base; set model.quantization to nf4",
        ),
        (
            {
                "model": {"quantization": "nf4"},
                "method": {"name": "lora", "init_weights": "loftq", "loftq_steps": 2},
            },
            "method.loftq_steps: .*set it to 1",
        ),
        (
            {"model": {"quantization": "nf5"}},
            "model.quantization: expected one of nf4, int4, int8 or null, got nf5",
        ),
        ({"model": {"double_quantization": True}}, "model.double_quantization: needs quantization"),
        (
            {"model": {"quantization": "nf4"}, "method": {"name": "full"}},
            r"model.quantization: method 'full'.*whole model",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(files, tmp_path, changes, words):
    changes["model"]["path"] = str(files.model)
    config = write_config(files, tmp_path / "run", **changes)
    with pytest.raises(jp.UserError, match=words):
        program.main([config])
    assert not (tmp_path / "run").exists()
