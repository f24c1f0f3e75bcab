"""One training step as a pure function: gradients of the trained leaves, and one update.

The trained leaves are those that the label tree over ``{"base": ..., "adapter": ...}`` calls
trainable (see `jaxpeft.updates.optimizers.masked`); normally all of the adapter and nothing of the
base. They are in the state, which is donated; the frozen base is an argument that is only read.
Gradients are taken with respect to the trained leaves alone: frozen leaves have gradient None,
never zeros.

A step changes only the counters if its loss or gradient is not finite, or if the update would make
a finite trained value or moment infinite or NaN.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxpeft.methods.adapter import Adapter, Label, Spec
from jaxpeft.updates.optimizers import TRAINABLE, MaskedTransformation
from jaxpeft.updates.reached import flags_of

LossFn = Callable[..., Any]


@flax.struct.dataclass
class TrainState:
    """Everything that changes in training.

    Attributes:
        step: Steps done, skipped ones included.
        trained: ``{"base": ..., "adapter": ...}`` with None at frozen leaves.
        frozen: The adapter's own frozen leaves, with None at trained ones.
        buffers: The adapter's frozen arrays.
        opt_state: State of the optimizer, of trained leaves only.
        key: Typed PRNG key; step ``i`` uses ``fold_in(key, i)``.
        skipped: Steps skipped so far, because a number was or would have become non-finite.
        skipped_in_a_row: Steps skipped since the last good step.
        spec: Static part of the adapter.
        base_name: The text of the adapter's `base_name`. Unlike labels these texts are compared, so
            that a compiled step never returns the names of the adapter it was traced for.
        base_revision: The text of the adapter's `base_revision`.
        chat: The text of the adapter's `chat`.
    """

    step: Any
    trained: Any
    frozen: Any
    buffers: Any
    opt_state: Any
    key: Any
    skipped: Any
    skipped_in_a_row: Any
    spec: Spec = flax.struct.field(pytree_node=False)
    base_name: str = flax.struct.field(pytree_node=False, default="")
    base_revision: str = flax.struct.field(pytree_node=False, default="")
    chat: str = flax.struct.field(pytree_node=False, default="")

    @property
    def adapter(self) -> Adapter:
        """The adapter with its current values and the names it had when training began."""
        return Adapter(
            params=_combine(self.trained["adapter"], self.frozen),
            buffers=self.buffers,
            spec=self.spec,
            base_name=Label(self.base_name),
            base_revision=Label(self.base_revision),
            chat=Label(self.chat),
        )

    def base(self, params: Any) -> Any:
        """Base parameters, of the kind that is given, with the trained base leaves in place."""
        return _combine(self.trained["base"], params)


def adapter_only(tree: dict) -> dict:
    """The usual choice of trained leaves: all of the adapter, nothing of the base.

    Args:
        tree: ``{"base": base parameters, "adapter": trained arrays}``.

    Returns:
        A tree of the same structure: True at the leaves that are trained.
    """
    return {
        "base": jax.tree.map(lambda _: False, tree["base"]),
        "adapter": jax.tree.map(lambda _: True, tree["adapter"]),
    }


def init_train_state(
    params: Any, adapter: Adapter, tx: MaskedTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step.

    Args:
        params: Base parameters: nested dicts, or any other tree of arrays.
        adapter: The adapter to train; its arrays are copied, so donation leaves them alone.
            Base leaves that are trained are kept in float32, whatever the base's dtype: an
            update of 1e-3 would be lost in bfloat16.
        tx: An optimizer from `jaxpeft.masked`.
        key: Typed PRNG key for dropout.

    Returns:
        The state.

    Raises:
        TypeError: The optimizer is not from `jaxpeft.masked`.
    """
    check_masked(tx)
    tree = {"base": params, "adapter": adapter.params}
    labels = tx.labels(tree)
    on = jax.tree.map(lambda label: label == TRAINABLE, labels)
    trained = {
        "base": jax.tree.map(
            lambda t, leaf: jnp.array(leaf, jnp.float32) if t else None, on["base"], params
        ),
        "adapter": jax.tree.map(
            lambda t, leaf: jnp.copy(leaf) if t else None, on["adapter"], adapter.params
        ),
    }
    tree["base"] = _combine(trained["base"], params)
    frozen = jax.tree.map(lambda t, x: None if t else jnp.copy(x), on["adapter"], adapter.params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        trained=trained,
        frozen=frozen,
        buffers=jax.tree.map(jnp.copy, adapter.buffers),
        opt_state=jax.jit(tx.init)(tree),
        key=jnp.copy(key),
        skipped=jnp.copy(zero),
        skipped_in_a_row=jnp.copy(zero),
        spec=adapter.spec,
        base_name=str(adapter.base_name),
        base_revision=str(adapter.base_revision),
        chat=str(adapter.chat),
    )


