"""A run chooses its start, places it, and names what it trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_run import base_of, make_run, mesh_of, rows_of

import jaxpeft as jp
from jaxpeft.core import paths
from jaxpeft.mesh.layouts import Layout
from jaxpeft.methods.chat_settings import ChatSettings, chat_of
from jaxpeft.methods.method import Context
from jaxpeft.ops.linear import materialize
from jaxpeft.ops.quant import QuantTensor
from jaxpeft.training.run import Run
from jaxpeft.training.start import choose_start

KEY = jax.random.key(3)


def choose(method, base, **section):
    """What a run of the method starts from."""
    config = make_run("lora", mesh_of()).config
    model = dataclasses.replace(config.model, **section)
    config = dataclasses.replace(config, method=method, model=model)
    context = Context(base.config, base.module, batches=iter([rows_of(96, 0).plan.batch(0)]))
    restored = dataclasses.replace(context, shapes_only=True)
    layout = Layout(mesh_of(), model=base.config)
    assert choose_start(config, base, layout, KEY, restored) == (base, None)
    return choose_start(config, base, layout, KEY, context)


def test_an_adapter_that_shapes_decide_is_made_where_it_is_placed():
    base = base_of()
    assert choose(jp.LoRA(rank=2), base) == (base, None)


def test_a_start_from_batches_is_computed_before_it_is_placed():
    _, adapter = choose(jp.LoRA(rank=2, targets=("q_proj",), init_weights="eva"), base_of())
    path = "layers/self_attn/q_proj/kernel"
    a = np.asarray(paths.get(adapter.params, f"{path}/a"))
    for rank, columns in zip(paths.get(adapter.buffers, f"{path}/rank"), a, strict=True):
        used = np.arange(a.shape[-1]) < rank  # directions of the inputs; the rest is padding
        np.testing.assert_allclose(columns.T @ columns, np.diag(used), atol=1e-5)


def test_a_start_from_what_quantising_loses_comes_back_with_the_quantised_base():
    dense = base_of(d_model=64, d_ff=64, num_heads=2, num_kv_heads=2, head_dim=32)
    method = jp.LoRA(rank=4, targets=("q_proj",), init_weights="loftq")
    base, adapter = choose(method, dense, quantization="nf4")
    path = "layers/self_attn/q_proj/kernel"
    coded, kernel = paths.get(base.params, path), paths.get(dense.params, path)
    assert isinstance(coded, QuantTensor)
    bound = jp.bind(base.params, adapter)["params"]
    lost, left = (jnp.linalg.norm(materialize(x) - kernel) for x in (coded, paths.get(bound, path)))
    assert left < 0.95 * lost


@pytest.mark.parametrize("restored", [False, True])
def test_what_a_run_trains_is_named_after_its_base_and_taught_by_its_data(restored):
    old = make_run("lora", mesh_of())
    base = dataclasses.replace(old.base, name="org/base", revision="v1")
    rows = dataclasses.replace(old.rows, stop_ids=(7,))
    adapter = Run(old.config, base, rows, old.layout, restored=restored).state.adapter
    assert (str(adapter.base_name), str(adapter.base_revision)) == ("org/base", "v1")
    assert chat_of(adapter) == ChatSettings(stop_ids=(7,))
