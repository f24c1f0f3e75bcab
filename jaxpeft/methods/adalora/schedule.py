"""The singular values that AdaLoRA keeps: importance and budget, as a part of the optimizer.

After every update ``t`` (from 1 to ``T``) each trained number ``p`` with clipped gradient ``g`` has
an importance ``I = |p g|``. Its average and the average deviation from it are::

    m <- beta1 m + (1 - beta1) I        u <- beta2 u + (1 - beta2) |I - m|        s = m u

A triplet (one singular value, its column of A, its row of B) has the score ``s(e) + mean s(a) +
mean s(b)``. The budget falls from ``b0``, all triplets, to ``bT``, `Schedule.rank` per kernel::

    b(t) = bT + (b0 - bT) (1 - (t - initial) / (T - final - initial))^3

Every few updates, ``e`` is set to 0 in the ``b0 - b(t)`` triplets with the lowest scores. Triplets
that are removed at update ``T - final`` stay removed. Numbers, order of steps and ties are those of
HF PEFT's ``RankAllocator``, called with the number of the update after the optimizer's step.

Reference:
    Zhang et al., "AdaLoRA", 2023, https://arxiv.org/abs/2303.10512, algorithm 1, equations 8 to 12.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError

LEAVES = frozenset({"a", "b", "e"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The numbers of the budget; see `jaxpeft.methods.adalora.config.AdaLoRA`."""

    steps: int
    rank: int
    initial_steps: int
    final_steps: int
    every: int
    beta1: float
    beta2: float

    def __post_init__(self):
        if self.initial_steps >= self.steps - self.final_steps:
            raise UserError(
                f"method: initial_steps {self.initial_steps} and final_steps {self.final_steps} "
                f"leave none of the {self.steps} updates to lower the ranks in; lower them, or "
                "train for longer."
            )

    @property
    def last(self) -> int:
        """The update at which the final ranks are chosen."""
        return self.steps - self.final_steps

    def cuts(self, first: int, modules: int) -> np.ndarray:
        """The number of triplets that each update removes; 0 for updates that choose none.

        Args:
            first: Triplets of every kernel at the start.
            modules: Number of kernels.

        Returns:
            ``(last + 1,)`` whole numbers by number of the update, computed in float64 as in PEFT.
        """
        start, target = first * modules, self.rank * modules
        cuts = np.zeros(self.last + 1, np.int32)
        for t in range(self.initial_steps + 1, self.last + 1):
            if t % self.every == 0 or t == self.last:
                left = 1 - (t - self.initial_steps) / (self.last - self.initial_steps)
                cuts[t] = start - int((start - target) * left**3 + target)
        return np.maximum(cuts, 0)


class AllocationState(NamedTuple):
    """The state of `allocate_ranks`, beside the state of the optimizer that it follows.

    Attributes:
        inner: State of that optimizer.
        count: Updates done.
        importance: By place, the averages of importance of its leaves.
        uncertainty: By place, the averages of uncertainty of its leaves.
        kept: By place, the singular values in the final choice.
    """

    inner: Any
    count: jax.Array
    importance: dict
    uncertainty: dict
    kept: dict


