"""A family of adapters from outside of the package does all that ours do, once it is registered."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from mesh_run import mesh_of
from outside_method import KIND, OutputScaling, trained
from tiny_decoder import CONFIG, decoder, make_batch
from tiny_run import make_files, training_lines, write_config

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh import placement
from jaxpeft.methods.peft.values import FORMATS
from jaxpeft.methods.registry import KINDS, METHODS
from jaxpeft.methods.summary import count_trainable, describe_adapter

KERNEL = "layers/self_attn/q_proj/kernel"
METHOD = OutputScaling(targets=("q_proj", "model.layers.1.mlp.down_proj"))


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The family is known while the tests of this file run, and afterwards it is not."""
    tables = (KINDS, METHODS, FORMATS)
    before = [dict(table) for table in tables]
    jp.register_method(KIND)
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def scaled(adapter):
    """The base with its kernels multiplied in NumPy, as the equation says."""
    params, changed = decoder()[1], {}
    for path in adapter.spec.paths:
        gain = np.asarray(paths.get(adapter.params, f"{path}/gain"), np.float64)
        kernel = np.asarray(paths.get(params, path), np.float64)
        changed[path] = jnp.asarray(kernel * (1 + gain[..., None, :]), jnp.float32)
    return paths.put(params, changed)


def logits(params, adapter=None, tokens=None, **options):
    tokens = make_batch(3, 8)["tokens"] if tokens is None else tokens
    return decoder()[0].apply(jp.bind(params, adapter, **options), tokens)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
    )


def test_bound_and_merged_weights_are_those_of_the_equation():
    params, adapter = decoder()[1], trained(decoder()[1], METHOD, seed=1)
    expected = scaled(adapter)
    assert_close(logits(params, adapter), logits(expected))
    assert_close(jp.merge(params, adapter), expected)


def test_the_real_step_trains_the_gains_alone_and_the_loss_falls():
    module, params = decoder()
    adapter = METHOD.init(params, jax.random.key(0))
    config = jp.OptimConfig(learning_rate=0.05, schedule="constant")
    tx = jp.masked(jp.make_optimizer(config, 8, METHOD), jp.adapter_only)
    step = jp.make_train_step(jp.make_lm_loss(module, head_frozen=True), tx)
    state, losses = jp.init_train_state(params, adapter, tx, jax.random.key(0)), []
    for _ in range(8):
        state, metrics = step(state, params, make_batch(4, 8))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    gain = paths.get(state.adapter.params, "layers/mlp/down_proj/kernel/gain")
    assert not gain[0].any()  # the layer that is not adapted
    assert gain[1].any()
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapter.params))


def test_rows_of_a_mixed_batch_and_adapters_under_vmap_are_those_of_each_adapter():
    params, tokens = decoder()[1], make_batch(3, 8)["tokens"]
    other = OutputScaling(targets=("q_proj", "v_proj"))
    several = [trained(params, METHOD, seed=1), trained(params, other, seed=2)]
    stacked = jp.stack_adapters(several)
    mixed = logits(params, stacked, tokens, index=jnp.array([1, -1, 0]))
    expected = [
        logits(params, one, tokens[row : row + 1])[0]
        for row, one in enumerate((several[1], None, several[0]))
    ]
    assert_close(mixed, jnp.stack(expected))
    mapped = jax.vmap(lambda one: logits(params, one, tokens))(stacked)
    assert_close(mapped, jnp.stack([logits(params, one, tokens) for one in several]))


