"""LoRA against float64 NumPy, its laws, and what it refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from tiny_decoder import CONFIG, decoder, make_adapter

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.binding import bind, init_adapter
from jaxpeft.methods.lora.config import LoRA, config_of
from jaxpeft.methods.lora.nodes import LoRAKernel, drop, low_rank
from jaxpeft.methods.merging import merge
from jaxpeft.methods.peft.modules import shortest_decimal

BF16 = ml_dtypes.bfloat16
IDS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
MODULE, PARAMS = decoder()
apply = jax.jit(MODULE.apply)


def logits(adapter=None):
    return apply(bind(PARAMS, adapter), IDS)


def kernel_params(d_in, d_out, layers=2):
    return {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((layers, d_in, d_out))}}}}


def factors(adapter):
    return adapter.params["layers"]["mlp"]["up_proj"]["kernel"]


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_product_is_that_of_float64_numpy(getkey, rank, batch):
    x, w = jax.random.normal(getkey(), (*batch, 8)), jax.random.normal(getkey(), (8, 9))
    a, b = jax.random.normal(getkey(), (8, rank)), jax.random.normal(getkey(), (rank, 9))
    actual = jax.jit(LoRAKernel.multiply)(LoRAKernel(w, a, b, scale=0.5), x)
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, w, a, b))
    np.testing.assert_allclose(actual, x @ (w + 0.5 * a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_gradients_of_several_adapters_are_those_of_the_formula_for_few_rows(rows):
    """Of 2 and 3 rows, XLA for CPU aborts on the turned product that more rows use."""
    rng = np.random.default_rng(rows)
    x, a, b, s = (
        rng.standard_normal(shape, np.float32)
        for shape in ((3, rows, 16), (3, 16, 4), (3, 4, 8), (3, rows, 8))
    )

    def loss(a, b, x, s):
        return jnp.vdot(low_rank(x, a, b, 0.5), s)

    of_a, of_b = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(a, b, x, s)
    x, a, b, s = (np.asarray(array, np.float64) for array in (x, a, b, s))
    x_t, a_t, b_t = (array.transpose(0, 2, 1) for array in (x, a, b))
    np.testing.assert_allclose(of_a, 0.5 * x_t @ (s @ b_t), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_b, 0.5 * (a_t @ x_t) @ s, rtol=1e-5, atol=1e-5)


def test_with_a_bfloat16_base_the_branch_is_float32_and_the_sum_is_rounded_once(getkey):
    d = 64
    x = jax.random.normal(getkey(), (32, d)).astype(BF16)
    w = (jax.random.normal(getkey(), (d, d)) / 8).astype(BF16)
    a, b = (jax.random.normal(getkey(), (d, d)) / 8 for _ in range(2))
    actual = np.asarray(LoRAKernel(w, a, b, scale=1.5).multiply(x)).astype(np.float64)
    # PEFT: round(round(x W) + s (x A) B), the branch and the sum in at least float32.
    wide_x, wide_w, wide_a, wide_b = (np.asarray(v).astype(np.float64) for v in (x, w, a, b))
    base = (wide_x @ wide_w).astype(BF16).astype(np.float64)
    branch = 1.5 * (wide_x @ wide_a) @ wide_b
    expected = (base + branch).astype(BF16).astype(np.float64)
    twice = (base + branch.astype(BF16).astype(np.float64)).astype(BF16).astype(np.float64)
    # Where float32 and float64 sums fall on two sides of a rounding border, one digit differs.
    assert np.mean(actual != expected) < 0.01
    assert np.mean(twice != expected) > 0.1


def test_a_is_uniform_within_the_bound_and_b_is_zero():
    d_in, rank = 100, 16
    adapter = init_adapter(LoRA(rank=rank), kernel_params(d_in, 40, layers=8), jax.random.key(1))
    a, b = (np.asarray(factors(adapter)[name]) for name in "ab")
    bound = 1 / np.sqrt(d_in)
    assert a.dtype == b.dtype == np.float32
    assert (a.shape, b.shape) == ((8, d_in, rank), (8, rank, 40))
    assert not b.any()
    assert np.abs(a).max() <= bound
    # Kolmogorov-Smirnov distance to U(-bound, bound); 1.63 / sqrt(n) is its 1 % point.
    u = np.sort(a.ravel() / bound + 1) / 2
    grid = np.arange(1, u.size + 1) / u.size
    assert np.abs(u - grid).max() < 1.63 / np.sqrt(u.size)
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.1  # layers draw their own


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora, scale):
    method = LoRA(rank=4, alpha=16.0, rslora=rslora)
    adapter = init_adapter(method, kernel_params(6, 5), jax.random.key(0))
    buffers = adapter.buffers["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(buffers["scale"], np.float32([scale, scale]))
    np.testing.assert_array_equal(buffers["rank"], [4, 4])


def test_numbers_of_a_kernel_depend_on_the_key_and_its_own_path_only():
    some = init_adapter(LoRA(targets=("q_proj",), rank=2), PARAMS, jax.random.key(7))
    many = init_adapter(LoRA(rank=2), PARAMS, jax.random.key(7))
    path = "layers/self_attn/q_proj/kernel/a"
    np.testing.assert_array_equal(paths.get(some.params, path), paths.get(many.params, path))
    other = init_adapter(LoRA(rank=2), PARAMS, jax.random.key(8))
    assert (paths.get(other.params, path) != paths.get(many.params, path)).all()


def test_shapes_are_enough_to_start_and_jit_gives_the_same_numbers():
    shapes = jax.eval_shape(lambda: PARAMS)
    eager = init_adapter(LoRA(rank=2), shapes, jax.random.key(7))
    jitted = jax.jit(lambda p: init_adapter(LoRA(rank=2), p, jax.random.key(7)))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_a_new_adapter_leaves_the_logits_bit_for_bit_alone():
    adapter = init_adapter(LoRA(rank=4), PARAMS, jax.random.key(1))
    np.testing.assert_array_equal(logits(adapter), logits())


def test_adapted_paths_are_exactly_these():
    adapter = init_adapter(LoRA(rank=2), PARAMS, jax.random.key(1))
    shapes = {path: leaf.shape for path, leaf in paths.flatten(adapter.params).items()}
    assert shapes == {
        "layers/self_attn/q_proj/kernel/a": (2, 16, 2),
        "layers/self_attn/q_proj/kernel/b": (2, 2, 32),
        "layers/self_attn/k_proj/kernel/a": (2, 16, 2),
        "layers/self_attn/k_proj/kernel/b": (2, 2, 16),
        "layers/self_attn/v_proj/kernel/a": (2, 16, 2),
        "layers/self_attn/v_proj/kernel/b": (2, 2, 16),
        "layers/self_attn/o_proj/kernel/a": (2, 32, 2),
        "layers/self_attn/o_proj/kernel/b": (2, 2, 16),
        "layers/mlp/gate_proj/kernel/a": (2, 16, 2),
        "layers/mlp/gate_proj/kernel/b": (2, 2, 24),
        "layers/mlp/up_proj/kernel/a": (2, 16, 2),
        "layers/mlp/up_proj/kernel/b": (2, 2, 24),
        "layers/mlp/down_proj/kernel/a": (2, 24, 2),
        "layers/mlp/down_proj/kernel/b": (2, 2, 16),
    }


def test_dropout_keeps_the_asked_share_and_scales_it_up(getkey):
    out = np.asarray(drop(jnp.full((400, 250), 3.0), jnp.float32(0.2), getkey()))
    kept = out != 0
    np.testing.assert_allclose(out[kept], 3.0 / 0.8, rtol=1e-6)
    # Five standard deviations of the share of 100,000 coins.
    assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.2 * 0.8 / out.size)


def test_dropout_acts_on_the_branch_only(getkey):
    x, w = jax.random.normal(getkey(), (3, 8)), jax.random.normal(getkey(), (8, 8))
    a, b = jnp.eye(8), jnp.eye(8)
    kernel = LoRAKernel(w, a, b, scale=2.0, dropout=jnp.float32(0.5), key=getkey())
    branch = np.asarray(kernel.multiply(x) - x @ w)
    x = np.asarray(x)
    dropped = np.abs(branch) < 1e-5
    np.testing.assert_allclose(branch, np.where(dropped, 0, 2 * x / 0.5), rtol=1e-4, atol=1e-5)
    assert 0 < dropped.sum() < dropped.size


def test_without_a_key_nothing_is_dropped():
    still = make_adapter(LoRA(rank=2, dropout=0.0), trained=True)
    shaky = make_adapter(LoRA(rank=2, dropout=0.5), trained=True)
    np.testing.assert_array_equal(logits(shaky), logits(still))


def test_every_step_kernel_and_layer_drops_its_own(getkey):
    adapter = make_adapter(LoRA(rank=2, dropout=0.5), trained=True)

    def run(key):
        return apply(bind(PARAMS, adapter, dropout_key=key), IDS)

    first = getkey()
    np.testing.assert_array_equal(run(first), run(first))
    assert (run(first) != run(getkey())).any()
    bound = paths.flatten(bind(PARAMS, adapter, dropout_key=first)["params"])
    keys = [
        tuple(np.asarray(jax.random.key_data(layer)))
        for path in adapter.spec.paths
        for layer in bound[path].key
    ]
    assert len(set(keys)) == len(adapter.spec.paths) * CONFIG.num_layers


def test_dropout_of_zero_with_a_key_changes_nothing(getkey):
    adapter = make_adapter(trained=True)
    actual = apply(bind(PARAMS, adapter, dropout_key=getkey()), IDS)
    np.testing.assert_allclose(actual, logits(adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1, weight_decay=0.1), optax.lion(0.1, weight_decay=0.1), optax.sgd(0.1, 0.9)],
    ids=["adamw", "lion", "sgd"],
)
def test_layers_that_are_not_adapted_stay_zero(tx):
    adapter = init_adapter(
        LoRA(rank=2, targets=r".*\.1\..*(v|down)_proj"), PARAMS, jax.random.key(1)
    )
    params, state = adapter.params, tx.init(adapter.params)

    @jax.jit
    def update(params, state):
        def loss(p):
            return jnp.square(MODULE.apply(bind(PARAMS, adapter.replace(params=p)), IDS)).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = update(params, state)
    for leaf in jax.tree.leaves(params):
        assert not leaf[0].any()
        assert leaf[1].all()


def test_columns_padded_with_zeros_stay_zero_and_change_nothing_else(getkey):
    """A rank-2 adapter stored with width 4 trains like one stored with width 2."""
    x, w = jax.random.normal(getkey(), (5, 8)), jax.random.normal(getkey(), (8, 6))
    a, b = jax.random.normal(getkey(), (8, 2)), jax.random.normal(getkey(), (2, 6))
    tx = optax.adamw(0.05, weight_decay=0.1)

    @jax.jit
    def train(params):
        def loss(p):
            return jnp.square(LoRAKernel(w, p["a"], p["b"], scale=2.0).multiply(x)).sum()

        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    narrow = train({"a": a, "b": b})
    wide = train({"a": jnp.pad(a, ((0, 0), (0, 2))), "b": jnp.pad(b, ((0, 2), (0, 0)))})
    assert not wide["a"][:, 2:].any()
    assert not wide["b"][2:].any()
    np.testing.assert_allclose(wide["a"][:, :2], narrow["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wide["b"][:2], narrow["b"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_bound(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    module, params = decoder(config)
    targets = "all-linear" if tied else ("lm_head", "q_proj", "down_proj")
    adapter = make_adapter(LoRA(rank=2, targets=targets), config, trained=True)
    run = jax.jit(module.apply)
    merged, bound = run({"params": merge(params, adapter)}, IDS), run(bind(params, adapter), IDS)
    np.testing.assert_allclose(merged, bound, rtol=1e-4, atol=1e-4)
    assert np.abs(merged - run({"params": params}, IDS)).max() > 0.1


def test_merging_leaves_the_base_alone_and_shares_what_no_adapter_touches():
    before = jax.tree.map(np.array, PARAMS)
    merged = merge(PARAMS, make_adapter(LoRA(rank=2, targets=("q_proj",)), trained=True))
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)
    changed = [
        path for path, leaf in paths.flatten(merged).items() if leaf is not paths.get(PARAMS, path)
    ]
    assert changed == ["layers/self_attn/q_proj/kernel"]


def test_parameters_without_an_embedding_table_are_merged_too(getkey):
    adapter = init_adapter(LoRA(rank=2, alpha=6.0), kernel_params(6, 5), getkey())
    adapter = adapter.replace(params=jax.tree.map(lambda x: x + 0.5, adapter.params))
    merged = merge(kernel_params(6, 5), adapter)["layers"]["mlp"]["up_proj"]["kernel"]
    a, b = (np.asarray(factors(adapter)[key], np.float64) for key in "ab")
    np.testing.assert_allclose(merged, 1 + 3 * (a @ b), rtol=1e-6)


def test_merging_into_bfloat16_rounds_the_sum_once(getkey):
    w = jax.random.normal(getkey(), (6, 5)).astype(BF16)
    a, b = jax.random.normal(getkey(), (6, 2)), jax.random.normal(getkey(), (2, 5))
    merged = LoRAKernel(w, a, b, scale=0.3).materialize()
    exact = np.asarray(w).astype(np.float64) + 0.3 * np.asarray(a, np.float64) @ np.asarray(b)
    np.testing.assert_array_equal(np.asarray(merged), exact.astype(BF16))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_config_is_rebuilt_from_spec_and_buffers(rslora):
    names = ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj")
    params = kernel_params(16, 20, layers=3)
    adapter = init_adapter(LoRA(rank=16, rslora=rslora, targets=names), params, jax.random.key(0))
    for rank, alpha in itertools.product((1, 3, 7, 16), (0.1, 1.0, 16.0, 31.0, 12.345, 1e-3)):
        method = LoRA(rank=rank, alpha=alpha, dropout=0.05, rslora=rslora, targets=names)
        on = np.array([1, 0, 1])
        leaf = {
            "scale": np.float32(method.scale) * np.float32(on),
            "rank": rank * on,
            "dropout": np.full(3, 0.05, np.float32),
            "rslora": rslora & (on > 0),
        }
        buffers = {"layers": {"mlp": {"up_proj": {"kernel": leaf}}}}
        assert config_of(adapter.replace(buffers=buffers)) == method


def test_layers_with_and_without_rslora_have_a_config_with_their_scales():
    params, key = kernel_params(6, 5), jax.random.key(0)
    adapter = init_adapter(LoRA(rank=3, alpha=2.0), params, key)
    place = "layers/mlp/up_proj/kernel"
    both = {f"{place}/rslora": jnp.array([True, False]), f"{place}/rank": jnp.array([2, 3])}
    method = config_of(adapter.replace(buffers=paths.put(adapter.buffers, both)))
    assert not method.rslora
    again = init_adapter(method, params, key).buffers
    np.testing.assert_array_equal(paths.get(again, f"{place}/rank"), [2, 3])
    np.testing.assert_array_equal(paths.get(again, f"{place}/scale"), np.float32([2 / 3, 2 / 3]))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 5.5, 0.1, 1e-4, 1e-11, 1 / 3])
def test_alpha_is_found_again_from_the_scale(alpha, rslora):
    for rank in range(1, 65):
        divisor = rank**0.5 if rslora else rank
        scale = np.float32(alpha / divisor)
        found = shortest_decimal(scale, divisor)
        assert np.float32(found / divisor) == scale
        assert found == pytest.approx(alpha, rel=1e-6)
        assert found == alpha or alpha == 1 / 3


def test_adapters_whose_layers_differ_in_dropout_have_no_single_config():
    adapter = init_adapter(LoRA(rank=2), kernel_params(6, 5), jax.random.key(0))
    leaf = adapter.buffers["layers"]["mlp"]["up_proj"]["kernel"]
    leaf = {**leaf, "dropout": jnp.array([0.1, 0.2])}
    mixed = adapter.replace(buffers={"layers": {"mlp": {"up_proj": {"kernel": leaf}}}})
    with pytest.raises(UserError, match="differ in dropout"):
        config_of(mixed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -2),
        ("rank", True),
        ("alpha", 0.0),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("targets", ()),
        ("targets", ""),
    ],
)
def test_nonsense_in_the_config_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"LoRA.{field}"):
        LoRA(**{field: value})


def test_a_rank_beyond_the_kernel_is_refused_with_the_largest_that_fits():
    with pytest.raises(UserError, match=r"LoRA.rank 6 exceeds .*up_proj.*at most 5"):
        init_adapter(LoRA(rank=6), kernel_params(7, 5), jax.random.key(0))


def test_an_adapter_of_another_base_is_refused():
    adapter = init_adapter(LoRA(rank=2), kernel_params(6, 5), jax.random.key(0))
    with pytest.raises(UserError, match=r"made for shape \(2, 6, 5\), this base has \(2, 6, 7\)"):
        bind(kernel_params(6, 7), adapter)
    with pytest.raises(UserError, match="1 leaves that this base lacks: layers/mlp/up_proj"):
        bind({"layers": {}}, adapter)
    with pytest.raises(UserError, match="another model"):
        merge(kernel_params(6, 5, layers=3), adapter)
