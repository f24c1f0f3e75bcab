"""What a jitted function was traced for is a part of what it is cached by."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mesh_run import mesh_of

from jaxpeft.mesh.constraints import by_group, copy_for_groups, gathered, groups_of_rows, traced_on
from jaxpeft.mesh.layouts import Layout, parse_rules

PATH = "layers/mlp/up_proj/kernel"


def test_a_jitted_function_is_traced_again_for_other_rules_on_the_same_mesh():
    mesh = mesh_of(1, 2, 4)
    usual, other = Layout(mesh), Layout(mesh, parse_rules({PATH: "- tensor -"}))
    numbers = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    kernel = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec()))
    traces = []

    @jax.jit
    def use(kernel):
        traces.append(1)
        whole = gathered(PATH, kernel)
        return whole, jnp.ones((3, 8)) @ whole

    # Columns are cut by the table's own rule, rows by the other one.
    cuts = ((usual, (None, "tensor")), (other, ("tensor", None)), (usual, (None, "tensor")))
    for layout, axes in cuts:
        with traced_on(layout):
            whole, sums = use(kernel)
        expected = NamedSharding(mesh, PartitionSpec(*axes))
        assert whole.sharding.is_equivalent_to(expected, whole.ndim)
        np.testing.assert_array_equal(whole, numbers)
        np.testing.assert_allclose(sums, [numbers.sum(axis=0)] * 3, rtol=1e-5, atol=1e-5)
    assert len(traces) == 2


def test_a_jitted_function_counts_one_group_inside_a_group_of_rows():
    weight, rows = jnp.float32(3), np.arange(8, dtype=np.float32).reshape(4, 2)
    count = jax.jit(lambda weight, rows: weight * rows * groups_of_rows())
    with traced_on(Layout(mesh_of(2, 1, 1))):
        np.testing.assert_array_equal(count(weight, rows[:2]), 3 * rows[:2] * 2)
        inside = jax.jit(by_group(count, 2))(copy_for_groups(weight, 2), rows)
    np.testing.assert_array_equal(inside, 3 * rows)


def test_the_outer_of_two_layouts_stays_in_force():
    outer, inner = (Layout(mesh_of(groups, 1, 1)) for groups in (4, 2))
    with traced_on(outer):
        with traced_on(inner):
            assert groups_of_rows() == 4
        assert groups_of_rows() == 4
    assert groups_of_rows() == 1
