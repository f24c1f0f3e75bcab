"""Checks that gradients reach all trained arrays, over the first good steps of a process.

The compiled step gives a flag for every trained leaf, and for every layer of a stacked leaf:
whether any number of it had a gradient other than zero. One good step is not enough to judge: a
factor whose partner starts at zero, such as LoRA's A beside B, has no gradient until the partner
has changed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxpeft.core import paths
from jaxpeft.core.errors import first_few
from jaxpeft.methods.adapter import Spec, ranks_at
from jaxpeft.methods.registry import KINDS

STEPS = 5
"""The number of good steps before judging."""

LEAST_STEPS = 3
"""The number of good steps that a shorter run needs. With a warm-up the first update is zero, so a
factor whose partner starts at zero has no gradient before the third step."""

USUAL_HINT = (
    "the loss does not depend on them: perhaps the model does not use these weights, or a later "
    "weight is zero; if so, leave them out of method.targets or optim.trainable"
)
"""What it may mean that no gradient reaches an array, where its family says nothing else."""

_SHOWN = 8


def flags_of(grads: Any, spec: Spec) -> Bool[Array, "flags"]:
    """Which leaves, and which layers of stacked leaves, have a gradient other than zero.

    Args:
        grads: Gradients with the structure of ``TrainState.trained``, None at frozen leaves.
        spec: The adapter's, which knows the axes over which its places are stacked.

    Returns:
        One flag for each part that `Reached` counts, in its order.
    """
    flags = [jnp.zeros(0, bool)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        axes = tuple(range(_stack_axes(*_split(path), spec), leaf.ndim))
        flags.append(jnp.any(leaf != 0, axis=axes).reshape(-1))
    return jnp.concatenate(flags)


def _stack_axes(owner: str, path: str, spec: Spec) -> int:
    """The number of axes in front of a trained leaf over which it is stacked.

    Leaves of the base of a model that is not of this package count as one part, because nothing is
    recorded of them.
    """
    place = path.rpartition("/")[0]
    if owner == "adapter" and place in spec.paths:
        return spec.stack_axes(place)
    return 0 if spec.axes else int(paths.is_stacked(path))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A trained leaf, or one layer of it.

    Attributes:
        place: The adapted weight that the leaf belongs to, or the leaf's own path.
        name: Name of the leaf at an adapted weight; "" for a leaf that belongs to none.
        layer: Indices on the axes of the stack; empty for a leaf that is not stacked.
        adapted: Whether it is more than padding.
    """

    place: str
    name: str
    layer: tuple[int, ...]
    adapted: bool


class Reached:
    """Collects the flags of a process's first good steps and judges them once.

    Args:
        state: The `jaxpeft.updates.step.TrainState` before the first of these steps.
        first: The number of steps that a resumed run did before.
    """

    def __init__(self, state: Any, first: int):
        self._parts, self._first = list(_parts_of(state)), first
        self._kind, self._foreign = KINDS[state.spec.kind], bool(state.spec.axes)
        self._seen = np.zeros(len(self._parts), bool)
        self._steps = 0

    @property
    def judged(self) -> bool:
        """Whether the judgement was made, so that no more flags are needed."""
        return self._steps >= STEPS

    def add(self, flags: Any, *, last: bool) -> str | None:
        """Takes the flags of a good step.

        Args:
            flags: From `flags_of`.
            last: Whether no step follows.

        Returns:
            A message if it is time to judge and something was never reached, else None.
        """
        self._steps += 1
        self._seen |= np.asarray(flags)
        if self.judged or (last and self._steps >= LEAST_STEPS):
            return self._judge()
        return None

    def _judge(self) -> str | None:
        places: dict[str, list[tuple[_Part, bool]]] = {}
        for part, seen in zip(self._parts, self._seen, strict=True):
            if part.adapted:
                places.setdefault(part.place, []).append((part, bool(seen)))
        missing = {place: list(self._missing_at(place, places[place])) for place in places}
        missing = {place: names for place, names in missing.items() if names}
        if not missing:
            return None
        names = [name for found in missing.values() for name in found]
        hints = dict.fromkeys(self._hint(places[place]) for place in missing)
        return (
            f"no gradient reached {first_few(names, _SHOWN)} in the first {self._steps} steps of "
            f"{'this start' if self._first else 'the run'}: nothing was learned there; "
            f"{'; '.join(hints)}"
        )

    def _missing_at(self, place: str, parts: list[tuple[_Part, bool]]) -> Iterator[str]:
        """Names what was not reached: the whole place, some layers of it, or single leaves.

        In a resumed run single leaves are not judged: of ranks that AdaLoRA has removed, only the
        singular values have a gradient.
        """
        layers = list(dict.fromkeys(part.layer for part, _ in parts))
        leaves = list(dict.fromkeys(part.name for part, _ in parts))
        dead = [n for n in layers if not any(seen for part, seen in parts if part.layer == n)]
        if len(dead) == len(layers):
            yield place + _of(leaves)
            return
        yield from (self._name(place, layer) + _of(leaves) for layer in dead)
        alone = [n for n in leaves if not any(seen for part, seen in parts if part.name == n)]
        if alone and not self._first:
            yield place + _of(alone)

    def _name(self, place: str, layer: tuple[int, ...]) -> str:
        """The name of a layer of a place: Hugging Face's, or the path in another model."""
        if self._foreign:
            return f"{place} [{', '.join(map(str, layer))}]"
        return paths.module_name(place, *layer)

    def _hint(self, parts: list[tuple[_Part, bool]]) -> str:
        """A possible reason why a place was not reached, and the way out."""
        hints = (self._kind.role(part.name).unreached for part, _ in parts)
        return next(filter(None, hints), USUAL_HINT)


def _parts_of(state: Any) -> Iterator[_Part]:
    places = {path: ranks_at(state.adapter, path) for path in state.spec.paths}
    for tree_path, leaf in jax.tree_util.tree_leaves_with_path(state.trained):
        owner, path = _split(tree_path)
        place, _, name = path.rpartition("/")
        if owner != "adapter" or place not in places:
            place, name = path, ""
        ranks = places.get(place) if name else None
        for layer in np.ndindex(leaf.shape[: _stack_axes(owner, path, state.spec)]):
            adapted = ranks is None or bool(np.any(ranks[layer]))
            yield _Part(place, name, layer, adapted)


def _split(path: Any) -> tuple[str, str]:
    """Splits a path of ``TrainState.trained`` into "base" or "adapter" and the rest."""
    owner, _, rest = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
    return owner, rest


def _of(leaves: list[str]) -> str:
    names = [name for name in leaves if name]
    return f" ({', '.join(names)})" if names else ""
