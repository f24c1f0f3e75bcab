"""The plan of a run: what it counts is what training does, and nothing is loaded or guessed."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from places import ROOT
from tiny_run import Files, make_files, write_config

from jaxpeft.config import run_config
from jaxpeft.core.errors import UserError
from jaxpeft.core.flops import count_flops
from jaxpeft.mesh.constraints import traced_on
from jaxpeft.planning import machines, memory
from jaxpeft.planning.plan import full_rows, make_plan
from jaxpeft.planning.report import print_plan
from jaxpeft.pretrained.load import load_model, load_model_config, load_tokenizer
from jaxpeft.pretrained.weights.names import param_shapes
from jaxpeft.training.rows import read_data
from jaxpeft.training.run import Run

PUBLISHED = {
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


def config_of(files, folder, **changes):
    return run_config.load_config(write_config(files, folder / "run", **changes))


def small(machine, share):
    """The same devices with a share of their memory."""
    return machine._replace(device_bytes=int(share))


@pytest.mark.parametrize("quantization", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_planned_step_is_the_step_of_a_run(files, tmp_path, quantization):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config = config_of(files, tmp_path, model={"quantization": quantization}, mesh=mesh)
    model = load_model_config(config.model.path)
    rows = read_data(config, model, load_tokenizer(config.model.path))
    machine = machines.find_machine(None)
    planned = memory.make_run(config, model, rows, machine)
    base = load_model(config.model.path, mesh=planned.layout, quantization=quantization)
    real = Run(config, base, rows, planned.layout)
    like = [(run.state, run.base.params) for run in (planned, real)]
    assert jax.tree.structure(like[0]) == jax.tree.structure(like[1])
    for ours, theirs in zip(*map(jax.tree.leaves, like), strict=True):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
    with traced_on(planned.layout):
        steps = [run.make_step().lower(*run.step_arguments()) for run in (planned, real)]
    assert steps[0].as_text() == steps[1].as_text()


def test_the_plan_counts_what_the_run_says_of_itself(files, tmp_path):
    config = config_of(files, tmp_path)
    plan = make_plan(config)
    assert plan["trainable_parameters"] == 2 * 4 * ((32 + 32) + (48 + 32))
    assert [row["path"] for row in plan["modules"]] == [
        "layers/mlp/down_proj/kernel",
        "layers/self_attn/q_proj/kernel",
    ]
    lines = files.train.read_text().splitlines()
    samples = plan["data"]["samples"]
    assert len(samples) == 3
    for sample in samples:
        row = json.loads(lines[sample["line"] - 1])
        question, answer = sample["parts"]
        assert (question["learned"], answer["learned"]) == (False, True)
        assert question["text"].endswith(row["prompt"])
        assert answer["text"].startswith(row["completion"])
    assert plan["memory"]["fits"]
    kinds = plan["memory"]["by_kind"]
    assert plan["memory"]["device_bytes"] == sum(kinds.values())
    # The base in float32, LoRA and two moments of AdamW.
    least = 4 * (plan["base_parameters"] + 3 * plan["trainable_parameters"])
    assert least < kinds["arguments"] < 1.2 * least


def test_flops_of_the_layers_double_with_the_depth(files, tmp_path):
    config = config_of(files, tmp_path)
    model = load_model_config(config.model.path)
    rows = full_rows(config, model)

    def cost(layers):
        deep = dataclasses.replace(model, num_layers=layers)
        run = memory.make_run(config, deep, rows, machines.find_machine(None))
        return count_flops(run.make_step(), *run.step_arguments())

    one, two, four = cost(1), cost(2), cost(4)
    assert four - two == 2 * (two - one) > 0


@pytest.mark.slow
def test_what_does_not_fit_is_compiled_with_other_settings(files, tmp_path):
    config = config_of(files, tmp_path, train={"remat": "none"}, data={"max_length": 128})
    model = load_model_config(config.model.path)
    rows = full_rows(config, model)
    machine = machines.find_machine(None)._replace(devices=jax.devices()[:1], count=1)
    needed = memory.measure(config, model, rows, machine).device_bytes
    found = memory.find_fitting(config, model, rows, small(machine, 0.7 * needed))
    assert any(one.fits for one in found)
    assert [one.fits for one in found] == [one.device_bytes <= int(0.7 * needed) for one in found]
    assert any("train.microbatch_size" in one.changes for one in found)
    other = memory.changed(config, found[-1].changes)
    assert memory.measure(other, model, rows, machine).device_bytes == found[-1].device_bytes


@pytest.mark.slow
def test_where_no_setting_alone_fits_several_are_tried_together(files, tmp_path):
    config = config_of(files, tmp_path, train={"remat": "none"})
    model = load_model_config(config.model.path)
    rows = full_rows(config, model)
    machine = machines.find_machine(None)._replace(devices=jax.devices()[:1], count=1)
    nothing = memory.find_fitting(config, model, rows, small(machine, 0))
    assert not any(one.fits for one in nothing)
    assert set(nothing[-1].changes) == {
        "train.remat",
        "train.microbatch_size",
        "model.quantization",
    }


def test_a_base_that_is_too_large_for_a_device_is_spread_over_all(files, tmp_path):
    config = config_of(files, tmp_path)
    model = load_model_config(config.model.path)
    rows = full_rows(config, model)
    machine = machines.find_machine(None)
    whole = memory.measure(config, model, rows, machine)
    changes = {"mesh.data": 1, "mesh.fsdp": 8}
    assert [changes] in memory.levers(config, machine)
    spread = memory.measure(memory.changed(config, changes), model, rows, machine)
    base = 4 * sum(map(math.prod, param_shapes(model).values()))
    assert whole.memory
    assert spread.memory
    saved = whole.memory.arguments - spread.memory.arguments
    assert 0.8 * base < saved < base


@pytest.mark.parametrize(
    ("mesh", "shards", "spread"),
    [
        ({"data": 2, "fsdp": -1}, 8, True),
        ({"fsdp": 2, "tensor": -1, "data": 1}, 2, False),
        ({"data": -1, "tensor": 2}, 4, True),
    ],
)
def test_settings_are_tried_for_the_sizes_that_the_mesh_has(files, tmp_path, mesh, shards, spread):
    config = config_of(files, tmp_path, mesh=mesh, train={"batch_size": 16})
    found = memory.levers(config, machines.find_machine(None))
    sizes = [change["train.microbatch_size"] for change in found[0]]
    assert sizes == [n for n in (8, 4, 2) if n % shards == 0]
    assert ([{"mesh.data": 1, "mesh.fsdp": shards}] in found) == spread


def test_data_that_are_not_there_are_said_to_be_missing(files, tmp_path, capsys):
    config = config_of(files, tmp_path, data={"train": "nowhere.jsonl"})
    plan = make_plan(config)
    assert plan["data"] == {"missing": "nowhere.jsonl is not there"}
    assert plan["batch"]["seq_len"] == 32
    print_plan(plan)
    assert "nowhere.jsonl is not there" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(name):
    config = load_model_config(ROOT / "configs" / "models" / name)
    shapes = param_shapes(config).values()
    assert sum(map(math.prod, shapes)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("topology", "text"),
    [
        ("v9:2x2", "chips: v4, v5e, v5p, v6e"),
        ("v5e", "give a chip and its arrangement"),
        ("v5e:2x2x2", "v5e chips stand in 2 dimensions"),
        ("v5e:0x4", "2 dimensions, at least one along each"),
        ("v5p:4x4", "v5p chips stand in 3 dimensions"),
    ],
)
def test_topologies_that_are_none_are_refused(topology, text):
    with pytest.raises(UserError, match=text):
        machines.find_machine(topology)


def test_without_libtpu_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jaxpeft\[plan\]"):
        machines.find_machine("v5e:1x1")


def test_the_size_of_a_refused_program_is_read_from_xla():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.50G of 15.75G hbm."
    assert memory.needed_bytes(text) == 3 * 2**29
    text = "memory required for HLO temporaries (18.65G) exceeds available HBM (15.75G)."
    assert memory.needed_bytes(text) == round(18.65 * 2**30)
    assert memory.needed_bytes("INTERNAL: something else") is None


def test_the_command_prints_one_json_object(files, tmp_path):
    path = write_config(files, tmp_path / "run")
    command = [sys.executable, "-m", "jaxpeft.plan", path, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"] is True
    assert "plan: compiling the training step for" in done.stderr


@pytest.mark.slow
def test_a_quantised_model_of_8b_fits_one_v5e_chip():
    pytest.importorskip("libtpu")
    config = ROOT / "configs" / "plan" / "llama-3.1-8b-qlora.yaml"
    command = [sys.executable, "-m", "jaxpeft.plan", str(config), "--topology", "v5e:1x1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    plan = json.loads(done.stdout)
    assert plan["memory"]["fits"]
    # Codes and scales of the layers' kernels, the table and the head in bfloat16.
    layers = 6_979_321_856
    assert plan["memory"]["by_kind"]["arguments"] > 0.5625 * layers + 4 * 4096 * 128256


def test_the_planning_configs_are_read_and_name_models_that_are_there():
    found = sorted((ROOT / "configs" / "plan").glob("*.yaml"))
    assert len(found) == 4
    for path in found:
        config = run_config.load_config(str(path))
        assert load_model_config(ROOT / config.model.path).num_layers > 0
