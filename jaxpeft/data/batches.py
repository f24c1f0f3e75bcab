"""Batches as a pure function of the step: which examples a batch holds, and their arrays.

Examples are packed once. The sequences, shuffled anew in every epoch, form an endless stream, and
batch `step` holds the stream's items from ``step * batch_size`` on. There is no other state: the
number of workers or processes and earlier interruptions do not matter.

A batch is a dict of arrays of shape ``(batch, seq_len)``:

    tokens       int32    ids, `pad_id` in padding
    targets      int32    the next token of the same example, 0 where there is none
    weights      float32  1 where the target is learned, else 0
    segment_ids  int32    1, 2, ... for the examples of a sequence, 0 in padding
    positions    int32    restart at 0 with every example, 0 in padding
"""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from jaxpeft.core.errors import LostWorkerError, UserError
from jaxpeft.data.encode import Examples
from jaxpeft.data.packing import pack, shuffled

Batch = dict[str, np.ndarray]
_FORMAT = "jaxpeft-plan-1"  # changes if the same input gives other batches
_SEQ_LEN_MULTIPLE = 64


class Plan:
    """Training batches of a file, by step. A plan never changes after it is built.

    Args:
        examples: What to learn from.
        batch_size: Sequences of a batch, over all processes.
        max_length: The longest example allowed, and the length of packed sequences.
        packing: Whether several examples share a sequence.
        seed: Decides packing and order.
        pad_id: Token in padding.

    Attributes:
        seq_len: Length of every sequence: `max_length` when packing, else the longest example
            rounded up to a multiple of 64, at most `max_length`.
        num_sequences: Sequences of an epoch.
        steps_per_epoch: Batches of an epoch, the last of which may run into the next epoch.
        tokens_per_epoch: Without padding.
        supervised_tokens_per_epoch: Targets that are learned.
        hash: Hex sha256 over everything that decides a batch.

    Raises:
        UserError: If there are fewer sequences than a batch holds.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        max_length: int,
        packing: bool = True,
        seed: int = 0,
        pad_id: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"Plan.batch_size must be at least 1, got {batch_size}.")
        if seed < 0:
            raise ValueError(f"Plan.seed must not be negative, got {seed}.")
        self._layout = _Layout(examples, max_length, packing, seed, pad_id)
        self.batch_size, self.seed = batch_size, seed
        self.seq_len = self._layout.seq_len
        self.num_sequences = len(self._layout.sequences)
        if self.num_sequences < batch_size:
            packed = f" packed into {self.num_sequences} sequences" if packing else ""
            raise UserError(
                f"{examples.path}: {len(examples)} examples{packed} do not fill one batch of "
                f"{batch_size}; set train.batch_size to at most {self.num_sequences}, "
                + ("data.packing to false, " if packing else "")
                + "or add rows."
            )
        self.steps_per_epoch = -(-self.num_sequences // batch_size)
        self.tokens_per_epoch = sum(map(len, examples.tokens))
        self.supervised_tokens_per_epoch = sum(int(mask[1:].sum()) for mask in examples.masks)
        self.hash = self._layout.digest(batch_size, seed)

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Builds the batch of a step.

        Args:
            step: Any number from 0 on.
            rows: Which sequences of the batch; all of them unless given.

        Returns:
            The arrays, as described at the top of this module.

        Raises:
            ValueError: The step is negative.
        """
        return self._layout.build(_choose(self._sequences_of(step), rows))

    def counts(self, step: int) -> tuple[int, int]:
        """The numbers of non-padding tokens and of supervised tokens in a whole batch.

        Raises:
            ValueError: The step is negative.
        """
        return self._layout.counts(self._sequences_of(step))

    def rows_of(self, step: int) -> list[int]:
        """The lines of the file whose rows are in a step's batch, in the order of the batch.

        Raises:
            ValueError: The step is negative.
        """
        return self._layout.lines_of(self._sequences_of(step))

    def _sequences_of(self, step: int) -> list[int]:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}.")
        sequences, count = [], self.num_sequences
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, index = divmod(place, count)
            sequences.append(int(_order(count, self.seed, epoch)[index]))
        return sequences


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
    pad_id: int | None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every example once, in batches of one shape.

    Args:
        examples: What to evaluate on.
        batch_size: Sequences of a batch.
        max_length: As for `Plan`.
        packing: As for `Plan`.
        pad_id: Token in padding.
        rows: Which sequences of every batch; all of them unless given.

    Yields:
        Batches as `Plan` builds them; the last one is filled with sequences of padding.
    """
    layout = _Layout(examples, max_length, packing, 0, pad_id)
    for start in range(0, len(layout.sequences), batch_size):
        chosen = list(range(start, min(start + batch_size, len(layout.sequences))))
        padded = chosen + [-1] * (batch_size - len(chosen))
        yield layout.build(_choose(padded, rows))


def iterate(
    plan: Plan,
    start_step: int,
    stop_step: int,
    *,
    workers: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of consecutive steps, read ahead by Grain.

    Args:
        plan: Where they come from.
        start_step: The first step.
        stop_step: The step after the last.
        workers: Worker processes; 0 for threads. The batches are the same.
        rows: Which sequences of every batch, such as those of this process; None for all.

    Yields:
        The batches of ``plan.batch`` with these rows.

    Raises:
        LostWorkerError: A worker process was killed, or ended for another reason.
    """
    import grain
    from absl import flags

    steps = range(start_step, stop_step)
    if not steps:
        return
    if not flags.FLAGS.is_parsed():  # Grain reads its settings from absl's flags
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(_BuildBatch(plan, rows))
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = dataset.to_iter_dataset(read)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options)
        # A killed worker cannot free its shared memory. Its loss is reported once, by us.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    iterator = iter(batches)
    try:
        yield from iterator
    except RuntimeError as error:
        if not (workers and "Worker process was terminated" in str(error)):
            raise
        code = re.search(r"exit code (-?\d+)", str(error))
        raise LostWorkerError(
            "a data worker ended" + (f" (exit code {code[1]})" if code else "")
        ) from error
    finally:
        iterator.close()