def test_what_the_family_declares_is_asked_by_name():
    params, adapter = decoder()[1], trained(decoder()[1], METHOD, seed=1)
    mesh = mesh_of(data=4, tensor=2)
    where = placement.adapter_sharding(f"{KERNEL}/gain", (2, 32), mesh, KIND.arrays)
    assert where.spec == PartitionSpec(None, "tensor")
    assert count_trainable(adapter) == 2 * 32 + CONFIG.d_model
    rows = describe_adapter(params, adapter)
    assert [(row.path, row.layers, row.trainable) for row in rows] == [
        ("layers/mlp/down_proj/kernel", "1/2", CONFIG.d_model),
        (KERNEL, "2/2", 2 * 32),
    ]
    with pytest.raises(UserError, match="kind 'output_scaling' is no LoRA"):
        jp.combine([adapter], [1.0])
    with pytest.raises(UserError, match="kind 'output_scaling' has no factor"):
        jp.bind(params, [adapter], weights=[0.5])


def test_it_becomes_a_lora_by_singular_values():
    params, adapter = decoder()[1], trained(decoder()[1], METHOD, seed=1)
    lora, errors = jp.to_lora(adapter, params, energy=1.0)
    assert max(errors.values()) < 1e-5
    assert_close(jp.merge(params, lora), scaled(adapter))


@pytest.mark.usefixtures("one_device")
def test_the_program_trains_it_from_yaml_resumes_it_and_what_it_saved_loads(files, tmp_path):
    method = {"name": "output_scaling", "targets": ["q_proj", "down_proj"]}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    optim = {"learning_rate": 0.05, "schedule": "constant"}
    program.main([write_config(files, straight, method=method, optim=optim)])
    program.main([write_config(files, stopped, method=method, optim=optim, train={"steps": 6})])
    program.main([write_config(files, stopped, method=method, optim=optim)])
    losses = [line["loss"] for line in training_lines(straight)]
    assert losses[-1] < losses[0]
    assert [line["loss"] for line in training_lines(stopped)] == losses
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = ((run / "adapter" / name).read_bytes() for run in (straight, stopped))
        assert one == other
    values = json.loads((straight / "adapter" / "adapter_config.json").read_text())
    assert values["peft_type"] == "OUTPUT_SCALING"
    assert OutputScaling.from_peft(straight / "adapter").targets == ("down_proj", "q_proj")

    base = jp.load_model(files.model)
    adapter = jp.load_adapter(straight, base)
    assert adapter.spec.kind == "output_scaling"
    jp.save_adapter(tmp_path / "again", adapter, base)
    assert_close(jp.load_adapter(tmp_path / "again", base).params, adapter.params, rtol=0, atol=0)
    # A run that starts from it, with updates too small for float32, ends with the same numbers.
    again, still = {"init_from": str(straight), **method}, optim | {"learning_rate": 1e-30}
    program.main(
        [write_config(files, tmp_path / "more", method=again, optim=still, train={"steps": 2})]
    )
    more = jp.load_adapter(tmp_path / "more", base)
    assert_close(more.params, adapter.params, rtol=0, atol=0)


def test_wrong_keys_of_its_section_are_answered_with_its_own(files, tmp_path):
    config = write_config(files, tmp_path / "run", method={"name": "output_scaling", "rank": 4})
    with pytest.raises(UserError, match=r"method\.rank: unknown key .*output_scaling"):
        jp.load_config(config)


def test_a_name_or_a_peft_type_that_is_taken_is_refused():
    with pytest.raises(UserError, match="there is a method called 'output_scaling' already"):
        jp.register_method(dataclasses.replace(KIND))

    class Other(OutputScaling):
        name = "other_scaling"

    assert KIND.peft is not None
    other = dataclasses.replace(KIND, config=Other, peft=dataclasses.replace(KIND.peft))
    with pytest.raises(UserError, match="another method has the peft_type 'OUTPUT_SCALING'"):
        jp.register_method(other)
    assert "other_scaling" not in KINDS


def test_optimizers_that_scale_by_means_refuse_layers_that_are_not_adapted(files, tmp_path):
    method = {"name": "output_scaling", "targets": ["model.layers.1.mlp.down_proj"]}
    config = write_config(files, tmp_path / "run", method=method, optim={"name": "adafactor"})
    with pytest.raises(UserError, match=r"optim\.name: adafactor scales by the mean"):
        program.main([config])
