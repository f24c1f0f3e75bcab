"""The laws that a lifted model of any package must keep, measured on one model.

All products are in float32 at the highest precision. Adapters are moved away from where they start
by drawn numbers, so that they change what the model computes; how much is measured too. A gap is
the largest difference, as a part of the largest value.
"""

import collections
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp

TOLERANCE = 1e-5
MOVED_AT_LEAST = 1e-2
RANK = 4
MOVES = {"ia3": 0.5}
"""By kind of adapter, the size of the numbers by which it is moved; else a small one."""
STEPS, LEARNING_RATE = 100, 1e-2
METHODS = {
    "LoRA": jp.LoRA(rank=RANK, targets="all-linear"),
    "DoRA": jp.LoRA(rank=RANK, dora=True, targets="all-linear"),
    "IA3": jp.IA3(targets="all-linear", feedforward=()),
}
ALONE = "start"
"""With each operation alone; compiled, XLA may join the branch's sum with what comes after it."""
WITHOUT_GRADIENTS = ("DoRA",)
"""It holds its norm constant, and merged weights do not."""


class AnyModel(NamedTuple):
    """A model of a package that is not ours.

    Attributes:
        package: The package and its version.
        kind: "Linen" or "NNX".
        apply: A pure function of the parameters and `inputs`.
        params: Linen's whole variables, or an NNX state; `jaxpeft.bind` gives back the same kind.
        inputs: Other arguments: the batch; for NNX also the state that is not trained.
        loss: A number for what `apply` gives.
    """

    package: str
    kind: str
    apply: Callable[..., Any]
    params: Any
    inputs: tuple
    loss: Callable[[Any], Any]


class _Lifted:
    """The lifted model under ``jit``; it counts how often it is traced."""

    def __init__(self, model: AnyModel):
        self.model, self.traces = model, 0
        self._run = jax.jit(self._traced)

    def outputs(self, params: Any, adapter: Any, *inputs: Any) -> Any:
        """What the adapted model gives; for use inside of traced functions."""
        return jp.lift(self.model.apply)(jp.bind(params, adapter), *inputs)

    def _traced(self, params: Any, adapter: Any, *inputs: Any) -> Any:
        self.traces += 1
        return self.outputs(params, adapter, *inputs)

    def __call__(self, adapter: Any) -> Any:
        return self._run(self.model.params, adapter, *self.model.inputs)

    def loss(self, trained: Any, adapter: Any, params: Any, *inputs: Any) -> Any:
        """The loss as a function of the adapter's trained arrays."""
        return self.model.loss(self.outputs(params, adapter.replace(params=trained), *inputs))

    def merged_loss(self, trained: Any, adapter: Any, params: Any, *inputs: Any) -> Any:
        """The same through merged weights."""
        merged = jp.merge(params, adapter.replace(params=trained))
        return self.model.loss(self.model.apply(merged, *inputs))


