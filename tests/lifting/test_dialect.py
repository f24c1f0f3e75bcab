"""The jaxprs of the JAX that runs are of a form that the rules of `lift` were written for."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex_core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lifted_nodes import adapted, numbers

import jaxpeft as jp
from jaxpeft.lifting import control, dialect, moves, products
from jaxpeft.lifting.folded import Axes

W, X = numbers(1, 2, 4, 4), numbers(2, 3, 4)
NEVER_MET = {"pjit", "closed_call", "core_call", "custom_vjp_call_jaxpr", "copy_p"}
"""Names that older or newer versions of JAX use, or that public functions do not produce."""


@jax.custom_jvp
def with_jvp(x):
    return x


with_jvp.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


@jax.custom_vjp
def with_vjp(x):
    return x


with_vjp.defvjp(lambda x: (x, None), lambda _, slope: (slope,))


def everything(w, x):
    """Every primitive for which there is a rule."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, v: (c @ v, None)), x, w)
    y = jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w[0], y)
    y = jax.lax.cond(y.sum() > 0, lambda c: c @ w[0], lambda c: c, y)
    y = with_vjp(with_jvp(y))
    y = jax.jit(jax.lax.optimization_barrier)(jnp.asarray(y, jnp.bfloat16))
    y = jax.lax.stop_gradient(checkpoint_name(y, "y"))
    y = jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P()))
    y = jax.shard_map(
        lambda c, d: c + d.sum(), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )(y, jnp.zeros(8))
    z = jnp.copy(x).T.reshape(2, 6)[None][:, 0].squeeze(0)
    sizes = jnp.array([1, 2], jnp.int32)
    z = z + jax.lax.conv(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 1)), (1,), "SAME").sum()
    parts = jax.lax.dynamic_slice(z, (sizes[0],), (2,)), jnp.split(z, 3), jnp.unstack(w)
    return y, parts, x[sizes], jax.lax.ragged_dot(x, w, sizes)


def found(jaxpr):
    """The name and the parameters of every equation, inside of others too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, set(eqn.params)
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from found(getattr(inner, "jaxpr", inner))


SEEN = dict(found(jax.make_jaxpr(everything)(W, X).jaxpr))


@pytest.mark.parametrize("name", dialect.KNOWN)
def test_the_parameters_of_rebuilt_primitives_are_those_that_are_known(name):
    """A rule that leaves a parameter out computes something else."""
    assert name in SEEN, f"jax {jax.__version__} has no {name} any more: give its rule the new name"
    assert SEEN[name] in dialect.KNOWN[name], (
        f"jax {jax.__version__} has a {name} with the parameters {sorted(SEEN[name])}: read its "
        "rule in jaxpeft/lifting again, then add the set to dialect.KNOWN"
    )


@pytest.mark.parametrize("name", sorted({*moves.MOVES, *control.RULES, *products.USES} - NEVER_MET))
def test_primitives_with_a_rule_are_still_called_so(name):
    assert name in SEEN, f"jax {jax.__version__} calls {name} something else"


def test_a_primitive_of_another_form_is_an_error(monkeypatch):
    bound, _ = adapted({"w": W}, {"w": Axes((1,), (2,), (0,))})
    scan = jp.lift(lambda p, x: jax.lax.scan(lambda y, w: (y @ w, None), x, p["w"])[0])
    monkeypatch.setitem(dialect.KNOWN, "scan", ({"of_yesterday"},))
    with pytest.raises(jp.UserError, match="this version of JAX has a scan of another form"):
        scan(bound, X)


def test_constants_and_carried_values_of_a_scan_are_counted():
    def function(w, x):
        return jax.lax.scan(lambda c, v: ((c[0] @ w[0] @ w[1], c[1] + v), None), (x, 0.0), X[:, 0])

    (eqn,) = (eqn for eqn in jax.make_jaxpr(function)(W, X).eqns if eqn.primitive.name == "scan")
    consts, carry = dialect.scan_counts(eqn.params)
    assert (consts + 3, carry) == (len(eqn.invars), 2)
    assert consts > 0
