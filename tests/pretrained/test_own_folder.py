"""Folders of adapters of models that are not of this package: written whole, read strictly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import MODELS, ROLES, every_pair, moved, start

import jaxpeft as jp
from jaxpeft.lifting.trees import named_leaves

RECORD, TENSORS = "jaxpeft_adapter.json", "adapter.safetensors"


def save(folder, model="linen", name="lora"):
    adapter = moved(start(model, name))
    jp.save_adapter(folder, adapter, MODELS[model][1])
    return adapter


def load(folder, model="linen", **options):
    return jp.load_adapter(folder, MODELS[model][1], **{"roles": ROLES[model], **options})


@every_pair
def test_every_method_comes_back_bit_for_bit(tmp_path, model, name):
    adapter = save(tmp_path / "adapter", model, name)
    again = load(tmp_path / "adapter", model)
    assert again.spec == adapter.spec
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    for one, other in zip(*map(jax.tree.leaves, (again, adapter)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_shapes_of_the_parameters_are_enough(tmp_path):
    adapter = save(tmp_path)
    shapes = jax.eval_shape(lambda: MODELS["linen"][1])
    again = jp.load_adapter(tmp_path, shapes, roles=ROLES["linen"])
    jp.save_adapter(tmp_path / "again", again, shapes)
    for name in (RECORD, TENSORS):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert again.spec == adapter.spec


def edit(**changes):
    def change(folder):
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(record | changes))

    return change


def cut(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-9])


def turn(folder):
    """Inputs and outputs of a square kernel change places."""
    record = json.loads((folder / RECORD).read_text())
    path = "layers/MultiHeadDotProductAttention_0/query/kernel"
    axes = record["axes"][path]
    record["axes"][path] = axes | {"ins": axes["outs"], "outs": axes["ins"]}
    (folder / RECORD).write_text(json.dumps(record))


FAULTS = {
    "cut": (cut, r"adapter\.safetensors: damaged: its sha256"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "has no adapter.safetensors"),
    "no record": (lambda folder: (folder / RECORD).unlink(), "has no jaxpeft_adapter.json"),
    "no JSON": (lambda folder: (folder / RECORD).write_text("{"), r"jaxpeft_adapter\.json:1:2"),
    "newer": (edit(format=2), "format: this version reads 1, got 2"),
    "unknown method": (edit(kind="x"), "kind: no method is called 'x'"),
    "no rank": (edit(rank=None), "rank: expected int, got None"),
    "other axes": (turn, r"was made for the axes .* it is another model"),
    "other shape": (edit(base={}), "was made for shape None"),
    "other paths": (edit(paths=["x/kernel"]), "the model has no parameter x/kernel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_or_another_model_is_one_line(tmp_path, name):
    save(tmp_path)
    fault, words = FAULTS[name]
    fault(tmp_path)
    with pytest.raises(jp.UserError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_model_and_missing_roles_are_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(jp.UserError, match="holds an adapter of a model that is not of jaxpeft"):
        jp.load_adapter(tmp_path)
    with pytest.raises(jp.UserError, match="the model has no parameter"):
        load(tmp_path, "nnx")
    with pytest.raises(jp.UserError, match="need roles="):
        load(tmp_path, roles=None)


def test_what_is_not_finite_or_does_not_fit_is_not_written(tmp_path):
    adapter = moved(start("linen", "lora"))
    broken = adapter.replace(params=jax.tree.map(lambda x: x * jnp.nan, adapter.params))
    with pytest.raises(jp.UserError, match="not finite"):
        jp.save_adapter(tmp_path / "a", broken, MODELS["linen"][1])
    with pytest.raises(jp.UserError, match="lacks"):
        jp.save_adapter(tmp_path / "a", adapter, MODELS["nnx"][1])
    assert list(tmp_path.iterdir()) == []


def test_every_array_has_a_place(tmp_path):
    from safetensors.numpy import load_file

    adapter = save(tmp_path, name="vera")
    names = set(load_file(tmp_path / TENSORS))
    assert {name.partition("/")[0] for name in names} == {"params", "buffers"}
    assert len(names) == len(jax.tree.leaves(adapter))
    assert named_leaves(adapter.params).keys() <= {name.partition("/")[2] for name in names}
