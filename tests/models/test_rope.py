"""Rotary embeddings against complex rotations and the published scaling rules, in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG

from jaxpeft.models import rope
from jaxpeft.models.config import RopeScaling

LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)


def config(scaling=None, head_dim=8, theta=10000.0):
    return dataclasses.replace(CONFIG, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def llama3_by_meta(speed):
    """``apply_scaling`` of Meta's released code, branch by branch."""
    low_wavelength, high_wavelength = 8192 / 1.0, 8192 / 4.0
    wavelength = 2 * math.pi / speed
    if wavelength < high_wavelength:
        return speed
    if wavelength > low_wavelength:
        return speed / 8.0
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * speed / 8.0 + smooth * speed


def test_pairs_are_turned_as_complex_numbers():
    c, rng = config(), np.random.default_rng(0)
    x, positions = (
        rng.standard_normal((2, 5, 3, 8), np.float32),
        np.array([[0, 1, 2, 3, 4], [9] * 5]),
    )
    actual = rope.rotate(jnp.asarray(x), *rope.angles(c, jnp.asarray(positions)))
    speeds = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    turn = np.exp(1j * positions[..., None] * speeds)[:, :, None]
    z = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(actual, np.concatenate([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_only():
    c, rng = config(), np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8), np.float32)) for _ in range(2))

    def score(at, behind):
        turned = [
            rope.rotate(x, *rope.angles(c, jnp.array([[p]])))
            for x, p in ((q, at), (k, at - behind))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(100, 3), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_linear_scaling_divides_positions():
    plain, stretched = config(), config(RopeScaling(kind="linear", factor=4.0))
    positions = jnp.arange(32)[None]
    for a, b in zip(
        rope.angles(stretched, 4 * positions), rope.angles(plain, positions), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_llama3_scaling_is_that_of_the_released_code():
    c = config(LLAMA3, head_dim=128, theta=500000.0)
    speeds = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    expected = np.array([llama3_by_meta(speed) for speed in speeds])
    np.testing.assert_allclose(rope.inverse_frequencies(c), expected, rtol=1e-12)
    ratios = expected / speeds
    assert ratios[0] == 1.0
    assert ratios[-1] == 1 / 8
    assert ((ratios > 1 / 8) & (ratios < 1)).any()  # all three branches are there


def test_an_unknown_scaling_is_refused_by_name():
    with pytest.raises(ValueError, match="'linear' or 'llama3', got 'yarn'"):
        rope.inverse_frequencies(config(RopeScaling(kind="yarn", factor=2.0)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0.0}, "RopeScaling.factor must be positive and finite, got 0.0"),
        ({"factor": math.inf}, "RopeScaling.factor must be positive and finite, got inf"),
        ({"factor": math.nan}, "RopeScaling.factor must be positive and finite, got nan"),
        ({"low_freq_factor": -1.0}, "RopeScaling.low_freq_factor must be positive"),
        ({"high_freq_factor": math.inf}, "RopeScaling.high_freq_factor must be positive and"),
        ({"original_max_positions": 0}, "RopeScaling.original_max_positions must be positive"),
        ({"low_freq_factor": 4.0}, r"must be above low_freq_factor \(4.0\), got 4.0"),
    ],
)
def test_a_scaling_without_finite_frequencies_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LLAMA3, **changes)


def test_the_dtype_of_the_input_is_kept():
    cos, sin = rope.angles(config(), jnp.zeros((1, 2), jnp.int32))
    assert cos.dtype == jnp.float32
    assert rope.rotate(jnp.ones((1, 2, 1, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
