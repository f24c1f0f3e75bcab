"""What no node can answer for: an error that says where, or the whole weight where allowed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from lifted_nodes import adapted, numbers

import jaxpeft as jp
from jaxpeft.lifting.folded import Axes

D = 4
X = numbers(2, 3, D)
BASE = {"w": numbers(1, D, D), "v": numbers(3, D, D), "stack": numbers(5, 3, D, D)}
BOUND, MERGED = adapted(BASE, {"w": Axes((0,), (1,)), "stack": Axes((1,), (2,), (0,))})

unknown = Primitive("a_primitive_of_tomorrow")
unknown.def_impl(lambda w: w * 3.0)
unknown.def_abstract_eval(lambda aval: aval)


@jax.custom_jvp
def scaled(w):
    return w * 1.5


scaled.defjvp(lambda primals, tangents: (scaled(*primals), 7.0 * tangents[0]))


@jax.custom_vjp
def halved(w):
    return w / 2


halved.defvjp(lambda w: (halved(w), None), lambda _, slope: (5.0 * slope,))


@jax.custom_vjp
def through(x, w):
    return x @ w


through.defvjp(lambda x, w: (through(x, w), w), lambda w, slope: (slope @ w.T, 3.0 * w))

CANNOT = {
    "custom_jvp_call": lambda p, x: x @ scaled(p["w"]),
    "custom_vjp_call": lambda p, x: through(x, halved(p["w"])),
    "custom_vjp_call of a product": lambda p, x: through(x, p["w"]),
    "mul": lambda p, x: x @ (p["w"] * p["v"]),
    "mul of itself": lambda p, x: x @ (p["w"] * p["w"]),
    "slice": lambda p, x: jnp.concatenate([x @ p["w"][:, :1], x @ p["w"][:, 1:]], 1),
    "split": lambda p, x: sum(x @ part for part in jnp.split(p["w"], 2, 1)),
    "slice of layers": lambda p, x: x @ p["stack"][:2].sum(0),
    "dynamic_slice": lambda p, x: x @ jax.lax.dynamic_slice(p["w"], (0, 1), (D, 2)),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["v"], p["w"]], 1),
    "rev": lambda p, x: x @ jax.lax.rev(p["w"], (0,)),
    "gather": lambda p, x: p["w"][jnp.array([[0, 2]])].sum(0) @ p["v"],
    "reduce_sum": lambda p, x: x * p["w"].sum(0),
    "dot_general": lambda p, x: x @ p["w"] @ (p["w"].T @ p["w"]),
    "broadcast_in_dim": lambda p, x: x @ jnp.broadcast_to(p["w"], (2, D, D)).sum(0),
    "dot_general of a part": lambda p, x: jnp.einsum(
        "ba,acd->bcd", x[:, :2], p["w"].reshape(2, 2, D)
    ).sum(1),
    "a_primitive_of_tomorrow": lambda p, x: x @ unknown.bind(p["w"]),
    "scan": lambda p, x: jax.lax.scan(lambda w, row: (w.T, row @ w), p["w"], x)[1],
    "mul in a scan": lambda p, x: jax.lax.scan(lambda y, w: (y @ (2 * w), None), x, p["stack"])[0],
    "mul in remat": lambda p, x: jax.checkpoint(lambda w: x @ (2 * w))(p["w"]),
    "mul in a while": lambda p, x: jax.lax.while_loop(
        lambda y: y.sum() > 1e4, lambda y: y @ (2 * p["w"]), x @ p["w"]
    ),
    "mul in jit": lambda p, x: jax.jit(lambda w: x @ (2 * w))(p["w"]),
    "cond of a weight and an array": lambda p, x: (
        x @ jax.lax.cond(x.sum() > -99, lambda w, v: w, lambda w, v: v, p["w"], p["v"])
    ),
    "cond of an array and a weight": lambda p, x: (
        x @ jax.lax.cond(x.sum() < -99, lambda v, w: v, lambda v, w: w, p["v"], p["w"])
    ),
    "mul in a branch": lambda p, x: (
        x @ jax.lax.cond(x.sum() > -99, lambda w: w, lambda w: 2 * w, p["w"])
    ),
    "mul in the other branch": lambda p, x: (
        x @ jax.lax.cond(x.sum() < -99, lambda w: 2 * w, lambda w: w, p["w"])
    ),
}


def path(name):
    """The parameter that cannot be answered for."""
    return "stack" if "stack" in name or "layers" in name or "in a scan" in name else "w"


def lines_of(code):
    """The lines of a function and of those inside of it."""
    inner = [const for const in code.co_consts if hasattr(const, "co_lines")]
    own = {line for *_, line in code.co_lines()}
    return own.union(*map(lines_of, inner))


@pytest.mark.parametrize("name", CANNOT)
def test_it_is_an_error_that_names_the_primitive_the_path_and_the_line(name):
    with pytest.raises(jp.UserError) as caught:
        jax.eval_shape(jp.lift(CANNOT[name]), BOUND, X)
    text = str(caught.value)
    begin = re.match(r"(\w+), (\w+) at \S*?([\w.]+):(\d+)", text)
    assert begin, text
    assert begin[1] == path(name)
    assert begin[2] == name.split(" ")[0]
    assert begin[3] == pathlib.Path(__file__).name
    assert int(begin[4]) in lines_of(CANNOT[name].__code__)
    assert text.endswith("leave it out of the adapter, or call lift with materialize=True.")
    assert "\n" not in text


@pytest.mark.parametrize("name", CANNOT)
def test_with_materialize_it_is_what_the_summed_weight_gives_and_a_note_says_where(name, capsys):
    function = CANNOT[name]
    actual = jp.lift(function, materialize=True)(BOUND, X)
    notes = capsys.readouterr().err.strip().splitlines()
    np.testing.assert_allclose(actual, function(MERGED, X), rtol=1e-5, atol=1e-5)
    assert np.abs(actual - function(BASE, X)).max() > 1e-2
    primitive = name.split(" ")[0]
    assert any(one.startswith(f"note: {path(name)}, {primitive} at ") for one in notes), notes
    assert all(one.endswith("the whole weight is formed there.") for one in notes)
    assert len(notes) == len(set(notes))


@pytest.mark.parametrize("name", ["custom_jvp_call", "custom_vjp_call"])
def test_a_rule_that_a_formed_weight_enters_stays_in_force(name):
    """Its gradient is not that of what it computes."""
    node = BOUND["w"]
    lifted = jp.lift(CANNOT[name], materialize=True)
    ours = jax.grad(lambda b: lifted({**BOUND, "w": node.replace(b=b)}, X).sum())(node.b)
    summed = lambda b: node.base.raw + node.scale * node.a @ b  # noqa: E731
    theirs = jax.grad(lambda b: CANNOT[name]({**MERGED, "w": summed(b)}, X).sum())(node.b)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
