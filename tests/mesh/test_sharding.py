"""Arrays live where the table says, and eight devices train like one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from mesh_run import mesh_of
from tiny_run import make_files, write_config
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh import layouts, placement
from jaxpeft.methods.registry import KINDS
from jaxpeft.pretrained.load import load_model, load_model_config
from jaxpeft.pretrained.weights.names import param_shapes
from jaxpeft.training.run import Run

MESHES = {
    "data 8": {"data": 8},
    "tensor 2 x data 4": {"data": 4, "tensor": 2},
}


def spec(path, shape, mesh, where=placement.param_sharding):
    return where(path, shape, mesh).spec


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("embed_tokens/embedding", (96, 32), ("tensor", "fsdp")),
        ("lm_head/kernel", (32, 96), ("fsdp", "tensor")),
        ("layers/self_attn/q_proj/kernel", (2, 32, 64), (None, "fsdp", "tensor")),
        ("layers/self_attn/q_proj/bias", (2, 64), (None, "tensor")),
        ("layers/self_attn/o_proj/kernel", (2, 64, 32), (None, "tensor", "fsdp")),
        ("layers/mlp/gate_proj/kernel", (2, 32, 48), (None, "fsdp", "tensor")),
        ("layers/mlp/down_proj/kernel", (2, 48, 32), (None, "tensor", "fsdp")),
        ("layers/mlp/down_proj/bias", (2, 32), ()),
        ("layers/input_layernorm/scale", (2, 32), ()),
        ("norm/scale", (32,), ()),
        # 33 columns cannot be cut in two.
        ("layers/self_attn/k_proj/kernel", (2, 32, 33), (None, "fsdp", None)),
    ],
)
def test_base_leaves_are_cut_as_megatron_and_fsdp_do(path, shape, expected):
    assert spec(path, shape, mesh_of(data=2, fsdp=2, tensor=2)) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers/self_attn/q_proj/kernel/a", (2, 32, 4), (None, None, None)),
        ("layers/self_attn/q_proj/kernel/b", (2, 4, 64), (None, None, "tensor")),
        ("layers/mlp/down_proj/kernel/a", (2, 48, 4), (None, "tensor", None)),
        ("layers/mlp/down_proj/kernel/b", (2, 4, 32), (None, None, None)),
        ("lm_head/kernel/b", (4, 96), (None, "tensor")),
        ("layers/self_attn/q_proj/kernel/scale", (2,), ()),
        ("layers/mlp/down_proj/kernel/value", (2, 48, 32), (None, "tensor", "fsdp")),
    ],
)
def test_adapter_leaves_keep_the_tensor_axis_and_never_cut_the_rank(path, shape, expected):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    of_lora = functools.partial(placement.adapter_sharding, arrays=KINDS["lora"].arrays)
    assert spec(path, shape, mesh, of_lora) == PartitionSpec(*expected)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "mlp_bias": True, "qk_norm": True}])
def test_every_base_leaf_has_a_rule(changes, getkey):
    for path in param_shapes(toy_model(getkey(), tokenizer=False, **changes).config):
        assert layouts.spec_of(path) is not None, path


def test_replicated_leaves_are_named_with_the_reason():
    params = {
        "embed_tokens": {"embedding": jnp.zeros((96, 33))},
        "norm": {"scale": jnp.zeros(33)},
        "layers": {
            "strange": {"kernel": jnp.zeros((3, 5, 7))},
            "own": {"kernel": jnp.zeros((6, 3))},
        },
    }
    assert placement.unsharded(params, mesh_of(fsdp=2, tensor=2)) == [
        "embed_tokens/embedding: 33 does not divide by fsdp 2",
        "layers/strange/kernel: no rule, and nothing to cut of 3 x 5 x 7 divides by fsdp 2",
    ]
    assert placement.unsharded({"norm": params["norm"]}, mesh_of(tensor=2)) == []


def test_a_placed_tree_is_the_same_tree(getkey):
    params = toy_model(getkey(), tokenizer=False).params
    placed = placement.shard_params(params, mesh_of(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    kernel = placed["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 24 // 2, 16 // 2)


def test_moments_live_where_their_arrays_live(getkey):
    base, mesh = toy_model(getkey(), tokenizer=False), mesh_of(tensor=2)
    adapter = jp.init_adapter(
        jp.LoRA(rank=2, targets=("q_proj", "down_proj")), base.params, getkey()
    )
    for tx in (optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=2)):
        state = jp.init_train_state(
            base.params, adapter, jp.masked(tx, jp.adapter_only), jax.random.key(0)
        )
        arrays = KINDS[adapter.spec.kind].arrays
        placed = jax.device_put(state, placement.state_shardings(state, mesh, arrays))
        b = paths.get(placed.trained["adapter"], "layers/self_attn/q_proj/kernel/b")
        assert b.sharding.spec == PartitionSpec(None, None, "tensor")
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed.opt_state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.endswith("q_proj/kernel/b"):
                whole = leaf.shape == b.shape
                expected = b.sharding.spec if whole else PartitionSpec()
                assert leaf.sharding.spec == expected, name
        assert placed.key.sharding.spec == PartitionSpec()


def test_meshes_that_are_not_made_of_the_devices_are_refused():
    assert dict(layouts.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(layouts.make_mesh(data=2, tensor=-1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    for sizes in ({"data": 3}, {"data": -1, "tensor": 3}, {"data": 4}, {"data": 8, "fsdp": 2}):
        with pytest.raises(UserError, match=r"mesh: \{.*\} does not make 8 devices; .* 1, 2, 4, 8"):
            layouts.make_mesh(**sizes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def make_run(files, tmp_path_factory):
    """A function that builds a run of 6 steps on a mesh."""

    def make(mesh, **changes):
        output = tmp_path_factory.mktemp("runs") / "run"
        config = jp.load_config(write_config(files, output, train={"steps": 6}, **changes))
        rows = program.read_data(config, load_model_config(files.model))
        return Run(config, load_model(files.model, mesh=mesh), rows, mesh)

    return make


def trained(run, steps=range(6)) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps."""
    step, found = run.compile_step(), []
    for index in steps:
        batch = run.put(run.rows.plan.batch(index))
        run.state, metrics = step(run.state, run.base.params, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return found


@pytest.fixture(scope="module")
def on_one_device(make_run):
    run = make_run(mesh_of(data=1))
    before = run.evaluate()[0]
    return trained(run), before, run.evaluate()[0]


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_losses_of_one(make_run, on_one_device, name):
    run = make_run(mesh_of(**MESHES[name]))
    wanted = run.shardings
    curve, before, after = on_one_device
    for key, value in run.evaluate()[0].items():
        assert value == pytest.approx(before[key], rel=1e-5), key
    np.testing.assert_allclose(trained(run), curve, rtol=1e-5)
    for key, value in run.evaluate()[0].items():
        assert value == pytest.approx(after[key], rel=1e-5), key
    # The state lives where it lived before, so the one compiled step takes it again and again.
    assert jax.tree.map(lambda leaf: leaf.sharding, run.state) == wanted


def test_full_fine_tuning_spreads_weights_and_moments(make_run):
    mesh = mesh_of(data=1, fsdp=8)
    curve = trained(make_run(mesh_of(data=1), method={"name": "full"}))
    run = make_run(mesh, method={"name": "full"})
    np.testing.assert_allclose(trained(run), curve, rtol=1e-4)
    spread = [
        leaf for leaf in jax.tree.leaves((run.state.trained, run.state.opt_state)) if leaf.ndim == 3
    ]
    assert len(spread) == 3 * 7
    for leaf in spread:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def test_a_run_goes_on_on_another_mesh(make_run, on_one_device, tmp_path):
    first = make_run(mesh_of(data=8))
    curve = trained(first, range(3))
    with Checkpoints(tmp_path) as checkpoints:
        first.save(checkpoints)
        second = make_run(mesh_of(data=2, fsdp=2, tensor=2))
        second.restore(checkpoints, 3)
    for name in ("trained", "opt_state", "step", "skipped"):
        a, b = (jax.device_get(getattr(run.state, name)) for run in (first, second))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda leaf: leaf.sharding, second.state) == second.shardings
    np.testing.assert_allclose(curve + trained(second, range(3, 6)), on_one_device[0], rtol=1e-5)
