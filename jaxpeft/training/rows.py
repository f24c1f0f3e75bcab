"""The data of a run, read and checked before the model is loaded."""

import dataclasses
import fractions
import functools
import math
from typing import Any

import numpy as np

from jaxpeft.config.run_config import RunConfig
from jaxpeft.core import limits
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.data.batches import Plan
from jaxpeft.data.encode import Examples, encode_file
from jaxpeft.data.questions import Question, has_answer, make_questions
from jaxpeft.models.config import ModelConfig
from jaxpeft.training.output.template import find_template, run_tokenizer


@dataclasses.dataclass(frozen=True)
class Rows:
    """The data of a run, checked before the model is loaded.

    Attributes:
        plan: Training batches by step.
        steps: Updates of the run.
        eval_examples: Held-out examples, or None.
        train_rows: The number of rows to learn from.
        dropped: Rows of the training file that were left out.
        truncated: Training examples that were cut.
        shared: Held-out examples that are training examples too.
        train_examples: Examples made of the rows. A row whose chat template rewrites earlier turns
            gives several.
        stop_ids: Tokens that end learned turns.
        notes: Notes for the user about the rows, a line each.
        questions: The questions for exact match.
    """

    plan: Plan
    steps: int
    eval_examples: Examples | None
    train_rows: int
    dropped: int = 0
    truncated: int = 0
    shared: int = 0
    train_examples: int = 0
    stop_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()

    def lines_of_step(self, step: int) -> str:
        """The lines of the training file that the update of this step learns from."""
        lines = [str(line) for line in self.plan.rows_of(step - 1)]
        return f"lines of its rows: {first_few(lines, 8)}"


def read_data(config: RunConfig, model: ModelConfig, tokenizer: Any = None) -> Rows:
    """Reads and checks the data files; this needs the tokenizer, but not the weights.

    Args:
        config: The run's config.
        model: The architecture of the base.
        tokenizer: The tokenizer, or None to load the one that `config` names.

    Returns:
        The rows to train and evaluate on, and the number of steps.

    Raises:
        UserError: A file, a row or the number of steps is wrong.
    """
    section, batch_size = config.data, config.train.batch_size
    virtual = config.method.num_virtual_tokens
    tasks = config.method.num_tasks
    tokenizer = tokenizer or run_tokenizer(config, find_template(config))
    reading = section.reading(model.eos_token_ids)
    prefix = model.vocab_size + np.arange(max(tasks, 1) * virtual, dtype=np.int32)
    if tasks:
        prefix = prefix.reshape(tasks, virtual)
    encode = functools.partial(
        encode_file,
        tokenizer=tokenizer,
        max_length=section.max_length,
        vocab_size=model.vocab_size,
        on_long=section.on_long,
        on_bad_row=section.on_bad_row,
        num_virtual_tokens=virtual,
        num_tasks=tasks,
        reading=reading,
    )
    examples, held_out, shared = encode(section.train), None, 0
    questions: list[Question] = []
    if section.eval:
        held_out = encode(section.eval).first(config.evaluation.max_rows)
        if config.evaluation.exact_match and not any(map(has_answer, held_out.rows)):
            raise UserError(
                f"evaluation.exact_match: {section.eval} has plain text only; give rows with a "
                "prompt and an answer, or set it to false."
            )
        if config.evaluation.exact_match:
            questions = make_questions(held_out.distinct_rows, tokenizer, reading)
        known = {tokens.tobytes() for tokens in examples.tokens}
        shared = sum(tokens.tobytes() in known for tokens in held_out.tokens)
    plan = Plan(
        examples.with_prefix(prefix),
        batch_size=batch_size,
        max_length=section.max_length,
        packing=section.packing,
        seed=config.train.seed,
        pad_id=model.pad_token_id,
    )
    steps = config.train.steps
    if steps is None:
        steps = steps_of_epochs(config.train.epochs or 1, plan.num_sequences, batch_size)
        if text := limits.exceeds("steps", steps):
            raise UserError(f"train.epochs: {config.train.epochs} epochs make steps, which {text}.")
    if config.optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps: {config.optim.warmup_steps} are more than the {steps} steps "
            f"that {config.train.epochs} epochs make; lower it."
        )
    return Rows(
        plan,
        steps,
        held_out and held_out.with_prefix(prefix),
        train_rows=examples.num_rows,
        train_examples=len(examples),
        stop_ids=examples.stop_ids,
        notes=examples.notes,
        questions=tuple(questions),
        dropped=sum(examples.dropped.values()),
        truncated=examples.truncated,
        shared=shared,
    )


def steps_of_epochs(epochs: float, num_sequences: int, batch_size: int) -> int:
    """The number of updates that see at least as many sequences as `epochs` passes.

    Example:
        >>> steps_of_epochs(1, 9, 4), steps_of_epochs(0.1, 30, 1)  # 0.1 as it is written
        (3, 3)
    """
    return math.ceil(fractions.Fraction(str(epochs)) * num_sequences / batch_size)
