"""Adapters of models that are not ours are combined and converted like others."""

import dataclasses

import jax
import numpy as np
import pytest
from foreign_models import MODELS, ROLES, moved, start

import jaxpeft as jp
from jaxpeft.lifting.trees import named_leaves

some_models = pytest.mark.parametrize("model", ["linen", "nnx", "unrolled", "scanned"])


def change(model, adapter):
    """By path, what merging changes, in float64."""
    params = MODELS[model][1]
    before, after = named_leaves(params), named_leaves(jp.merge(params, adapter))
    return {
        path: np.asarray(after[path], np.float64) - np.asarray(leaf, np.float64)
        for path, leaf in before.items()
    }


@some_models
@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_a_combination_changes_the_weighted_sum(model, how):
    first, second = moved(start(model, "lora")), moved(start(model, "rslora of some"), 0.2)
    options = {"rank": 5} if how == "svd" else {}
    both = jp.combine([first, second], [0.7, -0.4], how, **options)
    parts = change(model, first), change(model, second)
    for path, made in change(model, both).items():
        expected = 0.7 * parts[0][path] - 0.4 * parts[1][path]
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5, err_msg=path)
    assert both.spec.axes == first.spec.axes


@some_models
@pytest.mark.parametrize("name", ["pissa", "dora", "adalora", "loha", "lokr", "vera", "oft"])
def test_every_method_of_kernels_becomes_a_lora_that_changes_the_same(model, name):
    params = MODELS[model][1]
    adapter = moved(start(model, name))
    lora, lost = jp.to_lora(adapter, params, rank=8)
    expected = change(model, adapter)
    for path, made in change(model, lora).items():
        np.testing.assert_allclose(made, expected[path], rtol=0, atol=2e-5, err_msg=path)
    assert max(lost.values()) < 1e-5
    assert {path for path, _ in lora.spec.axes} == set(lora.spec.paths)


def test_adapters_of_different_models_are_not_combined():
    first = start("unrolled", "lora")
    made = jp.combine([first, start("scanned", "lora")], [1, 1])
    with pytest.raises(jp.UserError, match="which this base lacks"):
        jp.merge(MODELS["unrolled"][1], made)
    with pytest.raises(jp.UserError, match="some are for a model of jaxpeft"):
        jp.combine([start("nnx", "lora"), toy(start("nnx", "lora"))], [1, 1])


def toy(adapter):
    """The same arrays as if they were for a model of ours."""
    return adapter.replace(spec=dataclasses.replace(adapter.spec, axes=(), biases=()))


def test_what_is_replaced_whole_is_no_lora():
    adapter = start("unrolled", "full")
    with pytest.raises(jp.UserError, match="is replaced whole; merge it instead"):
        jp.to_lora(adapter, MODELS["unrolled"][1], rank=2)
    ia3, params = jp.IA3(targets=("out",), feedforward=()), MODELS["unrolled"][1]
    one = moved(jp.init_adapter(ia3, params, jax.random.key(0), roles=ROLES["unrolled"]))
    with pytest.raises(jp.UserError, match="changes what is no kernel"):  # the bias, too
        jp.to_lora(one, params, rank=2)
