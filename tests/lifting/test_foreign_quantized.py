"""Quantised kernels of models that are not ours, and adapters on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import METHODS, MODELS, ROLES, bound, moved

import jaxpeft as jp
from jaxpeft.lifting.trees import named_leaves, with_leaves
from jaxpeft.ops.quant import quantize_kernel

TYPES = {
    "nf4": {},
    "nf4, double": {"double": True},
    "int8": {"quant_type": "int8"},
    "int4": {"quant_type": "int4"},
}
OF_VISION = {
    "ia3": jp.IA3(targets="all-linear", feedforward=()),
    "oft": jp.OFT(block_size=3, targets="all-linear"),
}
some_models = pytest.mark.parametrize("model", ["linen", "nnx", "unrolled", "scanned", "vision"])


def rounded(model, quant_type="nf4", **options):
    """The parameters after quantisation and back, by turning each array in NumPy."""
    params = MODELS[model][1]
    leaves = {}
    for path, leaf in named_leaves(params).items():
        row = ROLES[model][path]
        if row.role != "kernel":
            continue
        order = (*row.axes.stack, *row.axes.ins, *row.axes.outs)
        turned = np.asarray(leaf).transpose(order)
        stack = turned.shape[: len(row.axes.stack)]
        d_in = int(np.prod([leaf.shape[axis] for axis in row.axes.ins]))
        coded = quantize_kernel(
            jnp.asarray(turned.reshape(*stack, d_in, -1)), quant_type, **options
        )
        back = np.asarray(coded.dequantize()).reshape(turned.shape)
        leaves[path] = jnp.asarray(back.transpose(np.argsort(order)))
    return with_leaves(params, leaves)


@some_models
@pytest.mark.parametrize("kind", TYPES)
def test_a_lifted_model_computes_with_the_rounded_kernels(model, kind):
    function, params, variables, inputs = MODELS[model]
    coded = jp.quantize(params, roles=ROLES[model], **TYPES[kind])
    theirs = jax.jit(function)(variables(rounded(model, **TYPES[kind])), *inputs)
    ours = jax.jit(jp.lift(function))(variables(coded), *inputs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = jax.jit(function)(variables(params), *inputs)
    assert np.abs(ours - plain).max() > 1e-4


@some_models
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft"])
def test_adapters_on_quantised_kernels_are_those_on_the_rounded_ones(model, name):
    function, params, _, inputs = MODELS[model]
    coded = jp.quantize(params, roles=ROLES[model])
    method = OF_VISION.get(name, METHODS[name]) if model == "vision" else METHODS[name]

    def start(base):
        return moved(jp.init_adapter(method, base, jax.random.key(1), roles=ROLES[model]))

    def loss(tree, base, adapter):
        one = adapter.replace(params=tree)
        return jnp.square(jp.lift(function)(bound(model, base, one), *inputs)).sum()

    results = {}
    for what, base in (("coded", coded), ("rounded", rounded(model))):
        adapter = start(base)
        results[what] = jax.jit(jax.value_and_grad(loss))(adapter.params, base, adapter)
    for one, other in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@some_models
def test_the_tree_is_of_the_kind_that_was_given_and_smaller(model):
    params = MODELS[model][1]
    coded = jp.quantize(params, roles=ROLES[model])
    assert type(coded) is type(params)
    leaves, before = named_leaves(coded), named_leaves(params)
    assert leaves.keys() == before.keys()
    for path, row in ROLES[model].items():
        if row.role != "kernel":
            assert leaves[path] is before[path]
            continue
        d_in, d_out = leaves[path].shape[-2:]
        blocks = -(-d_in // 64)  # with a last block that is filled up
        stacks = before[path].size // (d_in * d_out)
        assert sum(x.nbytes for x in jax.tree.leaves(leaves[path])) == stacks * blocks * d_out * 36


def test_kernels_can_be_left_out():
    params, roles = MODELS["unrolled"][1], ROLES["unrolled"]
    leaves = named_leaves(jp.quantize(params, roles=roles, exclude=("out",)))
    kept = {path for path, leaf in named_leaves(params).items() if leaves[path] is leaf}
    assert kept == {path for path in leaves if "out" in path}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "are not the parameters of a model of jaxpeft; pass roles="),
        ({"roles": ROLES["unrolled"], "head": True}, "head has no meaning with roles"),
        ({"exclude": ("out",)}, "exclude goes with roles="),
        ({"roles": ROLES["unrolled"], "exclude": ("missing",)}, "'missing' matches no linear"),
        ({"roles": ROLES["nnx"]}, "are not in both the parameters and the roles"),
        ({"roles": ROLES["unrolled"], "quant_type": "fp4"}, "must be one of 'nf4', 'int4', 'int8'"),
    ],
)
def test_what_has_no_meaning_is_one_line(arguments, message):
    with pytest.raises(jp.UserError, match=message):
        jp.quantize(MODELS["unrolled"][1], **arguments)


def test_what_needs_the_kernels_themselves_is_refused():
    function, params, _, inputs = MODELS["unrolled"]
    roles, key = ROLES["unrolled"], jax.random.key(0)
    coded = jp.quantize(params, roles=roles)
    with pytest.raises(jp.UserError, match="4 kernels are quantised already"):
        jp.quantize(coded, roles=roles)
    with pytest.raises(jp.UserError, match="kernels of this base are quantised"):
        jp.merge(coded, jp.init_adapter(jp.LoRA(rank=2), coded, key, roles=roles))
    with pytest.raises(jp.UserError, match="describe: parameters are quantised or bound"):
        jp.describe(function, coded, *inputs)
    for method in (jp.Full(), jp.LoRA(targets=("query",), save_modules=("out",))):
        with pytest.raises(jp.UserError, match="is quantised, and "):
            jp.init_adapter(method, coded, key, roles=roles)
    with pytest.raises(jp.UserError, match="this base is quantised already"):
        jp.init_adapter(jp.LoRA(init_weights="loftq"), coded, key, roles=roles)