def make_train_step(
    loss_fn: LossFn,
    tx: MaskedTransformation,
    *,
    microbatches: int = 1,
    state_shardings: Any = None,
    watch_gradients: bool = False,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict]]:
    """Compiles a training step for any loss: the one the trainer itself uses.

    Args:
        loss_fn: ``loss_fn(params, adapter, batch, key)``. It returns a scalar, or a pair
            ``(total, aux)``. The total is divided by ``aux["weight"]``, such as the number of
            supervised tokens (1 if it is missing); further entries are sums to report. Totals
            and weights are summed over microbatches and divided once.
        tx: An optimizer from `jaxpeft.masked`.
        microbatches: The number of parts into which a batch is split along its first axis.
        state_shardings: The shardings of the new state; None leaves them to XLA.
        watch_gradients: Whether metrics also hold ``reached``, a vector of flags for
            `jaxpeft.updates.reached.Reached`: which parts have a gradient other than zero.

    Returns:
        ``step(state, params, batch) -> (state, metrics)``, jitted; the state is donated.
        Metrics are scalars: ``loss``, ``grad_norm`` (before clipping), ``weight``, the
        counters ``skipped`` and ``skipped_in_a_row``, and the sums of `aux`.

    Raises:
        TypeError: The optimizer is not from `jaxpeft.masked`.

    Example:
        The squared error of one adapted kernel:

        >>> import jaxpeft as jp
        >>> model = lambda params, x: x @ params["kernel"]
        >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> roles = jp.describe(model, params, x)
        >>> method = jp.LoRA(rank=1, targets="all-linear")
        >>> adapter = jp.init_adapter(method, params, jax.random.key(0), roles=roles)
        >>> def loss_fn(params, adapter, batch, key):
        ...     y = jp.lift(model)(jp.bind(params, adapter)["params"], batch["x"])
        ...     return jnp.mean((y - batch["y"]) ** 2)
        >>> tx = jp.masked(optax.adamw(1e-3), jp.adapter_only)
        >>> state = jp.init_train_state(params, adapter, tx, jax.random.key(0))
        >>> step = jp.make_train_step(loss_fn, tx)
        >>> state, metrics = step(state, params, {"x": x, "y": jnp.zeros((1, 2))})
        >>> int(state.step), float(metrics["loss"])
        (1, 9.0)
    """
    check_masked(tx)

    def gradients(state: TrainState, params: Any, batch: Any) -> Any:
        def total(trained: Any, part: Any, key: jax.Array) -> Any:
            now = state.replace(trained=trained)  # pyright: ignore[reportAttributeAccessIssue]
            out = loss_fn(now.base(params), now.adapter, part, key)
            value, aux = out if isinstance(out, tuple) else (out, {})
            return value, {"weight": jnp.ones(()), **aux, "total": value}

        slopes = jax.grad(total, has_aux=True)
        step_key = jax.random.fold_in(state.key, state.step)
        if microbatches == 1:
            return slopes(state.trained, batch, step_key)

        def visit(sums: Any, part: Any) -> Any:
            index, content = part
            new = slopes(state.trained, content, jax.random.fold_in(step_key, index))
            return jax.tree.map(jnp.add, sums, new), None

        parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(slopes, state.trained, first, step_key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(visit, zeros, (jnp.arange(microbatches), parts))[0]

    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, dict]:
        grads, aux = gradients(state, params, batch)
        total, weight = aux.pop("total"), aux["weight"]
        scale = 1.0 / jnp.maximum(weight, 1e-30)
        grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        loss, norm = total * scale, optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        tree = {"base": state.base(params), "adapter": state.adapter.params}
        known = {"buffers": state.buffers, "spec": state.spec}
        updates, opt_state = tx.update(grads, state.opt_state, tree, **known)
        trained = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.trained, updates)
        before, after = (state.trained, state.opt_state), (trained, opt_state)
        finite &= _stays_finite(before, after)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), after, before
        )
        bad = (~finite).astype(jnp.int32)
        state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
            step=state.step + 1,
            trained=trained,
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        metrics = {**aux, "loss": loss, "grad_norm": norm}
        metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        if watch_gradients:
            metrics["reached"] = _everywhere(flags_of(grads, state.spec), state_shardings)
        return state, metrics

    if state_shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def _everywhere(values: jax.Array, state_shardings: Any) -> jax.Array:
    """Replicates values on every device, like the state's counters."""
    if state_shardings is None:
        return values
    return jax.lax.with_sharding_constraint(values, state_shardings.step)


def check_masked(tx: Any) -> None:
    """Checks that an optimizer is masked, so that it knows what is trained.

    Raises:
        TypeError: The optimizer is not masked; the message has the way out.
    """
    if not isinstance(tx, MaskedTransformation):
        raise TypeError(
            "the optimizer must know what is trained: wrap it, as in "
            "jaxpeft.masked(tx, jaxpeft.adapter_only)."
        )


def _stays_finite(before: Any, after: Any) -> jax.Array:
    """Whether no finite number becomes infinite or NaN.

    An optimizer may start with an infinite number, such as the best value so far. Arrays of one
    shape are checked together: a parameter and its moments then take one pass, with less memory
    than a pass for each.
    """
    lost: dict[tuple[int, ...], Any] = {}
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            bad = jnp.isfinite(old) & ~jnp.isfinite(new)
            lost[new.shape] = lost.get(new.shape, False) | bad
    return ~functools.reduce(jnp.logical_or, map(jnp.any, lost.values()), jnp.bool_(False))


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Splits a batch into parts of interleaved rows, so that every device has rows in each part."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _combine(first: Any, second: Any) -> Any:
    """Takes leaves of `first`, or of `second` where `first` has None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )
