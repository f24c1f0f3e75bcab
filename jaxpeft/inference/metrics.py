"""Metrics of a model with and without adapters: loss, perplexity, accuracy, exact match."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.core.errors import UserError
from jaxpeft.data.batches import eval_batches
from jaxpeft.data.encode import Examples, encode_file
from jaxpeft.data.questions import Question, make_questions
from jaxpeft.data.settings import Reading
from jaxpeft.inference.chat_prompts import stop_ids, tokenizer_of
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.algebra.stacking import pad_alike
from jaxpeft.methods.chat_settings import chat_of
from jaxpeft.methods.virtual_tokens import num_tasks, virtual_ids
from jaxpeft.pretrained.model import Model
from jaxpeft.updates.losses import make_lm_loss

CUT = "eval_answers_cut_in_thinking"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answered row.

    Attributes:
        prompt: The question: the text, or the last message before the answer.
        reference: The answer in the file.
        answer: The generated text, without thinking.
        cut: Whether ``max_new_tokens`` ended the answer while the model was still thinking.
    """

    prompt: str
    reference: str
    answer: str
    cut: bool = False

    def values(self) -> dict[str, Any]:
        """The line of `samples.jsonl`; it has `cut` only if that is true."""
        values = dataclasses.asdict(self)
        return values if self.cut else {k: v for k, v in values.items() if k != "cut"}

    @property
    def correct(self) -> bool:
        """Whether both texts are equal except for white space around them."""
        return self.answer.strip() == self.reference.strip()


def evaluate_loss(
    base: Model,
    batches: Iterable[dict],
    adapter: Adapter | None = None,
    put: Callable[[dict], dict] | None = None,
) -> dict[str, float]:
    """Teacher-forced metrics over supervised tokens.

    Args:
        base: The model.
        batches: From `jaxpeft.data.batches.eval_batches`.
        adapter: One adapter, several that act together, or None for the base alone.
        put: Places a batch on devices; None leaves it as it is.

    Returns:
        ``eval_loss`` (mean negative log-likelihood in nats), ``eval_perplexity`` and
        ``eval_token_accuracy``.

    Raises:
        UserError: If there is no supervised token.
    """
    total = weight = correct = 0.0
    for batch in batches:
        part = _batch_sums(base, adapter, put(batch) if put else batch)
        total, weight, correct = (
            old + float(new) for old, new in zip((total, weight, correct), part, strict=True)
        )
    if weight == 0:
        raise UserError("evaluation needs batches with at least one supervised token.")
    loss = total / weight
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval_token_accuracy": correct / weight,
    }


@jax.jit
def _batch_sums(base: Model, adapter: Any, batch: Any) -> Any:
    loss_fn = make_lm_loss(base.module.clone(remat="none"), head_frozen=True)
    total, aux = loss_fn(base.params, adapter, batch)
    return total, aux["weight"], aux["correct"]


def exact_match(
    base: Model,
    rows: Sequence[dict | Question],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    reading: Reading | None = None,
) -> tuple[float, list[Sample]]:
    """Answers every row greedily and compares the answer with the row's own.

    Blocks of thinking in front of an answer are ignored, in the generated text and in the row.

    Args:
        base: The model, with its tokenizer.
        rows: Rows of data, or questions from `jaxpeft.data.questions.make_questions`. Rows of
            plain text have no reference and are left out.
        adapter: One adapter, several that act together, or None for the base alone.
        max_new_tokens: Length of the longest answer, in tokens.
        batch_size: Prompts decoded at once.
        reading: How rows are read; by default as in the adapter's training.

    Returns:
        The share of answers that equal their reference, and all answers.

    Raises:
        UserError: If no row has a reference.
    """
    from jaxpeft.data.chat.thinking import thinks_on
    from jaxpeft.data.questions import without_special

    tokenizer = tokenizer_of(base, adapter)
    reading = reading or reading_of(base, adapter)
    questions: list[Question] = []
    for is_question, group in itertools.groupby(rows, lambda row: isinstance(row, Question)):
        some: list[Any] = list(group)
        questions += some if is_question else make_questions(some, tokenizer, reading)
    if not questions:
        raise UserError("exact match needs rows with a prompt and an answer, there are none.")
    stops = [question.stop for question in questions if question.stop is not None]
    answers = generate_ids(
        base,
        [question.prompt for question in questions],
        adapter=adapter,
        task=[question.task for question in questions] if num_tasks(adapter) else 0,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stops=tuple(dict.fromkeys([*stop_ids(base, adapter), *stops])),
    )
    samples = []
    for question, ids in zip(questions, answers, strict=True):
        text = tokenizer.decode(ids)
        samples.append(
            Sample(
                question.shown,
                question.reference,
                without_special(tokenizer, question.answer_of(text)),
                cut=question.is_chat
                and len(ids) == max_new_tokens
                and thinks_on(question.text, text),
            )
        )
    return sum(sample.correct for sample in samples) / len(samples), samples


