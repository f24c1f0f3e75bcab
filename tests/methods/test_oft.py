"""OFT's rotations against float64 NumPy and the laws of orthogonal matrices; PEFT's blocks."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from tiny_decoder import CONFIG, decoder

import jaxpeft as jp
from jaxpeft.methods.binding import bind, check_fit
from jaxpeft.methods.kernels.cayley import cayley
from jaxpeft.methods.kernels.oft import OFT, OFTKernel, size_in_peft
from jaxpeft.models.config import ModelConfig

RNG = np.random.default_rng(0)
Q = RNG.normal(size=(3, 6)).astype(np.float32)  # three blocks of size four


def skew(q):
    out = np.zeros((*q.shape[:-1], 4, 4))
    out[..., [0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]] = q
    return out - np.swapaxes(out, -1, -2)


def test_the_exact_rotation_is_cayleys_transform_and_orthogonal():
    s, eye = skew(Q.astype(np.float64)), np.eye(4)
    expected = (eye - s) @ np.linalg.inv(eye + s)
    actual = np.asarray(cayley(jnp.asarray(Q), True, 5))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual @ np.swapaxes(actual, -1, -2) - eye, 0, atol=1e-5)


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
def test_the_series_has_the_terms_of_peft(terms):
    s, eye = skew(Q.astype(np.float64)), np.eye(4)
    last = {2: 1, 3: 3, 4: 3, 5: 4, 6: 5}[terms]  # three and four are the same in PEFT
    power = np.linalg.matrix_power
    expected = eye + 2 * sum(power(s, n) for n in range(1, last))
    expected = eye + 2 * s if terms == 2 else expected + power(s, last)
    actual = cayley(jnp.asarray(Q), False, terms)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_the_two_modes_are_each_others_transpose_for_small_rotations():
    small = jnp.asarray(0.01 * Q)
    exact, series = cayley(small, True, 5), cayley(small, False, 5)
    np.testing.assert_allclose(np.swapaxes(exact, -1, -2), series, atol=1e-6)


def test_inputs_are_rotated_before_they_meet_the_base():
    x, w = RNG.normal(size=(2, 5, 12)), RNG.normal(size=(12, 7))
    s, eye = skew(Q.astype(np.float64)), np.eye(4)
    r = (eye - s) @ np.linalg.inv(eye + s)
    rotated = np.concatenate([x[..., 4 * i : 4 * i + 4] @ r[i] for i in range(3)], -1)
    node = OFTKernel(jnp.asarray(w, jnp.float32), jnp.asarray(Q), jnp.int32(1), exact=True)
    actual = jax.jit(node.multiply)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, rotated @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x @ np.asarray(node.materialize()), actual, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_is_the_base_to_the_last_bit_also_in_half_precision():
    x = jnp.asarray(RNG.normal(size=(4, 12)), jnp.bfloat16)
    w = jnp.asarray(RNG.normal(size=(12, 7)), jnp.bfloat16)
    node = OFTKernel(w, jnp.zeros((3, 6)), jnp.int32(1))
    np.testing.assert_array_equal(jax.jit(node.multiply)(x), jax.jit(jnp.matmul)(x, w))


def test_a_block_size_that_does_not_divide_is_refused_with_sizes_that_do():
    params = decoder(CONFIG)[1]
    with pytest.raises(jp.UserError, match=r"has 24 inputs, which 16 does not .* 8, 12, 24\."):
        OFT(block_size=16, targets=("down_proj",)).init(params, jax.random.key(0))


def test_an_adapter_of_another_width_is_refused():
    adapter = OFT(block_size=4).init(decoder(CONFIG)[1], jax.random.key(0))
    wide = ModelConfig(**{**dataclasses.asdict(CONFIG), "d_model": 32})
    with pytest.raises(jp.UserError, match="belongs to another model"):
        check_fit(decoder(wide)[1], adapter)


def test_layers_that_are_not_chosen_have_no_gradient():
    params = decoder(CONFIG)[1]
    adapter = OFT(block_size=4, targets=("layers.1.mlp.up_proj",)).init(params, jax.random.key(0))
    x = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)

    def total(p):
        node = bind(params, adapter.replace(params=p))["params"]["layers"]["mlp"]["up_proj"]
        return jax.vmap(lambda n, v: n.multiply(v))(node["kernel"], x).sum()

    q = jax.grad(total)(adapter.params)["layers"]["mlp"]["up_proj"]["kernel"]["q"]
    assert not q[0].any()
    assert q[1].any()


@pytest.mark.parametrize(("field", "value"), [("block_size", 1), ("terms", 1), ("targets", ())])
def test_nonsense_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"OFT\.{field} must"):
        OFT(**{field: value})


def folder_with(tmp_path, name, **values):
    folder = shutil.copytree(GOLDEN / "methods" / name, tmp_path / name)
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text()) | values
    file.write_text(json.dumps(values))
    return folder, jp.load_model(GOLDEN / "models" / values["base_model_name_or_path"])


@pytest.mark.parametrize(
    ("d_in", "wanted", "found"),
    [(32, 5, 4), (32, 7, 8), (32, 12, 8), (32, 40, 32), (48, 32, 24), (48, 7, 6), (97, 32, 1)],
)
def test_what_does_not_divide_becomes_what_peft_makes_of_it(d_in, wanted, found):
    """Expected: ``OFTLayer.adjust_oft_parameters`` of PEFT 0.21."""
    assert size_in_peft(d_in, wanted, 0) == found
    assert size_in_peft(d_in, 0, wanted) == d_in // found


@pytest.mark.parametrize("values", [{"oft_block_size": 5}, {"oft_block_size": 0, "r": 9}])
def test_a_folder_whose_blocks_peft_adjusted_loads_the_same(tmp_path, values):
    folder, base = folder_with(tmp_path, "oft_exact", **values)  # 8 blocks of 4
    loaded = jp.load_adapter(folder, base)
    jax.tree.map(
        np.testing.assert_array_equal,
        loaded,
        jp.load_adapter(GOLDEN / "methods" / "oft_exact", base),
    )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("oft", {"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms: expected at least 2"),
        ("oft", {"r": 4, "oft_block_size": 0}, "r 4 makes blocks of .*blocks of several sizes"),
        ("oft", {"oft_block_size": 32}, "oft_block_size 32 makes blocks of .* of several sizes"),
        ("oft", {"r": 4}, "r: expected 0 beside an oft_block_size"),
        ("oft", {"oft_block_size": 0}, "r: expected 0 beside an oft_block_size"),
        ("oft_exact", {"r": 32, "oft_block_size": 0}, "blocks of one input"),
    ],
)
def test_a_folder_with_blocks_or_terms_that_we_do_not_have_is_refused(
    tmp_path, name, values, message
):
    folder, base = folder_with(tmp_path, name, **values)
    with pytest.raises(jp.UserError, match=message) as error:
        jp.load_adapter(folder, base)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_number_of_terms_is_not_read_where_rotations_are_exact(tmp_path):
    folder, base = folder_with(tmp_path, "oft_exact", num_cayley_neumann_terms=1)
    q = jp.load_adapter(folder, base).params
    expected = jp.load_adapter(GOLDEN / "methods" / "oft_exact", base).params
    jax.tree.map(np.testing.assert_array_equal, q, expected)
