"""Operations on whole adapters: padding to one rank, and stacking on a leading axis.

Stacked adapters are trained or served at once: under ``jax.vmap`` against one base, or in one batch
with an index (`jaxpeft.methods.mixed`). Padding consists of zeros, which change no method: a layer
of rank 0 and zeros is not adapted, and zero columns of A times zero rows of B stay zero in
training.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import RANK, Adapter
from jaxpeft.methods.chat_label import joined_chat
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import SHARED


def pad_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same adapter with its factors padded to a larger width.

    Args:
        adapter: An adapter of a family with `Kind.pads_rank`, such as LoRA.
        rank: The width; at least the adapter's own.

    Returns:
        An adapter that computes and trains the same; its buffers ``rank`` hold the true ranks.

    Raises:
        UserError: The family's factors cannot be padded, or the adapter is wider than `rank`.
    """
    extra, kind = rank - adapter.spec.rank, KINDS[adapter.spec.kind]
    if extra == 0:
        return adapter
    if not kind.pads_rank:
        raise UserError(
            f"rank: adapters of kind {adapter.spec.kind!r} have a fixed rank of "
            f"{adapter.spec.rank}, not {rank}; only LoRA's factors can be padded."
        )
    if extra < 0:
        raise UserError(f"rank: the adapter has rank {adapter.spec.rank}, above {rank}.")

    places = set(adapter.spec.paths)

    def pad(path: str, leaf: jnp.ndarray) -> jnp.ndarray:
        place, _, name = path.rpartition("/")
        axis = kind.role(name).rank_axis
        if axis is None or place not in places:
            return leaf
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, extra)
        return jnp.pad(leaf, widths)

    def pad_all(tree: dict) -> dict:
        leaves = paths.flatten(tree)
        return paths.unflatten({path: pad(path, leaf) for path, leaf in leaves.items()})

    return dataclasses.replace(
        adapter,
        params=pad_all(adapter.params),
        buffers=pad_all(adapter.buffers),
        spec=dataclasses.replace(adapter.spec, rank=rank),
    )


def pad_alike(adapters: Mapping[str, Adapter | None]) -> dict[str, Adapter | None]:
    """Adapters by name, padded to the largest rank of their family if the family can be padded.

    They then share one compiled program.
    """
    widths: dict[str, int] = {}
    for one in adapters.values():
        if one is not None and KINDS[one.spec.kind].pads_rank:
            widths[one.spec.kind] = max(one.spec.rank, widths.get(one.spec.kind, 0))
    return {
        name: one if one is None else pad_rank(one, widths.get(one.spec.kind, one.spec.rank))
        for name, one in adapters.items()
    }


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Several adapters of one kind as one tree with a leading axis on every leaf.

    Args:
        adapters: Adapters of the same kind and options for the same base. LoRA's ranks may differ,
            and so may the places that they adapt: missing places become zeros.

    Returns:
        A tree for ``jax.vmap``; also for `jaxpeft.bind`, `jaxpeft.generate` and a model, together
        with ``index=``.

    Raises:
        UserError: There are none, or they cannot be stacked together.
    """
    several = list(adapters)
    if not several:
        raise UserError("adapters: there are none to stack.")
    first = several[0].spec
    for one in several[1:]:
        if (one.spec.kind, one.spec.options) != (first.kind, first.options):
            raise UserError(
                "adapters: only adapters of one kind and the same options can be stacked, got "
                f"{first.kind} {dict(first.options)} and {one.spec.kind} {dict(one.spec.options)}; "
                "jaxpeft.combine and jaxpeft.to_lora make plain LoRAs of them."
            )
    several = [pad_rank(one, max(one.spec.rank for one in several)) for one in several]
    places = sorted({path for one in several for path in one.spec.paths})
    for path in places:
        holders = [one for one in several if path in one.spec.paths]
        sorts = {tuple(sorted(paths.get(one.params, path))) for one in holders}
        if len(sorts) > 1:
            raise UserError(
                f"adapters: {path} holds {' and '.join(map(str, sorted(sorts)))} in different "
                "ones; only places trained in the same way can be stacked."
            )
        ranked = paths.get(holders[0].buffers, f"{path}/{RANK}") is not None
        if len(holders) < len(several) and not ranked:
            raise UserError(
                f"adapters: not all of them change {path}, and an adapter of kind "
                f"{first.kind!r} cannot leave it as it is; give all the same targets."
            )
    spec = dataclasses.replace(several[0].spec, paths=tuple(places))
    params = _stack([one.params for one in several])
    buffers = _stack([one.buffers for one in several])
    chat = joined_chat(several)
    return dataclasses.replace(several[0], params=params, buffers=buffers, spec=spec, chat=chat)


def _stack(trees: Sequence[dict]) -> dict:
    """Stacks leaves by path on a new first axis; a leaf that a tree lacks becomes zeros."""
    flat = [paths.flatten(tree) for tree in trees]
    stacked, wrong = {}, []
    for path in sorted({path for leaves in flat for path in leaves}):
        found = [leaves[path] for leaves in flat if path in leaves]
        if len({leaf.shape for leaf in found}) > 1:
            wrong.append(f"{path}: {', '.join(str(leaf.shape) for leaf in found)}")
            continue
        if path.startswith(SHARED + "/") and len(found) < len(flat):
            wrong.append(f"{path}: {len(found)} of {len(flat)} have it")
            continue
        nothing = jnp.zeros_like(found[0])
        stacked[path] = jnp.stack([leaves.get(path, nothing) for leaves in flat])
    if wrong:
        raise UserError(
            f"adapters: {len(wrong)} arrays differ in shape: {first_few(wrong, 3)}; they belong to "
            "different models or settings."
        )
    return paths.unflatten(stacked)
