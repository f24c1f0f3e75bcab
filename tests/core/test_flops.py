"""The counter against a formula by hand and against XLA's own count of programs without loops."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_decoder import CONFIG

from jaxpeft.core.flops import at_most, count_flops
from jaxpeft.models.transformer import Transformer

IDS = jax.ShapeDtypeStruct((3, 32), jnp.int32)


def model(remat="none", **changes):
    module = Transformer(dataclasses.replace(CONFIG, **changes), jnp.float32, remat)
    return module, jax.eval_shape(module.init, jax.random.key(0), IDS)


def by_hand(c, rows, seq):
    """Products of one forward pass."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kernels = c.d_model * (q + 2 * kv) + q * c.d_model + 3 * c.d_model * c.d_ff
    scores_and_sums = 2 * rows * q * seq**2 * 2
    layers = c.num_layers * (2 * rows * seq * kernels + scores_and_sums)
    return layers, 2 * rows * seq * c.d_model * c.vocab_size


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_a_forward_pass_costs_what_the_formula_says(layers):
    module, variables = model(num_layers=layers)
    assert count_flops(module.apply, variables, IDS) == sum(by_hand(module.config, 3, 32))


def test_twice_the_depth_doubles_the_part_of_the_layers():
    def cost(layers):
        module, variables = model("full", num_layers=layers)
        return count_flops(jax.grad(lambda v, ids: module.apply(v, ids).sum()), variables, IDS)

    assert cost(4) - cost(2) == 2 * (cost(2) - cost(1)) > 0


def test_rematerialised_layers_cost_one_more_forward_pass():
    def cost(remat):
        module, variables = model(remat)
        return count_flops(jax.grad(lambda v, ids: module.apply(v, ids).sum()), variables, IDS)

    # All of a layer but its last product, whose result the backward pass does not need.
    layers, _ = by_hand(CONFIG, 3, 32)
    last = CONFIG.num_layers * 2 * 3 * 32 * CONFIG.d_ff * CONFIG.d_model
    assert cost("full") - cost("none") == layers - last


def test_the_count_of_a_program_without_loops_is_that_of_xla():
    wide = {"num_layers": 1, "d_model": 64, "d_ff": 128, "head_dim": 16}
    module, variables = model(**wide)
    function = jax.jit(jax.value_and_grad(lambda v, ids: jnp.square(module.apply(v, ids)).sum()))
    xla = function.lower(variables, IDS).compile().cost_analysis()["flops"]
    # XLA counts elementwise work as well.
    assert 0.9 < count_flops(function, variables, IDS) / xla <= 1.0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_and_their_gradients_count_as_xla_counts_them(stride, groups):
    """Without padding, which XLA leaves out, and with sizes that the stride divides."""
    x, kernel = jnp.ones((2, 16, 16, 8)), jnp.ones((2, 2, 8 // groups, 12))

    def run(x, kernel):
        out = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.square(out).sum()

    side = (16 - 2) // stride + 1
    forward = 2 * 2 * side**2 * 12 * (2 * 2 * 8 // groups)
    assert count_flops(run, x, kernel) == forward
    # The gradient of the kernel costs the same, and so does that of the input, up to its edge.
    count = count_flops(jax.grad(run, 1), x, kernel)
    assert count == 2 * forward
    xla = jax.jit(jax.grad(run, 1)).lower(x, kernel).compile().cost_analysis()["flops"]
    assert 0.9 < count / xla <= 1.0
    both = count_flops(jax.grad(run, (0, 1)), x, kernel)
    assert both == pytest.approx(3 * forward, rel=0.15)


def test_products_in_groups_count_every_row_once():
    rows, groups = jnp.ones((10, 4)), jnp.array([3, 7])
    kernels = jnp.ones((2, 4, 6))
    run = lambda rows, kernels: jax.lax.ragged_dot(rows, kernels, groups).sum()  # noqa: E731
    assert count_flops(run, rows, kernels) == 2 * 10 * 4 * 6
    assert count_flops(jax.grad(run, (0, 1)), rows, kernels) == 2 * 2 * 10 * 4 * 6


def test_work_whose_result_is_not_used_is_not_counted():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def body(carry, _):
        used, unused = carry
        return (used @ used, unused @ unused), None

    def run(x):
        return jax.lax.scan(body, (x, x), None, length=5)[0][0]

    assert count_flops(run, x) == 5 * 2 * 4**3


def test_the_most_expensive_branch_of_a_condition_counts():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def run(x):
        return jax.lax.cond(x.sum() > 0, lambda y: y @ y, lambda y: y @ y @ y, x)

    assert count_flops(jax.jit(run), x) == 2 * 2 * 4**3


def test_a_loop_whose_trip_count_is_data_counts_as_often_as_it_says():
    def run(x, times, inner):
        def outer_body(_, x):
            with at_most(3):
                return jax.lax.fori_loop(0, inner, lambda _, x: x @ x, x)

        def said(x):
            with at_most(7):
                return jax.lax.fori_loop(0, times, outer_body, x)

        return jax.lax.fori_loop(0, times, lambda _, x: x @ x, said(x))

    x = jnp.ones((4, 4))
    assert count_flops(run, x, 2, 2) == (7 * 3 + 1) * 2 * 4**3
    stacked = jnp.ones((5, 4, 4))
    many = jax.vmap(run, in_axes=(0, None, None))
    assert count_flops(many, stacked, 2, 2) == 5 * (7 * 3 + 1) * 2 * 4**3


def test_rows_of_groups_count_once():
    """A product with the group's matrix for each row, and two more in the backward pass."""
    x, w, sizes = jnp.ones((10, 4)), jnp.ones((3, 4, 6)), jnp.array([5, 2, 3])
    loss = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()  # noqa: E731
    once = 2 * 10 * 4 * 6
    assert count_flops(loss, x, w) == once
    square = lambda x, w: jnp.square(jax.lax.ragged_dot(x, w, sizes)).sum()  # noqa: E731
    assert count_flops(jax.grad(square, argnums=(0, 1)), x, w) == 3 * once
