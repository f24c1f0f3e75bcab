"""LoRA's initialisers by their laws and against float64 NumPy; NF4 against a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nf4_levels import normal_levels
from tiny_decoder import decoder, draw

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.binding import bind, init_adapter
from jaxpeft.methods.lora import starts
from jaxpeft.methods.lora.config import LoRA, config_of
from jaxpeft.methods.merging import merge
from jaxpeft.ops.quant import nf4_round_trip
from jaxpeft.pretrained.adapters import load_adapter, save_adapter
from jaxpeft.pretrained.model import Model

IDS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
MODULE, PARAMS = decoder()
PATH = "layers/mlp/up_proj/kernel"
apply = jax.jit(MODULE.apply)


@functools.cache
def new(name, **values):
    method = LoRA(**{"rank": 4, "alpha": 6.0, "init_weights": name, **values})
    return jax.jit(functools.partial(init_adapter, method))(PARAMS, jax.random.key(0))


def moved(adapter):
    shift = draw(adapter.params, seed=1, scale=0.2)
    params = jax.tree.map(lambda x, y: jax.device_put(np.add(x, y)), adapter.params, shift)
    return adapter.replace(params=params)


def logits(adapter=None):
    return apply(bind(PARAMS, adapter), IDS)


def products(adapter):
    place = paths.get(adapter.params, PATH)
    return np.asarray(place["a"], np.float64) @ np.asarray(place["b"], np.float64)


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def test_gaussian_has_the_standard_deviation_of_one_over_the_rank():
    a, b = starts.gaussian(jax.random.key(0), jnp.zeros((2000, 50)), 8, 1.0)
    assert a.shape == (2000, 8)
    assert not np.asarray(b).any()
    # The standard error of a deviation from n numbers is sd / sqrt(2 n); the mean's sd / sqrt(n).
    assert abs(np.std(a) * 8 - 1) < 5 / np.sqrt(2 * a.size)
    assert abs(np.mean(a) * 8) < 5 / np.sqrt(a.size)


def test_orthogonal_factors_are_random_and_their_product_is_zero():
    a, b = starts.orthogonal(jax.random.key(0), jnp.zeros((300, 200)), 8, 1.0)
    np.testing.assert_allclose(a @ b, np.zeros((300, 200)), atol=1e-6)
    # Half as many independent normal numbers of deviation 0.1 as there are rows times rank.
    for factor, side in ((a, 300), (b, 200)):
        assert np.linalg.matrix_rank(np.asarray(factor)) == 4
        energy = np.square(np.asarray(factor)).sum() / (0.01 * side * 4)
        assert abs(energy - 1) < 5 * np.sqrt(2 / (side * 4))


def test_pissa_is_the_principal_part_split_evenly():
    adapter = new("pissa")
    w = np.asarray(paths.get(PARAMS, PATH))
    np.testing.assert_allclose(6 / 4 * products(adapter), truncated(w, 4), rtol=1e-4, atol=1e-5)
    place = paths.get(adapter.params, PATH)
    norms = np.linalg.norm(place["a"], axis=-2), np.linalg.norm(place["b"], axis=-1)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_olora_is_the_head_of_the_qr_decomposition_of_the_transposed_kernel():
    adapter = new("olora", rank=3)
    w = np.asarray(paths.get(PARAMS, PATH), np.float64)
    q, r = np.linalg.qr(np.swapaxes(w, -1, -2))
    expected = np.swapaxes(q[..., :3] @ r[..., :3, :], -1, -2)  # signs of Q and R cancel
    np.testing.assert_allclose(products(adapter), expected, rtol=1e-4, atol=1e-5)
    b = np.asarray(paths.get(adapter.params, PATH)["b"])
    np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), [np.eye(3)] * len(b), atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "pissa", "olora"])
def test_a_new_adapter_leaves_the_model_as_it_is(name):
    np.testing.assert_allclose(logits(new(name)), logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("key", [None, 0])
def test_function_and_gradients_are_those_of_the_kernel_less_the_first_product(name, key):
    """PEFT's way: a changed base and plain factors."""
    start = new(name)
    adapter = moved(start)
    rest = {
        path: paths.get(PARAMS, path)
        - 6 / 4 * paths.get(start.params, f"{path}/a") @ paths.get(start.params, f"{path}/b")
        for path in start.spec.paths
    }
    plain = new("gaussian").replace(params=adapter.params)
    key = None if key is None else jax.random.key(key)
    rates = {f"{path}/dropout": jnp.full(2, 0.3) for path in start.spec.paths}

    def loss(p, params, like):
        one = like.replace(params=p, buffers=paths.put(like.buffers, rates))
        return jnp.square(MODULE.apply(bind(params, one, dropout_key=key), IDS)).mean()

    run = jax.jit(jax.value_and_grad(loss))
    actual = run(adapter.params, PARAMS, adapter)
    expected = run(adapter.params, paths.put(PARAMS, rest), plain)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 2e-3, 2e-4), actual, expected)


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_merges_and_is_saved_as_a_plain_lora_of_twice_the_rank(name, rslora, tmp_path):
    adapter = moved(new(name, rslora=rslora))
    np.testing.assert_allclose(
        logits(adapter), apply({"params": merge(PARAMS, adapter)}, IDS), rtol=1e-4, atol=1e-4
    )
    config = MODULE.config
    base = Model(PARAMS, config, MODULE, None, "", "base")
    save_adapter(tmp_path / "out", adapter, base)
    again = load_adapter(tmp_path / "out", base)
    assert again.spec.rank == 8
    assert "init_weights" not in dict(again.spec.options)
    np.testing.assert_allclose(logits(again), logits(adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_config_is_rebuilt_with_its_initialisation(name):
    assert config_of(new(name)).init_weights == name


def test_layers_that_are_not_adapted_hold_zeros():
    adapter = new("pissa", targets=("layers.1.mlp.up_proj",))
    for tree in (adapter.params, adapter.buffers):
        for name, leaf in paths.get(tree, PATH).items():
            assert name == "dropout" or not np.asarray(leaf[0]).any()


def nf4_by_hand(w):
    """Blocks of 64 down every column, the nearest of the 16 values times the largest magnitude."""
    out, levels = np.zeros(w.shape), normal_levels()
    for column in range(w.shape[1]):
        for first in range(0, w.shape[0], 64):
            block = w[first : first + 64, column].astype(np.float64)
            scale = np.abs(block).max()
            near = np.abs(block[:, None] / scale - levels).argmin(1)
            out[first : first + 64, column] = levels[near] * scale
    return out


def test_nf4_is_the_nearest_value_in_blocks_of_64():
    w = np.random.default_rng(0).standard_normal((150, 7)).astype(np.float32)
    np.testing.assert_allclose(nf4_round_trip(jnp.asarray(w)), nf4_by_hand(w), 1e-6, 1e-7)
    np.testing.assert_array_equal(nf4_round_trip(jnp.zeros((70, 2))), np.zeros((70, 2)))


def test_loftq_approximates_what_the_quantised_kernel_lacks_and_more_steps_do_better():
    w = np.random.default_rng(0).standard_normal((96, 40)).astype(np.float32)
    errors = []
    for steps in (1, 2, 5):
        rest = w.astype(np.float64)
        for _ in range(steps):
            quantized = nf4_by_hand(rest.astype(np.float32))
            low = truncated(w - quantized, 8)
            rest = w - low
        a, b = starts.loftq(jax.random.key(0), jnp.asarray(w), 8, 1.0, steps=steps)
        errors.append(np.linalg.norm(w - quantized - low))
        if steps == 1:
            np.testing.assert_allclose(a @ b, low, rtol=1e-3, atol=1e-4)
        ours = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        assert np.linalg.norm(ours - low) < 0.05 * np.linalg.norm(low)
    assert errors[-1] < errors[0] < np.linalg.norm(w - nf4_by_hand(w))


def test_nonsense_is_refused():
    for values, message in (
        ({"init_weights": "pizza"}, "must be one of"),
        ({"init_weights": "orthogonal", "rank": 3}, "must be even"),
        ({"init_weights": "pissa", "dora": True}, "dora must be false"),
        ({"init_weights": "loftq", "loftq_steps": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRA(**values)
    with pytest.raises(UserError, match="not their shapes"):
        init_adapter(
            LoRA(rank=2, init_weights="pissa"), jax.eval_shape(lambda: PARAMS), jax.random.key(0)
        )