def count_cut(samples: Sequence[Sample]) -> dict[str, float]:
    """The number of answers cut while the model was thinking, as a metric; empty for none."""
    cut = sum(sample.cut for sample in samples)
    return {CUT: float(cut)} if cut else {}


def reading_of(base: Model, adapter: Adapter | None) -> Reading:
    """How rows are read to evaluate an adapter: as in its training."""
    settings = chat_of(adapter)
    names = ("learn", "end_of_turn", "special_tokens_in_content")
    chosen: Any = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    return Reading(
        chat_template_kwargs=settings.arguments, stop_ids=base.config.eos_token_ids, **chosen
    )


def evaluate_file(
    base: Model,
    path: str,
    adapters: Mapping[str, Adapter | None],
    *,
    max_length: int = 512,
    max_rows: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """All metrics of several adapters on one file, on one base.

    Adapters that can be, such as LoRAs, are padded to one rank: they share what is compiled.

    Args:
        base: The model, with its tokenizer.
        path: File of rows.
        adapters: Adapters by the name under which they are reported; None is the base alone.
        max_length: Length of the longest row allowed, in tokens.
        max_rows: Evaluate only this many rows, the first ones; None is all.
        max_new_tokens: Length of the longest answer, in tokens.
        batch_size: Packed sequences computed at once; four times as many prompts are decoded.

    Returns:
        Metrics by name; ``eval_exact_match`` where the rows have answers.

    Raises:
        UserError: If the file cannot be used, or a row is longer than `max_length`.
    """
    tasks = min((count for one in adapters.values() if (count := num_tasks(one))), default=0)
    like = next((one for one in adapters.values() if one is not None), None)
    read: dict[str, Examples] = {}
    results = {}
    for name, adapter in pad_alike(adapters).items():
        # The base alone answers the same prompts as the first adapter.
        taught = like if adapter is None else adapter
        key = str(chat_of(taught).label())
        if key not in read:
            read[key] = encode_file(
                path,
                tokenizer_of(base, taught),
                max_length=max_length,
                vocab_size=base.config.vocab_size,
                num_tasks=tasks,
                reading=reading_of(base, taught),
            ).first(max_rows)
        results[name] = _evaluate_examples(
            base, read[key], adapter, taught, max_length, max_new_tokens, batch_size
        )
    return results


def _evaluate_examples(
    base: Model,
    examples: Examples,
    adapter: Adapter | None,
    taught: Adapter | None,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """All metrics of one adapter; `taught` says how the examples were read."""
    tasks = num_tasks(adapter)
    virtual = virtual_ids(adapter, np.arange(tasks) if tasks else 0)
    batches = eval_batches(
        examples.with_prefix(virtual),
        batch_size=batch_size,
        max_length=max_length + virtual.shape[-1],
        packing=True,
        pad_id=base.config.pad_token_id,
    )
    metrics = evaluate_loss(base, batches, adapter)
    tokenizer, reading = tokenizer_of(base, taught), reading_of(base, taught)
    questions = make_questions(examples.distinct_rows, tokenizer, reading)
    if questions:
        metrics["eval_exact_match"], samples = exact_match(
            base,
            questions,
            adapter,
            max_new_tokens=max_new_tokens,
            batch_size=4 * batch_size,
        )
        metrics |= count_cut(samples)
    return metrics
