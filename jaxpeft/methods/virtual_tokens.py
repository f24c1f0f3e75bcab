"""Puts soft prompts in front of tokens: ``with_prompt``.

A soft prompt is a row of ids from the size of the vocabulary on, which
`jaxpeft.methods.prompts.prompt` looks up among the trained rows. Every segment of a packed row gets
its own copy.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import adapters_of
from jaxpeft.methods.registry import KINDS


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Packed rows with virtual tokens in front of every segment.

    Attributes:
        input_ids: int32 ``(batch, longer)``; 0 in new padding.
        segment_ids: int32, the same shape; 0 in padding.
        positions: int32, the same shape, from 0 in every segment.
        places: int32 ``(batch, seq)``: where each of the original tokens is in the longer row.
    """

    input_ids: Any
    segment_ids: Any
    positions: Any
    places: Any


def virtual_ids(adapter: Adapter | Sequence[Adapter] | None, task: Any = 0) -> Any:
    """The ids of a soft prompt's virtual tokens.

    Args:
        adapter: An adapter, several, or None.
        task: For multitask prompt tuning, the task: one number, or one per row.

    Returns:
        int32 of shape ``(n,)``, or ``(batch, n)`` for one task per row; of length 0 for adapters
        without virtual tokens.

    Raises:
        UserError: If the adapter has no such task.
    """
    for one in adapters_of(adapter):
        kind = KINDS[one.spec.kind]
        if count := kind.virtual_tokens(one):
            tasks, chosen = max(kind.tasks(one), 1), np.asarray(task)
            if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= tasks).any():
                raise UserError(f"task: expected 0 to {tasks - 1}, got {task!r:.60}.")
            ids = kind.first_virtual_id(one) + chosen[..., None] * count + np.arange(count)
            return ids.astype(np.int32)
    if np.any(np.asarray(task) != 0):
        raise UserError(f"task: the adapter has no tasks to choose from, got {task!r:.60}.")
    return np.zeros(0, np.int32)


def num_tasks(adapter: Adapter | Sequence[Adapter] | None) -> int:
    """The number of tasks with soft prompts in an adapter; 0 if it has no tasks."""
    found = [KINDS[one.spec.kind].tasks(one) for one in adapters_of(adapter)]
    return max(found, default=0)


@overload
def with_prompt(
    adapter: Adapter | Sequence[Adapter] | None,
    input_ids: Int[Array | np.ndarray, "batch seq"],
    segment_ids: None = None,
    *,
    task: Any = 0,
    index: None = None,
) -> Int[Array | np.ndarray, "batch longer"]: ...


@overload
def with_prompt(
    adapter: Adapter | Sequence[Adapter] | None,
    input_ids: Int[Array | np.ndarray, "batch seq"],
    segment_ids: Int[Array | np.ndarray, "batch seq"] | None = None,
    *,
    task: Any = 0,
    index: Any = None,
) -> Prompted: ...


def with_prompt(
    adapter: Adapter | Sequence[Adapter] | None,
    input_ids: Int[Array | np.ndarray, "batch seq"],
    segment_ids: Int[Array | np.ndarray, "batch seq"] | None = None,
    *,
    task: Any = 0,
    index: Any = None,
) -> Int[Array | np.ndarray, "batch longer"] | Prompted:
    """Writes a soft prompt's virtual ids in front of every segment.

    Args:
        adapter: The adapter with the prompt; without virtual tokens the input is unchanged.
        input_ids: Token ids.
        segment_ids: Packed or right-padded segments, each one contiguous; 0 is padding. They must
            be concrete, because the fullest row determines the length of the result. By default
            each row is one segment, and the function may be traced.
        task: For multitask prompt tuning, the task: one number, or one per row.
        index: For a mixed batch of stacked adapters, the adapter of each row. In rows with -1 the
            virtual tokens become padding, so these rows are as without an adapter.

    Returns:
        Ids ``(batch, n + seq)``; with `segment_ids` or `index` a `Prompted`, whose arrays
        ``module.apply`` takes.

    Raises:
        UserError: If `segment_ids` are traced, or the adapter has no such task.
    """
    virtual = virtual_ids(adapter, task)
    if index is not None and segment_ids is None:
        segment_ids = np.ones(input_ids.shape, np.int32)
    if segment_ids is not None:
        long = put_before_segments(virtual, input_ids, segment_ids)
        segments, positions = hide_unused(
            long.input_ids, long.segment_ids, long.positions, virtual, index
        )
        arrays = (long.input_ids, segments, positions, long.places)
        return Prompted(*map(jnp.asarray, arrays))
    if virtual.size == 0:
        return input_ids
    front = np.broadcast_to(virtual, (input_ids.shape[0], virtual.shape[-1]))
    return jnp.concatenate([front, input_ids], axis=1)


