"""A real task on a model that is not ours: MiniLM learns what a question asks for.

The Flax class of BERT in transformers, with MiniLM's weights, embeds a question; a linear head on
the embedding says which of six things it asks for (TREC question classification, see
`quickstart_data`). LoRA on all kernels is trained together with the head. What it is worth is told
by the head alone, trained on embeddings of the frozen model: with the same batches, and until its
loss no longer falls; the better of the two counts.
"""

# pyright: reportMissingImports=false

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from any_model_packages import embedder, minilm_folder, minilm_net
from quickstart_data import (
    LABELS,
    QUESTIONS,
    Question,
    drop_near_duplicates,
    installed_file,
    read_questions,
    split,
)

import jaxpeft as jp

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 1200, 500, 0
MAX_TOKENS, BATCH_SIZE, EPOCHS = 32, 32, 3
METHOD = jp.LoRA(rank=8, targets="all-linear")
RATES = {"adapter": 1e-3, "head": 1e-2}
FULL_STEPS = 2000
"""Steps over all rows at once, for the head alone; its loss no longer falls then."""


class Rows(NamedTuple):
    """Encoded questions: ids and mask ``(rows, MAX_TOKENS)``, labels ``(rows,)``."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def batches(self, size: int, epochs: int) -> Iterator["Rows"]:
        """Whole batches, in another drawn order in each epoch."""
        draws = np.random.default_rng(SEED)
        for _ in range(epochs):
            order = draws.permutation(len(self.labels))
            for begin in range(0, len(order) - size + 1, size):
                yield Rows(*(column[order[begin : begin + size]] for column in self))


def encoded() -> tuple[Rows, Rows]:
    """Rows to train on, and held-out rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    file = installed_file(*QUESTIONS)
    kept, _ = drop_near_duplicates(read_questions(file.read_text(encoding="utf-8"), file.name))
    parts = split(kept, TRAIN_ROWS, HELD_OUT_ROWS, SEED)
    names = list(LABELS.values())

    def rows(questions: list[Question]) -> Rows:
        texts = [question.text for question in questions]
        found = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np"
        )
        labels = np.array([names.index(question.label) for question in questions], np.int32)
        ids, mask = (found[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
        return Rows(ids, mask, labels)

    return rows(parts.train), rows(parts.held_out)


def new_head(width: int) -> dict[str, Any]:
    """A head that says nothing yet."""
    return {"w": jnp.zeros((width, len(LABELS))), "b": jnp.zeros(len(LABELS))}


def head_loss(head: dict[str, Any], embeddings: Any, labels: Any) -> Any:
    """Cross-entropy of the head on embeddings."""
    logits = embeddings @ head["w"] + head["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(head: dict[str, Any], embeddings: Any, labels: Any) -> float:
    """The part of rows whose best label is the right one."""
    best = np.asarray(embeddings @ head["w"] + head["b"]).argmax(-1)
    return float((best == labels).mean())


def minimize(loss: Callable[..., Any], rule: Any, trained: Any, calls: Any) -> tuple[Any, float]:
    """Takes a step for each tuple of other arguments of the loss.

    Returns:
        The trained arrays, and the mean loss of the last ten steps.
    """

    @jax.jit
    def step(trained: Any, state: Any, *given: Any) -> tuple[Any, Any, Any]:
        value, slope = jax.value_and_grad(loss)(trained, *given)
        updates, state = rule.update(slope, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = rule.init(trained), []
    for given in calls:
        trained, state, value = step(trained, state, *given)
        losses.append(value)
    return trained, float(np.mean(losses[-10:]))


def head_alone(embed: Callable[..., Any], train: Rows, held_out: Rows) -> float:
    """Held-out accuracy of the head on the frozen model's embeddings."""
    known, unknown = (embed(rows.ids, rows.mask) for rows in (train, held_out))
    start, rule = new_head(known.shape[1]), optax.adam(RATES["head"])
    numbered = train._replace(ids=np.arange(len(train.labels)))
    same = ((known[one.ids], one.labels) for one in numbered.batches(BATCH_SIZE, EPOCHS))
    long = ((known, train.labels) for _ in range(FULL_STEPS))
    heads = [minimize(head_loss, rule, start, calls)[0] for calls in (same, long)]
    return max(accuracy(head, unknown, held_out.labels) for head in heads)


def learn_questions(say: Callable[[str], None]) -> dict[str, Any]:
    """Trains head and LoRA, and the head alone.

    Args:
        say: Prints a line of progress.

    Returns:
        Held-out accuracies, losses and seconds; under "broken" what is not as it should be.
    """
    begin, net = time.perf_counter(), minilm_net()
    train, held_out = encoded()
    apply, params = embedder(net), {"params": net.params}
    lifted = jp.lift(apply)
    roles = jp.describe(apply, params, train.ids[:1], train.mask[:1])
    adapter = jp.init_adapter(METHOD, params, jax.random.key(SEED), roles=roles)

    @jax.jit
    def adapted(params: Any, adapter: Any, ids: Any, mask: Any) -> Any:
        return lifted(jp.bind(params, adapter), ids, mask)

    def loss(trained: Any, params: Any, ids: Any, mask: Any, labels: Any) -> Any:
        one = adapter.replace(params=trained["adapter"])
        return head_loss(trained["head"], lifted(jp.bind(params, one), ids, mask), labels)

    frozen = head_alone(functools.partial(jax.jit(apply), params), train, held_out)
    say(f"questions: {frozen:.1%} of {HELD_OUT_ROWS} held-out rows right by the head alone")
    trained = {"adapter": adapter.params, "head": new_head(net.config.hidden_size)}
    rule = optax.partition(
        {name: optax.adam(rate) for name, rate in RATES.items()}, {name: name for name in RATES}
    )
    calls = ((params, *rows) for rows in train.batches(BATCH_SIZE, EPOCHS))
    after, last = minimize(loss, rule, trained, calls)
    scores = [
        accuracy(
            some["head"],
            adapted(params, adapter.replace(params=some["adapter"]), held_out.ids, held_out.mask),
            held_out.labels,
        )
        for some in (trained, after)
    ]
    say(f"questions: {scores[0]:.1%} before and {scores[1]:.1%} after training LoRA and the head")
    found = {"held_out_rows": HELD_OUT_ROWS, "before": scores[0], "after": scores[1]}
    found |= {"head_alone": frozen, "last_loss": last, "seconds": time.perf_counter() - begin}
    worse = scores[1] <= frozen
    return found | {"broken": ["LoRA does not beat the head alone"] if worse else []}