class _BuildBatch:
    """A picklable function of the step, for worker processes."""

    def __init__(self, plan: Plan, rows: Sequence[int] | None):
        self._plan, self._rows = plan, rows

    def __call__(self, step: int) -> Batch:
        return self._plan.batch(int(step), self._rows)


def _choose(sequences: list[int], rows: Sequence[int] | None) -> list[int]:
    return sequences if rows is None else [sequences[row] for row in rows]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled(count, seed, epoch + 1)  # 0 is for packing


class _Layout:
    """The arrays of examples that are laid out in sequences of one length."""

    def __init__(
        self, examples: Examples, max_length: int, packing: bool, seed: int, pad_id: int | None
    ):
        lengths = [len(tokens) for tokens in examples.tokens]
        if max(lengths) > max_length:
            raise ValueError(f"an example has {max(lengths)} tokens, max_length is {max_length}.")
        rounded = -(-max(lengths) // _SEQ_LEN_MULTIPLE) * _SEQ_LEN_MULTIPLE
        self.seq_len = max_length if packing else min(rounded, max_length)
        self.pad_id = 0 if pad_id is None else pad_id
        self.sequences = (
            pack(lengths, max_length, seed) if packing else [[i] for i in range(len(lengths))]
        )
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._tokens = np.concatenate(examples.tokens).astype(np.int32)
        self._masks = np.concatenate(examples.masks).astype(bool)
        self._lines = list(examples.lines)

    def build(self, sequences: Sequence[int]) -> Batch:
        """Arrays of the numbered sequences; -1 stands for a sequence of padding."""
        shape = (len(sequences), self.seq_len)
        batch: Batch = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "targets": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        for row, sequence in enumerate(sequences):
            at = 0
            for segment, example in enumerate(self.sequences[sequence] if sequence >= 0 else [], 1):
                start, stop = self._starts[example], self._starts[example + 1]
                end = at + int(stop - start)
                batch["tokens"][row, at:end] = self._tokens[start:stop]
                batch["targets"][row, at : end - 1] = self._tokens[start + 1 : stop]
                batch["weights"][row, at : end - 1] = self._masks[start + 1 : stop]
                batch["segment_ids"][row, at:end] = segment
                batch["positions"][row, at:end] = np.arange(end - at)
                at = end
        return batch

    def counts(self, sequences: Sequence[int]) -> tuple[int, int]:
        tokens = supervised = 0
        for sequence in sequences:
            for example in self.sequences[sequence]:
                start, stop = self._starts[example], self._starts[example + 1]
                tokens += int(stop - start)
                supervised += int(self._masks[start + 1 : stop].sum())
        return tokens, supervised

    def lines_of(self, sequences: Sequence[int]) -> list[int]:
        return [self._lines[example] for index in sequences for example in self.sequences[index]]

    def digest(self, batch_size: int, seed: int) -> str:
        settings = [_FORMAT, batch_size, self.seq_len, self.pad_id, seed, self.sequences]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for array in (self._starts.astype("<i8"), self._tokens.astype("<i4"), self._masks):
            digest.update(array.tobytes())
        return digest.hexdigest()