def hide_unused(
    input_ids: Any, segment_ids: Any, positions: Any, virtual: np.ndarray, index: Any
) -> tuple[Any, Any]:
    """Turns virtual tokens into padding in rows of a mixed batch that have no adapter.

    Args:
        input_ids: Ids with virtual ids in front of every segment.
        segment_ids: Their segments, or None for one per row.
        positions: Their positions, or None for 0, 1, 2, ...
        virtual: The virtual ids.
        index: The adapter of every row, -1 for none; None if the batch is not mixed.

    Returns:
        Segments and positions.
    """
    if index is None or virtual.size == 0:
        return segment_ids, positions
    shape, count = input_ids.shape, virtual.shape[-1]
    bare = (jnp.asarray(index) == -1)[:, None]
    segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    places = jnp.arange(shape[1]) if positions is None else jnp.asarray(positions)
    segments = jnp.where(bare & (input_ids >= virtual.min()), 0, segments)
    return segments, jnp.where(bare, jnp.maximum(places - count, 0), places)


def put_before_segments(virtual: np.ndarray, input_ids: Any, segment_ids: Any) -> Prompted:
    """Puts virtual ids in front of every segment of packed rows.

    Args:
        virtual: Ids of virtual tokens, ``(n,)`` or ``(batch, n)``.
        input_ids: ``(batch, seq)``.
        segment_ids: ``(batch, seq)``; every run of one number is a segment.

    Returns:
        The longer rows, with their segment ids and positions.

    Raises:
        UserError: It is called in a traced function, where segments are not known.
    """
    if isinstance(input_ids, Tracer) or isinstance(segment_ids, Tracer):
        raise UserError(
            "a soft prompt goes in front of packed segments outside of jit: call "
            "jaxpeft.with_prompt(adapter, ids, segment_ids) there, and the module inside."
        )
    ids, segments = np.asarray(input_ids, np.int32), np.asarray(segment_ids, np.int32)
    (batch, seq), count = ids.shape, virtual.shape[-1]
    before = np.concatenate([np.zeros((batch, 1), np.int32), segments[:, :-1]], axis=1)
    starts = (segments != 0) & (segments != before)
    runs = np.cumsum(starts, axis=1)
    places = (np.arange(seq) + count * runs).astype(np.int32)
    longer = seq + count * int(runs.max(initial=0))
    rows = np.arange(batch)[:, None]
    first = np.maximum.accumulate(np.where(starts, np.arange(seq), 0), axis=1)
    positions = np.where(segments != 0, np.arange(seq) - first + count, 0)
    row, start = np.nonzero(starts)
    front = places[row, start][:, None] - count + np.arange(count)
    virtual = np.broadcast_to(virtual, (batch, count))[row]

    def lengthened(values: Any, in_front: Any) -> np.ndarray:
        out = np.zeros((batch, longer), np.int32)
        out[rows, places] = values
        out[row[:, None], front] = in_front
        return out

    return Prompted(
        lengthened(ids, virtual),
        lengthened(segments, segments[row, start][:, None]),
        lengthened(positions, np.arange(count)),
        places,
    )
