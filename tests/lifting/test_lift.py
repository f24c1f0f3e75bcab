"""`lift`: models that do not know nodes compute with them as with the merged weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign_models import Stacked
from lifted_nodes import adapted, numbers

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes
from jaxpeft.lifting.lifted import lift
from jaxpeft.lifting.trees import named_leaves, with_leaves
from jaxpeft.methods.lora.nodes import LoRAKernel


def assert_lifted(function, params, axes, *inputs, tol=1e-5):
    bound, merged = adapted(params, axes)
    expected = jax.jit(function)(merged, *inputs)
    actual = jax.jit(lift(function))(bound, *inputs)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tol, atol=tol)
    base = jax.jit(function)(params, *inputs)
    assert np.abs(jax.tree.leaves(base)[0] - jax.tree.leaves(actual)[0]).max() > 1e-2
    # Gradients of the factors are those through the merged weights, by the chain rule of autodiff.
    slope = jax.tree.map(
        lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), base
    )

    def dot(out):
        return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (out, slope)), strict=True))

    def through(tree, *inputs):
        whole = {}
        for path, leaf in named_leaves(tree).items():
            whole[path] = leaf
            if isinstance(leaf, LoRAKernel):
                whole[path] = leaf.base.unfold(leaf.materialize())
        return dot(function(with_leaves(params, whole), *inputs))

    ours = jax.jit(jax.grad(lambda tree, *inputs: dot(lift(function)(tree, *inputs))))
    ours = ours(bound, *inputs)
    theirs = jax.jit(jax.grad(through))(bound, *inputs)
    for path in axes:
        one, other = named_leaves(ours)[path], named_leaves(theirs)[path]
        for name in ("a", "b", "scale"):
            x, y = getattr(one, name), getattr(other, name)
            np.testing.assert_allclose(x, y, rtol=tol, atol=tol * max(1.0, np.abs(y).max()))


CASES = {
    "a product": (lambda p, x: x @ p["w"], (4, 5), Axes((0,), (1,)), (2, 4)),
    "turned": (lambda p, x: x @ p["w"].T, (5, 4), Axes((1,), (0,)), (2, 4)),
    "on the left": (lambda p, x: p["w"].T @ x, (4, 5), Axes((0,), (1,)), (4, 2)),
    "heads": (
        lambda p, x: jnp.einsum("btd,dnh->bnth", x, p["w"]),
        (6, 2, 3),
        Axes((0,), (1, 2)),
        (2, 4, 6),
    ),
    "out of heads": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"]),
        (2, 3, 6),
        Axes((0, 1), (2,)),
        (2, 4, 2, 3),
    ),
    "heads in another order": (
        lambda p, x: jnp.einsum("bhtn,nhd->btd", x, p["w"]),
        (2, 3, 6),
        Axes((0, 1), (2,)),
        (2, 3, 4, 2),
    ),
    "flattened heads": (
        lambda p, x: x @ p["w"].reshape(6, 6),
        (6, 2, 3),
        Axes((0,), (1, 2)),
        (2, 6),
    ),
    "split outputs": (
        lambda p, x: jnp.einsum("bd,dcnh->cbnh", x, p["w"].reshape(4, 3, 2, 5)),
        (4, 30),
        Axes((0,), (1,)),
        (2, 4),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        (3, 4, 5),
        Axes((1,), (2,), (0,)),
        (3, 2, 4),
    ),
    "a static layer": (lambda p, x: x @ p["w"][1], (3, 4, 5), Axes((1,), (2,), (0,)), (2, 4)),
    "one input": (lambda p, x: x @ p["w"], (1, 5), Axes((0,), (1,)), (2, 1)),
    "one output": (lambda p, x: x @ p["w"], (5, 1), Axes((0,), (1,)), (2, 5)),
    "in a loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ p["w"][i]), x),
        (3, 4, 4),
        Axes((1,), (2,), (0,)),
        (2, 4),
    ),
    "in a branch": (
        lambda p, x: jax.lax.cond(x.sum() > 100, lambda y: y, lambda y: y @ p["w"], x),
        (4, 4),
        Axes((0,), (1,)),
        (2, 4),
    ),
    "a scan over the second axis": (
        lambda p, x: jax.lax.scan(
            jax.checkpoint(lambda y, w: (jnp.tanh(y @ w), None)), x, jnp.moveaxis(p["w"], 1, 0)
        )[0],
        (4, 3, 4),
        Axes((0,), (2,), (1,)),
        (2, 4),
    ),
    "a scan of scans that hands back": (
        lambda p, x: jax.lax.scan(
            lambda y, w: jax.lax.scan(lambda z, v: (jnp.tanh(z @ v), v), y, w), x, p["w"]
        )[0],
        (2, 3, 4, 4),
        Axes((2,), (3,), (0, 1)),
        (2, 4),
    ),
    "bfloat16 products": (
        lambda p, x: jax.lax.dot(
            x.astype(jnp.bfloat16),
            p["w"].astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        ),
        (4, 5),
        Axes((0,), (1,)),
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nodes_answer_as_the_merged_weights(name):
    function, shape, axes, of_x = CASES[name]
    tol = 2e-2 if "bfloat16" in name else 1e-5  # merged weights are rounded, factors are not
    assert_lifted(function, {"w": numbers(1, *shape)}, {"w": axes}, numbers(2, *of_x), tol=tol)


STARTS = {
    "turned": (lambda p, x: x @ p["w"].T, (96, 32), Axes((1,), (0,)), (3, 12, 32)),
    "the kernel on the left": (
        lambda p, x: jnp.einsum("cndh,bsd->cbsnh", p["w"], x),
        (2, 4, 32, 8),
        Axes((2,), (0, 1, 3)),
        (3, 12, 32),
    ),
    "inputs in another order": (
        lambda p, x: jax.lax.dot_general(x, p["w"], (((3, 2), (1, 0)), ((), ()))),
        (4, 8, 32),
        Axes((0, 1), (2,)),
        (3, 12, 4, 8),
    ),
    "experts on a later axis": (
        lambda p, x: jnp.einsum("dnhe,ebd->ebnh", p["w"], x),
        (32, 4, 8, 3),
        Axes((0,), (1, 2), (3,)),
        (3, 12, 32),
    ),
    "turned, by a node that can only multiply": (
        lambda p, x: x @ p["w"].T,
        (32, 48),
        Axes((0,), (1,)),
        (3, 12, 48),
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_branch_of_zeros_leaves_the_models_own_product_to_the_last_bit(name):
    function, shape, axes, of_x = STARTS[name]
    params, x = {"w": numbers(1, *shape)}, numbers(2, *of_x)
    bound, _ = adapted(params, {"w": axes})
    bound = {"w": bound["w"].replace(b=jnp.zeros_like(bound["w"].b))}
    with jax.disable_jit():  # XLA may join the sum with its neighbours, and round otherwise
        expected, actual = function(params, x), lift(function)(bound, x)
    np.testing.assert_array_equal(actual, expected)


def test_a_linen_transformer_of_stock_layers():
    module, ids = Stacked(), np.array([[1, 2, 10], [4, 5, 0]])
    params = module.init(jax.random.key(0), ids)
    attention = "layers/MultiHeadDotProductAttention_0"
    axes = {
        f"{attention}/query/kernel": Axes((1,), (2, 3), (0,)),
        f"{attention}/out/kernel": Axes((1, 2), (3,), (0,)),
        "layers/Dense_0/kernel": Axes((1,), (2,), (0,)),
        "layers/Dense_1/kernel": Axes((1,), (2,), (0,)),
    }
    assert_lifted(module.apply, params, axes, ids)


def test_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.last = nnx.LinearGeneral((6,), (2, 3), rngs=rngs)

        def __call__(self, x):
            return self.last(self.attention(self.norm(nnx.relu(self.first(x)))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    axes = {
        "first/kernel": Axes((0,), (1,)),
        "attention/query/kernel": Axes((0,), (1, 2)),
        "last/kernel": Axes((0,), (1, 2)),
    }

    def function(p, rest, x):
        return nnx.merge(graph, p, rest)(x)

    assert_lifted(function, params, axes, rest, numbers(3, 2, 5, 4))


CANNOT = {
    "mul": lambda p, x: x @ (p["w"] * 2),
    "slice": lambda p, x: x @ p["w"][:, :2],
    "concatenate": lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1),
    "custom_jvp_call": lambda p, x: x @ jax.nn.relu(p["w"]),
    "dot_general": lambda p, x: (x @ p["w"]) @ (p["w"].T @ p["w"]),
}


@pytest.mark.parametrize("primitive", CANNOT)
def test_what_a_node_cannot_answer_for_is_one_line_or_is_formed(primitive, capsys):
    function, x = CANNOT[primitive], numbers(2, 3, 4)
    bound, merged = adapted({"w": numbers(1, 4, 4)}, {"w": Axes((0,), (1,))})
    with pytest.raises(jp.UserError) as caught:
        jax.jit(lift(function))(bound, x)
    text = str(caught.value)
    assert text.startswith(f"w, {primitive} at ")
    assert "test_lift.py:" in text
    assert "materialize=True" in text
    actual = lift(function, materialize=True)(bound, x)
    np.testing.assert_allclose(actual, function(merged, x), rtol=1e-5, atol=1e-5)
    assert f"note: w, {primitive} at " in capsys.readouterr().err


OPERATIONS = {
    "an operator": lambda node: jnp.ones(4) @ node,
    "an operator of NumPy": lambda node: np.ones(4) @ node,
    "an operator on the left": lambda node: node + 1,
    "an index": lambda node: node[0],
    "jax.numpy": lambda node: jnp.einsum("d,de->e", jnp.ones(4), node),
    "NumPy": np.asarray,
    "Linen": lambda node: nn.Dense(4, use_bias=False).apply(
        {"params": {"kernel": node}}, jnp.ones((2, 4))
    ),
    "a method": lambda node: node.reshape(16),
    "a property": lambda node: node.T,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_lift_a_node_names_it(name):
    bound, _ = adapted({"w": numbers(1, 4, 4)}, {"w": Axes((0,), (1,))})
    with pytest.raises((TypeError, AttributeError), match=r"wrap its function, as in jp\.lift"):
        OPERATIONS[name](bound["w"])


def test_without_nodes_the_function_is_called_as_it_is():
    assert lift(lambda p, x: (x, "no array"))({"w": 1}, 2) == (2, "no array")


def test_parameters_that_are_handed_back_are_those_that_were_given():
    bound, _ = adapted({"w": numbers(1, 4, 4)}, {"w": Axes((0,), (1,))})
    out, same = lift(lambda p, x: (x @ p["w"], p))(bound, numbers(2, 3, 4))
    assert same["w"] is bound["w"]
    assert out.shape == (3, 4)


def test_another_layout_of_the_kernel_than_that_of_the_adapter_is_refused():
    """A square kernel stored the other way round has the same shape."""
    bound, _ = adapted({"w": numbers(1, 4, 3, 4)}, {"w": Axes((0,), (1, 2))})
    with pytest.raises(jp.UserError, match=r"contracts its axes \[1\].*contract \[0\]"):
        lift(lambda p, x: jnp.einsum("bn,dnh->bdh", x, p["w"]))(bound, numbers(2, 2, 3))


def test_switching_adapters_does_not_trace_again():
    traced = []

    def function(p, x):
        traced.append(1)
        return x @ p["w"]

    run = jax.jit(lambda bound, x: lift(function)(bound, x))
    for seed in range(3):
        bound, _ = adapted({"w": numbers(1, 4, 5)}, {"w": Axes((0,), (1,))}, seed)
        run(bound, numbers(2, 3, 4))
    assert len(traced) == 1


def test_the_program_forms_no_sum_and_no_gradient_of_the_kernel():
    """FLOPs are those of LoRA written by hand."""
    d_in, d_out, rows = 64, 96, 32
    kernel, x = {"w": numbers(1, d_in, d_out)}, numbers(2, rows, d_in)
    bound, _ = adapted(kernel, {"w": Axes((0,), (1,))})

    def lifted(factors, x):
        node = bound["w"].replace(a=factors[0], b=factors[1])
        return jnp.square(lift(lambda p, x: x @ p["w"])({"w": node}, x)).sum()

    def by_hand(factors, x):
        y = x @ kernel["w"] + (x @ factors[0] * bound["w"].scale) @ factors[1]
        return jnp.square(y).sum()

    factors = bound["w"].a, bound["w"].b
    ours, theirs = (jp.count_flops(jax.grad(f), factors, x) for f in (lifted, by_hand))
    assert abs(ours / theirs - 1) < 0.01
    assert ours < 1.2 * 2 * 2 * rows * d_in * d_out  # one product each way, not three
