"""Where parameters of other models live: by the meaning of their axes, or by their sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign_models import MODELS, ROLES, every_model, start
from jax.sharding import PartitionSpec
from mesh_run import mesh_of

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.lifting.folded import Axes
from jaxpeft.lifting.roles import Role, Roles
from jaxpeft.lifting.trees import named_leaves
from jaxpeft.mesh import layouts, placement
from jaxpeft.mesh.any_model import axes_by_role, axes_by_size
from jaxpeft.methods.registry import KINDS

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def role(name, shape, ins, outs, stack=()):
    return Role("w", shape, jnp.float32, name, Axes(ins, outs, stack))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (role("kernel", (6, 4), (0,), (1,)), ("fsdp", "tensor")),
        (role("kernel", (6, 4), (1,), (0,)), ("tensor", "fsdp")),  # stored (out, in)
        # heads before their sizes, of which the larger is cut
        (role("kernel", (8, 2, 6), (0,), (1, 2)), ("fsdp", None, "tensor")),
        (role("kernel", (4, 2, 8), (0, 1), (2,)), ("fsdp", None, "tensor")),
        # a stack is never cut, wherever it is and however long
        (role("kernel", (64, 6, 4), (1,), (2,), (0,)), (None, "fsdp", "tensor")),
        (role("kernel", (6, 64, 4), (0,), (2,), (1,)), ("fsdp", None, "tensor")),
        (role("kernel", (64, 6, 32, 4), (1,), (3,), (0, 2)), (None, "fsdp", None, "tensor")),
        # inputs that do not divide: another axis is cut over fsdp, but not the stack
        (role("kernel", (64, 5, 2, 4), (1,), (2, 3), (0,)), (None, None, "fsdp", "tensor")),
        (role("kernel", (64, 5, 4), (1,), (2,), (0,)), (None, None, "tensor")),
        # rows of a table over tensor, as those of ours
        (role("embedding", (10, 6), (0,), (1,)), ("tensor", "fsdp")),
        # the window of a convolution is whole
        (role("convolution", (4, 4, 4, 6), (0, 1, 2), (3,)), (None, None, None, "tensor")),
        (Role("w", (4, 6), jnp.float32, "bias", of="k"), ()),
        (Role("w", (3, 8), jnp.float32, "norm"), ()),
        (Role("w", (4, 6), jnp.float32, "other", why="sorted"), (None, "fsdp")),
    ],
)
def test_roles_decide_and_stacks_are_whole(row, expected):
    assert axes_by_role(row, layouts.Layout(mesh_of(**MESH))) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 4), (None, "fsdp")),
        ((4, 6), (None, "fsdp")),
        ((4, 7), ("fsdp", None)),
        ((7, 5), (None, None)),
        ((64, 4, 6), (None, None, "fsdp")),
        ((16, 16, 3, 8), (None, None, None, "fsdp")),
        ((64, 3, 5), (None, None, None)),
        ((8,), ()),
        ((), ()),
    ],
)
def test_without_roles_the_last_axis_is_cut_or_the_one_before_it(shape, expected):
    assert axes_by_size(shape, layouts.Layout(mesh_of(**MESH))) == expected
    whole = axes_by_size(shape, layouts.Layout(mesh_of(data=8)))
    assert not any(whole)


def test_a_rule_of_the_user_comes_before_roles_and_those_of_our_models_do_not():
    rules = layouts.parse_rules({"blocks/w": "- tensor -"})
    layout = layouts.Layout(mesh_of(**MESH), rules)
    axes = Axes((1,), (0,), (2,))
    own, ours = "blocks/w", "layers/self_attn/q_proj/kernel"
    params = {"blocks": {"w": jnp.zeros((4, 4, 4))}}
    params |= {"layers": {"self_attn": {"q_proj": {"kernel": jnp.zeros((6, 4, 8))}}}}
    shapes = named_leaves(params)
    rows = {p: Role(p, shapes[p].shape, jnp.float32, "kernel", axes) for p in (own, ours)}
    placed = named_leaves(jp.shard_params(params, layout, Roles(rows)))
    assert placed[own].sharding.spec == PartitionSpec(None, "tensor", None)
    # The axis of the stack is the last one there; the rule of our models would cut it.
    assert placed[ours].sharding.spec == PartitionSpec("tensor", "fsdp", None)


def test_what_stays_whole_is_named():
    params = [{"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}, {"kernel": jnp.zeros((4, 5))}]
    assert placement.unsharded(params, mesh_of(fsdp=2)) == [
        "0/kernel: no rule, and nothing to cut of 3 x 5 divides by fsdp 2"
    ]
    assert placement.unsharded(params, mesh_of(tensor=2)) == [
        "0/kernel: no rule, and the mesh has no fsdp",
        "1/kernel: no rule, and the mesh has no fsdp",
    ]
    rows = {
        path: Role(path, leaf.shape, jnp.float32, "kernel", Axes((0,), (1,)))
        for path, leaf in named_leaves(params).items()
        if path.endswith("kernel")
    } | {"0/bias": Role("0/bias", (5,), jnp.float32, "bias", of="0/kernel")}
    assert placement.unsharded(params, mesh_of(tensor=2, fsdp=2), Roles(rows)) == [
        "0/kernel: nothing to cut of 3 x 5 divides by fsdp 2 or tensor 2",
    ]
    with pytest.raises(UserError, match="roles: they have no 1/kernel; describe the model"):
        jp.shard_params(
            params, mesh_of(fsdp=2), Roles({k: rows[k] for k in ("0/kernel", "0/bias")})
        )


@every_model
def test_a_lifted_model_computes_the_same_wherever_its_weights_are(model):
    function, params, variables, inputs = MODELS[model]
    expected = jax.jit(function)(variables(params), *inputs)
    for roles in (None, ROLES[model]):
        placed = jp.shard_params(params, mesh_of(**MESH), roles)
        cut = [leaf for leaf in jax.tree.leaves(placed) if any(leaf.sharding.spec)]
        assert cut
        actual = jax.jit(function)(variables(placed), *inputs)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["linen", "nnx", "scanned"])
def test_quantised_kernels_are_cut_by_whole_blocks(model):
    function, params, variables, inputs = MODELS[model]
    coded = jp.quantize(params, roles=ROLES[model])
    mesh = mesh_of(**MESH)
    placed = jp.shard_params(coded, mesh, ROLES[model])
    cut = [leaf for leaf in jax.tree.leaves(placed) if any(leaf.sharding.spec)]
    assert any("tensor" in leaf.sharding.spec for leaf in cut if leaf.dtype == jnp.uint8)
    assert any(
        "1 blocks of 64 do not divide by" in note for note in placement.unsharded(coded, mesh)
    )
    expected = jax.jit(jp.lift(function))(variables(coded), *inputs)
    actual = jax.jit(jp.lift(function))(variables(placed), *inputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_trained_leaves_and_moments_are_placed_alike_though_modules_have_odd_names():
    """Modules are called like the parts of a state; one is a part of whole variables."""
    kernel = jnp.ones((4, 6))
    params = {"params": {"base": {"adapter": {"kernel": kernel}}, "frozen": {"w": kernel}}}
    function = lambda p, x: x @ p["params"]["base"]["adapter"]["kernel"]  # noqa: E731
    roles = jp.describe(function, params, jnp.ones((1, 4)))
    method = jp.LoRA(rank=2, targets="all-linear")
    adapter = jp.init_adapter(method, params, jax.random.key(0), roles=roles)
    tx = jp.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda leaf: True, tree))
    state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
    mesh = mesh_of(fsdp=2, tensor=2)
    where = placement.state_shardings(state, mesh, KINDS["lora"].arrays)
    expected = placement.shard_params(params, mesh)["params"]["frozen"]["w"].sharding.spec
    assert expected == PartitionSpec(None, "fsdp")
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
    found = [place.spec for leaf, place in pairs if leaf.shape == (4, 6)]
    assert found == [expected] * 6  # two arrays with two moments each


def test_an_adapter_of_a_stack_is_replicated():
    adapter = start("scanned", "lora")
    tx = jp.masked(optax.adam(0.1), jp.adapter_only)
    state = jp.init_train_state(MODELS["scanned"][1], adapter, tx, jax.random.key(0))
    where = placement.state_shardings(state, mesh_of(**MESH), KINDS["lora"].arrays)
    assert all(not any(place.spec) for place in jax.tree.leaves(where))
