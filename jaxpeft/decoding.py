"""Decoding with a key/value cache: greedy, or by temperature, top-k and top-p.

Prompts of different lengths share a batch: they are padded on the left, so that every row writes
the same slot of the cache; padding is in segment 0, which no token sees. Prompt length and the
number of slots are rounded up to buckets, and there is one compile a bucket: the adapter, the
limit on new tokens and the sampling parameters are arguments.

Reference:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020,
    https://arxiv.org/abs/1904.09751, section 3.1 (top-p).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import UserError
from jaxpeft.methods import bind
from jaxpeft.methods.base import Adapter
from jaxpeft.model import Model
from jaxpeft.models.transformer import head_logits, head_weight, init_cache

BUCKET = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest (greedy).
        top_k: Sample among the k largest only; 0 is off.
        top_p: Sample among the fewest tokens whose probability reaches p; 1 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be at least 0, got {self.temperature!r}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}.")


def generate(
    base: Model,
    prompts: Sequence[str | Sequence[dict]],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Continues prompts.

    Args:
        base: The model, with its tokenizer.
        prompts: Texts, continued as they are, or lists of chat messages, which are rendered
            with the tokenizer's chat template.
        adapter: What to put on the base.
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        key: PRNG key, needed to sample. A prompt's draw depends on the key and on its place in
            `prompts` only.
        batch_size: Prompts decoded at once.

    Returns:
        The new text of every prompt, without special tokens, in the order of `prompts`.

    Raises:
        UserError: If sampling without a key, or a prompt is empty.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if sampling.temperature > 0 and key is None:
        raise UserError("generate: sampling needs a key; pass key=jax.random.key(0).")
    tokens = [prompt_tokens(base.tokenizer, prompt) for prompt in prompts]
    for index, ids in enumerate(tokens):
        if not ids:
            raise UserError(f"generate: prompt {index} is empty.")
        if max(ids) >= base.config.vocab_size:
            raise UserError(f"generate: prompt {index} has a token id outside the vocabulary.")
    ids = generate_ids(
        base,
        tokens,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        batch_size=batch_size,
    )
    return [base.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def prompt_tokens(tokenizer: Any, prompt: str | Sequence[dict]) -> list[int]:
    """Token ids of a text, or of chat messages up to where the assistant begins to speak."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    from jaxpeft.data import render_messages

    text = render_messages(tokenizer, list(prompt), add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(base: Model) -> tuple[int, ...]:
    """The ids that end a turn, by the model's config and its tokenizer."""
    ids = list(base.config.eos_token_ids)
    eos = getattr(base.tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys(ids + ([] if eos is None else [eos])))


def generate_ids(
    base: Model,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continues prompts given as token ids; see `generate`.

    Returns:
        New ids of every prompt, without the id that ended it.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    sampling = sampling or Sampling()
    key = jax.random.key(0) if key is None else key
    stops = stop_ids(base)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = min(batch_size, _power_of_two(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), width):
        chosen = order[start : start + width]
        rows = chosen + [chosen[-1]] * (width - len(chosen))
        new = _decode(
            base,
            adapter,
            *_pad_left([prompts[i] for i in rows]),
            np.int32(max_new_tokens),
            np.array(stops or (-1,), np.int32),
            jax.vmap(lambda i: jax.random.fold_in(key, i))(np.array(rows)),
            np.float32(sampling.temperature),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
            new_slots=_round_up(max_new_tokens),
            greedy=sampling.temperature == 0,
        )
        for index, row in zip(chosen, np.asarray(new), strict=False):
            ids = row[:max_new_tokens].tolist()
            ends = [i for i, token in enumerate(ids) if token in stops]
            answers[index] = ids[: ends[0]] if ends else ids
    return answers


def _pad_left(rows: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = _round_up(max(len(row) for row in rows))
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    for out, segment, row in zip(tokens, segments, rows, strict=True):
        out[width - len(row) :] = row
        segment[width - len(row) :] = 1
    return tokens, segments


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("new_slots", "greedy"))
def _decode(
    base: Model,
    adapter: Adapter | None,
    tokens: Any,
    segments: Any,
    limit: Any,
    stops: Any,
    keys: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    *,
    new_slots: int,
    greedy: bool,
) -> Any:
    """New ids ``(batch, new_slots)`` of left-padded prompts; what follows a stop is no answer."""
    batch, width = tokens.shape
    variables = bind(base.params, adapter)
    head = head_weight(base.config, variables["params"])

    def run(ids: Any, segment_ids: Any, positions: Any, cache: Any) -> Any:
        hidden, cache = base.module.apply(
            variables,
            ids,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            return_hidden=True,
        )
        return head_logits(base.config, head, hidden[:, -1]), cache

    def choose(logits: Any, index: Any) -> Any:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        kept = filter_logits(logits / temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(step_keys, kept).astype(jnp.int32)

    def more(carry: Any) -> Any:
        index, _, _, _, done = carry
        return (index < limit) & ~done.all()

    def advance(carry: Any) -> Any:
        index, token, out, cache, done = carry
        out = out.at[:, index].set(jnp.where(done, stops[0], token))
        done = done | (token[:, None] == stops).any(axis=1)
        ones = jnp.ones((batch, 1), jnp.int32)
        where = (lengths + index)[:, None]
        logits, cache = run(token[:, None], ones, where, cache)
        return index + 1, choose(logits, index + 1), out, cache, done

    lengths = segments.sum(axis=1)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(base.config, batch, width + new_slots, base.module.compute_dtype)
    logits, cache = run(tokens, segments, positions, cache)
    out = jnp.full((batch, new_slots), stops[0], jnp.int32)
    start = (jnp.int32(0), choose(logits, 0), out, cache, jnp.zeros(batch, bool))
    return jax.lax.while_loop(more, advance, start)[2]


def filter_logits(logits: Any, top_k: Any, top_p: Any) -> Any:
    """Sets logits to -inf outside the top k and outside the nucleus of mass `top_p`.

    Args:
        logits: ``(batch, vocab)``, already divided by the temperature.
        top_k: Scalar; 0 is off.
        top_p: Scalar in (0, 1]; 1 is off. It applies to what top-k has left.

    Returns:
        ``(batch, vocab)``; at least the largest logit of every row stays.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    place = jnp.arange(logits.shape[-1])
    within = jnp.where(top_k > 0, place < top_k, True)
    mass = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    within &= (before < top_p) | (top_p >= 1)
    lowest = jnp.where(within, ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