def check(model: AnyModel, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything about one model.

    Args:
        model: The model.
        say: Prints a line of progress.

    Returns:
        Figures by name, and under "broken" a sentence for each law that does not hold.
    """
    begin, before = time.perf_counter(), fingerprint(model.params)
    roles = jp.describe(model.apply, model.params, *model.inputs)
    counts = dict(collections.Counter(row.role for row in roles.values()).most_common())
    say("roles: " + ", ".join(f"{count} {role}" for role, count in counts.items()))
    for row in roles.values():
        if row.role in ("other", "unused"):
            say(f"roles: {row.path} is {row.role} {row.why}")
    lifted, found = _Lifted(model), {"roles": counts, "gaps": {}, "moved": {}, "broken": []}
    base = jax.jit(model.apply)(model.params, *model.inputs)
    for name, method in METHODS.items():
        init = jax.jit(
            lambda key, method=method: jp.init_adapter(method, model.params, key, roles=roles)
        )
        new = init(jax.random.key(1))
        if name == "LoRA":
            found |= sizes(model.params, new, roles)
            found["gaps"] |= _start_gaps(lifted, new, base)
        else:
            lifted = _Lifted(model)
        _check_method(name, lifted, new, base, roles, found)
        say(f"{name}: " + ", ".join(f"{k} {v:.1e}" for k, v in found["gaps"].items() if name in k))
    found |= learn(model, roles, say)
    if fingerprint(model.params) != before:
        found["broken"].append("the base's arrays are not the same bytes as before")
    found["broken"] += _broken(found)
    return found | {"seconds": time.perf_counter() - begin}


def _start_gaps(lifted: _Lifted, new: Any, base: Any) -> dict[str, float]:
    """How far a new adapter is from the base, with each operation alone and compiled."""
    model = lifted.model
    with jax.disable_jit():
        plain = model.apply(model.params, *model.inputs)
        alone = gap(plain, lifted.outputs(model.params, new, *model.inputs))
    return {ALONE: alone, "start, compiled": gap(base, lifted(new))}


def _check_method(
    name: str, lifted: _Lifted, new: Any, base: Any, roles: Any, found: dict[str, Any]
) -> None:
    """Measures the laws of one method."""
    model, adapter = lifted.model, moved(new)
    out = lifted(adapter)
    merged = jax.jit(jp.merge)(model.params, adapter)
    found["gaps"][f"{name} merged"] = gap(jax.jit(model.apply)(merged, *model.inputs), out)
    found["moved"][name] = gap(base, out)
    if name not in WITHOUT_GRADIENTS:
        given = (adapter.params, adapter, model.params, *model.inputs)
        ours, theirs = (
            jax.jit(jax.grad(loss))(*given) for loss in (lifted.loss, lifted.merged_loss)
        )
        found["gaps"][f"{name} gradients"] = gap(theirs, ours)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "adapter")
        jp.save_adapter(place, adapter, model.params)
        loaded = jp.load_adapter(place, model.params, roles=roles)
    if fingerprint(loaded) != fingerprint(adapter) or loaded.spec != adapter.spec:
        found["broken"].append(f"{name}: the adapter that was loaded is not the one that was saved")
    if not np.array_equal(_flat(lifted(loaded)), _flat(out)):
        found["broken"].append(f"{name}: the loaded adapter gives other outputs")
    found["traces"] = max(found.get("traces", 0), lifted.traces)
    if lifted.traces != 1:
        found["broken"].append(f"{name}: several adapters took {lifted.traces} traces, not one")


def learn(model: AnyModel, roles: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains a new LoRA adapter with Adam on the one batch; gives the loss before and after."""
    lifted, rule = _Lifted(model), optax.adam(LEARNING_RATE)
    adapter = jp.init_adapter(METHODS["LoRA"], model.params, jax.random.key(2), roles=roles)

    @jax.jit
    def step(trained: Any, state: Any, params: Any, *inputs: Any) -> tuple[Any, Any, Any]:
        loss, slope = jax.value_and_grad(lifted.loss)(trained, adapter, params, *inputs)
        updates, state = rule.update(slope, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    trained, losses = adapter.params, []
    state = rule.init(trained)
    for _ in range(STEPS):
        trained, state, loss = step(trained, state, model.params, *model.inputs)
        losses.append(float(loss))
    say(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after {STEPS} steps of Adam")
    return {"losses": [losses[0], losses[-1]]}


def _broken(found: dict[str, Any]) -> list[str]:
    """A sentence for each measured law that does not hold."""
    gaps, (first, last) = found["gaps"], found["losses"]
    limits = {name: 0.0 if name == ALONE else TOLERANCE for name in gaps}
    broken = [
        f"{name}: the gap is {gaps[name]:.2e}, allowed is {limit:g}"
        for name, limit in limits.items()
        if not gaps[name] <= limit
    ]
    broken += [
        f"{name}: the moved adapter changes outputs by {part:.2e} only, so nothing is shown"
        for name, part in found["moved"].items()
        if not part >= MOVED_AT_LEAST
    ]
    return broken + ([] if last < 0.9 * first else ["training does not bring the loss down"])


def moved(adapter: Any) -> Any:
    """An adapter away from where it starts, as after training."""
    draws, scale = np.random.default_rng(0), MOVES.get(adapter.spec.kind, 0.05)
    shift = lambda x: x + scale * draws.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return dataclasses.replace(adapter, params=jax.tree.map(shift, adapter.params))


def sizes(params: Any, adapter: Any, roles: Any) -> dict[str, int]:
    """How many parameters there are, are adapted, and are trained."""
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "kernels": len(adapter.spec.paths),
        "adapted": sum(int(np.prod(roles[path].shape)) for path in adapter.spec.paths),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(adapter.params)),
    }


def fingerprint(tree: Any) -> str:
    """A hash of the bytes of all leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def gap(expected: Any, actual: Any) -> float:
    """The largest difference of two trees, as a part of the largest expected value."""
    one, other = _flat(expected), _flat(actual)
    return float(np.abs(one - other).max() / np.abs(one).max())


def _flat(tree: Any) -> np.ndarray:
    """All numbers of a tree, in float64."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def next_token_loss(ids: Any) -> Callable[[Any], Any]:
    """Cross-entropy of the next token, as a function of logits."""
    return lambda logits: optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), ids[:, 1:]
    ).mean()