def allocate_ranks(
    tx: Any, schedule: Schedule, count_modules: Callable[[dict], int]
) -> optax.GradientTransformationExtraArgs:
    """Follows an optimizer's updates with the choice of ranks.

    Args:
        tx: Any optax transformation. Importance uses the gradients that it gets, so clip them
            before this, not in `tx`.
        schedule: When to choose, and how many.
        count_modules: A function from the shapes of the singular values by path to the number of
            kernels that are really adapted (some layers of a stack may not be). It returns a static
            number.

    Returns:
        A transformation over any tree with dicts ``{"a", "b", "e"}`` in it. Its update takes
        ``buffers=`` with ``rank`` at the same paths (under "adapter", if the tree has that key),
        and ``spec=``, the adapter's; `jaxpeft.make_train_step` passes both. Of an adapter that was
        made with roles, every kernel of every stack is adapted, and `count_modules` is not asked.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> AllocationState:
        places = paths.unflatten(places_of(params))
        kept = {path: {"e": jnp.ones(x["e"].shape, bool)} for path, x in places_of(params).items()}
        return AllocationState(
            inner=tx.init(params),
            count=jnp.zeros((), jnp.int32),
            importance=jax.tree.map(jnp.zeros_like, places),
            uncertainty=jax.tree.map(jnp.zeros_like, places),
            kept=paths.unflatten(kept),
        )

    def update(grads: Any, state: AllocationState, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("allocate_ranks: update needs params.")
        updates, inner = tx.update(grads, state.inner, params, **extra)
        old, moves = places_of(params), places_of(updates)
        count = state.count + 1
        importance, uncertainty = _averages(
            jax.tree.map(jnp.add, old, moves), places_of(grads), state, count, schedule
        )
        first = next(iter(old.values()))["e"].shape[-1]
        values, spec = {path: place["e"] for path, place in old.items()}, extra.get("spec")
        if spec is not None and spec.axes:
            modules = sum(math.prod(e.shape[:-1]) for e in values.values())
        else:
            modules = count_modules(values)
        table = jnp.asarray(schedule.cuts(first, modules))
        cut = jnp.where(count <= schedule.last, table[jnp.minimum(count, schedule.last)], 0)
        scores = {
            path: jnp.where(
                _ranks(extra.get("buffers"), path, place["e"])[..., None] > 0,
                _score(importance[path], uncertainty[path]),
                jnp.inf,
            )
            for path, place in old.items()
        }
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        threshold = jnp.where(cut > 0, ordered[jnp.maximum(cut - 1, 0)], -jnp.inf)
        kept, zeroed = {}, {}
        for path, score in scores.items():
            chosen, before = score > threshold, paths.get(state.kept, path)["e"]
            kept[path] = {"e": jnp.where(count == schedule.last, chosen, before)}
            stays = jnp.where(count > schedule.last, before, chosen)
            zeroed[path] = jnp.where(stays, moves[path]["e"], -old[path]["e"])
        later = [paths.unflatten(tree) for tree in (importance, uncertainty, kept)]
        return _with_values(updates, zeroed), AllocationState(inner, count, *later)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def count_places(shapes: dict, targets: Any, exclude: Any) -> int:
    """The number of modules that the patterns choose among the layers of stacked places.

    Args:
        shapes: Arrays by path in ``{"base", "adapter"}`` or in the adapter alone; there is a layer
            axis in front if layers are stacked.
        targets: See `jaxpeft.core.paths.match`.
        exclude: See `jaxpeft.core.paths.match`.
    """
    sites = {}
    for path, leaf in shapes.items():
        path = path.removeprefix("adapter/")
        for layer in range(leaf.shape[0]) if paths.is_stacked(path) else [None]:
            sites[paths.module_name(path, layer)] = paths.Site(path, layer)
    return len(paths.match(targets, exclude, sites))


def places_of(tree: Any) -> dict[str, dict[str, Any]]:
    """The dicts ``{"a", "b", "e"}`` of a tree, by path."""
    places: dict[str, dict[str, Any]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path, _, name = jax.tree_util.keystr(keys, simple=True, separator="/").rpartition("/")
        if name in LEAVES:
            places.setdefault(path, {})[name] = leaf
    return {path: place for path, place in places.items() if place.keys() == LEAVES}


def _averages(
    new: dict, grads: dict, state: AllocationState, count: jax.Array, schedule: Schedule
) -> tuple[dict, dict]:
    """The averages after an update; they no longer change from the last choice on."""
    running, beta1, beta2 = count < schedule.last, schedule.beta1, schedule.beta2
    now = jax.tree.map(lambda p, g: jnp.abs(p * g), new, grads)
    importance = jax.tree.map(
        lambda m, i: jnp.where(running, beta1 * m + (1 - beta1) * i, m),
        *(places_of(state.importance), now),
    )
    uncertainty = jax.tree.map(
        lambda u, i, m: jnp.where(running, beta2 * u + (1 - beta2) * jnp.abs(i - m), u),
        *(places_of(state.uncertainty), now, importance),
    )
    return importance, uncertainty


def _score(importance: dict, uncertainty: dict) -> jax.Array:
    """The scores of a place's triplets, in the shape of its singular values."""
    s = jax.tree.map(jnp.multiply, importance, uncertainty)
    return s["e"] + s["a"].mean(-2) + s["b"].mean(-1)


def _ranks(buffers: Any, path: str, e: jax.Array) -> jax.Array:
    """The buffer ``rank`` of a place; ones for every layer if there are no buffers."""
    rank = paths.get(buffers or {}, path.removeprefix("adapter/") + "/rank")
    return jnp.ones(e.shape[:-1], jnp.int32) if rank is None else rank


def _with_values(tree: Any, values: dict) -> Any:
    """The tree with other singular values at these paths."""

    def put(keys: Any, leaf: Any) -> Any:
        path, _, name = jax.tree_util.keystr(keys, simple=True, separator="/").rpartition("/")
        return values[path] if name == "e" and path in values else leaf

    return jax.tree_util.tree_map_with_path(put, tree)
