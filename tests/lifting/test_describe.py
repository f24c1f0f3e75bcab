"""`describe`: roles come from the trace, whatever parameters are called."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def root(x):
    return jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


TABLE = Axes((0,), (1,), table=True)
CASES = {
    "kernel": (lambda p, x: x @ p, (4, 5), "kernel", Axes((0,), (1,))),
    "turned kernel": (lambda p, x: x @ p.T, (5, 4), "kernel", Axes((1,), (0,))),
    "heads": (
        lambda p, x: jnp.einsum("bd,dnh->bnh", x, p),
        (4, 2, 3),
        "kernel",
        Axes((0,), (1, 2)),
    ),
    "heads in front": (
        lambda p, x: jnp.einsum("bd,ndh->bnh", x, p),
        (2, 4, 3),
        "kernel",
        Axes((1,), (0, 2)),
    ),
    "layers": (
        lambda p, x: jax.lax.scan(lambda y, w: (y @ w, None), x, p)[0],
        (3, 4, 4),
        "kernel",
        Axes((1,), (2,), (0,)),
    ),
    "layers of experts": (
        lambda p, x: jax.lax.scan(
            lambda y, w: (jnp.einsum("ebd,edf->ebf", jnp.stack([y, y]), w).sum(0), None),
            x,
            jnp.moveaxis(p, 1, 0),
        )[0],
        (2, 3, 4, 4),
        "kernel",
        Axes((2,), (3,), (0, 1)),
    ),
    "table": (lambda p, x: p[x.astype(jnp.int32)], (9, 5), "embedding", TABLE),
    "tied table": (
        lambda p, x: p[x.astype(jnp.int32)] @ p.T,
        (9, 5),
        "embedding",
        dataclasses.replace(TABLE, tied=True),
    ),
    "norm": (lambda p, x: rms(x, p), (4,), "norm", None),
    "norm around one": (lambda p, x: rms(x, 1 + p), (4,), "norm", None),
    "norm that divides last": (lambda p, x: p * x / root(x), (4,), "norm", None),
    "norm around one that divides last": (lambda p, x: (1 + p) * x / root(x), (4,), "norm", None),
    "norm that multiplies last": (lambda p, x: x * p * (1 / root(x)), (4,), "norm", None),
    "a scale over the root of a size": (
        lambda p, x: p * x / jnp.sqrt(jnp.asarray(x.shape[-1], jnp.float32)),
        (4,),
        "other",
        None,
    ),
    "a scale over the root of an input": (
        lambda p, x: p * x * jax.lax.rsqrt(x[0, 0]),
        (4,),
        "other",
        None,
    ),
    "numbers that are looked up": (lambda p, x: p[x.astype(jnp.int32)], (9,), "other", None),
    "a scale before a norm": (lambda p, x: rms(p * x, 1.0), (4,), "other", None),
    "a scale before a norm that divides": (lambda p, x: p * x / root(p * x), (4,), "other", None),
    "a norm, and a scale of what is multiplied": (
        lambda p, x: (p * x) @ jnp.ones((4, 4)) + p * x / root(x),
        (4,),
        "other",
        None,
    ),
    "a norm, and a scale": (lambda p, x: p * x + p * x / root(x), (4,), "other", None),
    "unused": (lambda p, x: x, (4,), "unused", None),
    "a scale": (lambda p, x: x * p, (4,), "other", None),
    "an offset": (lambda p, x: x + p, (4,), "other", None),
    "a weight that is scaled": (lambda p, x: x @ (2 * p), (4, 5), "other", None),
    "a normalised weight": (
        lambda p, x: x @ (p * jax.lax.rsqrt((p * p).sum(0))),
        (4, 5),
        "other",
        None,
    ),
    "a part": (lambda p, x: x @ p[:, :2], (4, 5), "other", None),
    "used both ways": (lambda p, x: x @ p @ p, (4, 4), "kernel", Axes((0,), (1,))),
    "used in two ways": (lambda p, x: (x @ p) + (x @ p.T), (4, 4), "other", None),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[:, :, None], p, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (3, 1, 6),
        "convolution",
        Axes((0, 1), (2,)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_role_of_a_parameter_is_what_the_model_does_with_it(name):
    function, shape, role, axes = CASES[name]
    (row,) = jp.describe(lambda p, x: function(p["q"], x), {"q": f32(*shape)}, f32(2, 4)).values()
    assert (row.role, row.axes) == (role, axes)
    assert row.tied == (name == "tied table")
    assert bool(row.why) == (role == "other")


def test_names_say_nothing():
    """A kernel called bias, a bias called kernel, and a norm called embedding."""

    def model(p, x):
        return rms(x @ p["bias"] + p["kernel"], p["embedding"])

    found = jp.describe(
        model, {"bias": f32(4, 4), "kernel": f32(4), "embedding": f32(4)}, f32(2, 4)
    )
    assert {path: row.role for path, row in found.items()} == {
        "bias": "kernel",
        "kernel": "bias",
        "embedding": "norm",
    }
    assert found["kernel"].of == "bias"


def test_a_scale_before_a_norm_hides_nothing_of_the_norm():
    found = jp.describe(
        lambda p, x: rms(x * p["skip"], p["scale"]), {"skip": f32(4), "scale": f32(4)}, f32(2, 4)
    )
    assert {path: row.role for path, row in found.items()} == {"skip": "other", "scale": "norm"}


def test_the_table_lists_every_parameter():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 4, name="words")(ids)
            x = nn.LayerNorm(name="norm")(nn.DenseGeneral((2, 3), name="heads")(x).reshape(2, 6))
            return nn.Dense(5, name="last", use_bias=False)(x)

    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(Net().init, jax.random.key(0), ids)
    assert (
        str(jp.describe(Net().apply, params, ids))
        == """\
parameter        shape      role       all-linear  axes
heads/bias       2 x 3      bias                   of heads/kernel
heads/kernel     4 x 2 x 3  kernel     yes         in 0, out 1 2
last/kernel      6 x 5      kernel     yes         in 0, out 1
norm/bias        6          norm
norm/scale       6          norm
words/embedding  7 x 4      embedding              in 0, out 1"""
    )


def test_state_beside_the_parameters_passes_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    x = jax.random.normal(jax.random.key(1), (5, 4))
    variables = Net().init(jax.random.key(0), x)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}

    def apply(params, state, x):
        return Net().apply({"params": params} | state, x, mutable=["batch_stats"])

    found = jp.describe(apply, params, state, x)
    assert {path: row.role for path, row in found.items()} == {
        "BatchNorm_0/bias": "norm",
        "BatchNorm_0/scale": "norm",
        "Dense_0/bias": "bias",
        "Dense_0/kernel": "kernel",
    }
    adapter = jp.init_adapter(
        jp.LoRA(rank=2, targets="all-linear"), params, jax.random.key(2), roles=found
    )
    drawn = jax.random.normal(jax.random.key(3), (2, 3))
    adapter = adapter.replace(
        params={"Dense_0": {"kernel": adapter.params["Dense_0"]["kernel"] | {"b": drawn}}}
    )
    y, new = jax.jit(jp.lift(apply))(jp.bind(params, adapter)["params"], state, x)
    expected, merged = jax.jit(apply)(jp.merge(params, adapter), state, x)
    for one, other in zip(*map(jax.tree.leaves, ((y, new), (expected, merged))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert abs(new["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
