"""Decoding with a key/value cache: greedy, or by temperature, top-k and top-p.

Prompts of different lengths share a batch. They are padded on the left, so that every row writes
the same slot of the cache; padding is in segment 0, which no token sees. Prompt length and the
number of new slots are rounded up to buckets, and each bucket is compiled once: the adapter, the
limit on new tokens and the sampling parameters are arguments.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpeft.core.errors import UserError
from jaxpeft.inference.chat_prompts import encode_prompts, stop_ids
from jaxpeft.inference.sampling import Sampling, draw
from jaxpeft.mesh.constraints import layout_of, traced_on
from jaxpeft.mesh.processes import to_host
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import adapters_of, bind
from jaxpeft.methods.mixed import check_index
from jaxpeft.methods.registry import KINDS
from jaxpeft.methods.virtual_tokens import virtual_ids
from jaxpeft.models.cache import by_layer, init_cache
from jaxpeft.models.head import head_logits, head_weight
from jaxpeft.models.unstack import unstack, views
from jaxpeft.pretrained.model import Model

BUCKET = 32
LONG = 128
"""The number of new tokens from which separate layers are used, where they are faster (see
`jaxpeft.models.unstack`). A token takes less time, but compiling takes longer."""


def generate(
    base: Model,
    prompts: Sequence[str | Sequence[dict]],
    *,
    adapter: Adapter | Sequence[Adapter] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Key[Array, ""] | None = None,
    batch_size: int = 16,
    task: int | Sequence[int] = 0,
    index: Sequence[int] | None = None,
    tools: Sequence[dict] | None = None,
    documents: Sequence[dict] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Continues prompts until the model ends its turn.

    Args:
        base: The model, with its tokenizer.
        prompts: Texts, continued as they are (after the tokenizer's first special token, as in
            training), or lists of chat messages, rendered with the tokenizer's chat template.
        adapter: One adapter, several that act together, or None for the base alone.
        max_new_tokens: Length of the longest continuation, in tokens.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        top_k: Sample among the k likeliest tokens; 0 is off.
        top_p: Sample among the fewest tokens that reach this probability together; 1 is off.
        key: Typed PRNG key, needed to sample. A prompt's draws depend on the key and on its place
            in `prompts`, not on the batch it is decoded in.
        batch_size: Prompts decoded at once.
        task: For multitask prompt tuning, the task: one number, or one per prompt.
        index: For adapters from `jaxpeft.stack_adapters`, the adapter of each prompt, -1 for none.
        tools: JSON schemas of tools that chats may call.
        documents: Documents that chats may answer from.
        chat_template_kwargs: Variables of the chat template; they override those that the adapter
            was trained with.

    Returns:
        The new text of every prompt, without special tokens, in the order of `prompts`.

    Raises:
        UserError: A number out of range, sampling without a key, a model without tokenizer or
            chat template, or a prompt that is empty, malformed, or too long for the model.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = generate_ids(
        base,
        encode_prompts(
            base,
            prompts,
            adapter,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
        ),
        adapter=adapter,
        stops=stop_ids(
            base, adapter, chat=any(not isinstance(one, str) for one in prompts), tools=tools
        ),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        batch_size=batch_size,
        task=task,
        index=index,
    )
    return [base.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def generate_ids(
    base: Model,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: Adapter | Sequence[Adapter] | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    key: Key[Array, ""] | None = None,
    batch_size: int = 16,
    task: int | Sequence[int] = 0,
    index: Sequence[int] | None = None,
    stops: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues prompts given as token ids; see `generate`.

    Args:
        base: The model; its tokenizer, if there is one, names one more id that ends a turn.
        prompts: Token ids of every prompt.
        adapter: One adapter, several that act together, or None for the base alone.
        max_new_tokens: Length of the longest continuation, in tokens.
        sampling: How tokens are chosen; greedy by default.
        key: Typed PRNG key, needed to sample.
        batch_size: Prompts decoded at once.
        task: For multitask prompt tuning, the task: one number, or one per prompt.
        index: For stacked adapters, the adapter of each prompt, -1 for none.
        stops: Ids that end an answer. By default those that the model's config, its tokenizer and
            the adapter name, see `jaxpeft.inference.chat_prompts.stop_ids`.

    Returns:
        New ids of every prompt, without the id that ended it.

    Raises:
        UserError: A number out of range, sampling without a key, or a prompt that is empty, too
            long, or has ids outside the vocabulary.
    """
    sampling = sampling or Sampling()
    if not sampling.greedy and key is None:
        raise UserError("sampling needs a key; pass key=jax.random.key(0), or temperature=0.")
    virtual = _virtual_of(adapter, task, len(prompts))
    ahead = virtual.shape[1] + sum(KINDS[one.spec.kind].offset(one) for one in adapters_of(adapter))
    _check_sizes(base, prompts, max_new_tokens, batch_size, ahead)
    which = None if index is None else check_index(adapter, index, len(prompts))
    prompts = [
        [*ids] if which is not None and which[i] == -1 else [*virtual[i].tolist(), *ids]
        for i, ids in enumerate(prompts)
    ]
    key = jax.random.key(0) if key is None else key
    stops = tuple(stop_ids(base, adapter) if stops is None else stops)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = min(batch_size, _power_of_two(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    layers = views(base.params) if max_new_tokens >= LONG else None
    layout = layout_of(base.params, base.config)
    for start in range(0, len(order), width):
        chosen = order[start : start + width]
        rows = chosen + [chosen[-1]] * (width - len(chosen))
        with traced_on(layout):
            new = _decode(
                base,
                adapter,
                *_pad_left([prompts[i] for i in rows]),
                np.int32(max_new_tokens),
                np.array(stops or (-1,), np.int32),
                jax.vmap(lambda i: jax.random.fold_in(key, i))(np.array(rows)),
                np.float32(sampling.temperature),
                np.int32(min(sampling.top_k, base.config.vocab_size)),
                np.float32(sampling.top_p),
                None if which is None else which[rows],
                layers,
                new_slots=_round_up(max_new_tokens),
                greedy=sampling.greedy,
            )
        for place, row in zip(chosen, to_host(new), strict=False):
            ids = row[:max_new_tokens].tolist()
            ends = [i for i, token in enumerate(ids) if token in stops]
            answers[place] = ids[: ends[0]] if ends else ids
    return answers


def _virtual_of(
    adapter: Adapter | Sequence[Adapter] | None, task: int | Sequence[int], count: int
) -> np.ndarray:
    """The virtual ids in front of each of `count` prompts, ``(count, n)``."""
    ids = virtual_ids(adapter, task)
    if ids.ndim > 1 and len(ids) != count:
        raise UserError(f"task: expected a number, or one for each of {count} prompts.")
    return np.broadcast_to(ids, (count, ids.shape[-1]))


def _check_sizes(
    base: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    virtual: int,
) -> None:
    """Checks the numbers, and that the model can read the prompts.

    Raises:
        UserError: A number is out of range, or a prompt is empty, too long or has unknown ids.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    vocab, room = base.config.vocab_size, base.config.max_positions
    for index, ids in enumerate(prompts):
        if not ids:
            raise UserError(f"prompt {index} is empty: it has no tokens.")
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise UserError(
                f"prompt {index}: token id {outside[0]} is outside the model's vocabulary of "
                f"{vocab}; tokenizer and model do not belong together."
            )
        if virtual + len(ids) + max_new_tokens > room:
            soft = f"{virtual} virtual tokens, " if virtual else ""
            raise UserError(
                f"prompt {index}: {soft}its {len(ids)} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's {room} positions; shorten the prompt or lower max_new_tokens."
            )


def _pad_left(rows: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segments ``(batch, bucket)``, padded on the left."""
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
    adapter: Adapter | Sequence[Adapter] | None,
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    limit: Int[Array, ""],
    stops: Int[Array, "stops"],
    keys: Key[Array, "batch"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    index: Int[Array, "batch"] | None,
    layers: Any,
    *,
    new_slots: int,
    greedy: bool,
) -> Int[Array, "batch new_slots"]:
    """New ids of left-padded prompts; ids after a stop or the limit are to be ignored."""
    batch, width = tokens.shape
    variables = bind(base.params, adapter, index=index)
    head = head_weight(variables)
    lengths = segments.sum(axis=1)

    def run(variables: Any, ids: Any, segment_ids: Any, positions: Any, cache: Any) -> Any:
        """Logits after the last token of every row, and the cache with all tokens."""
        hidden, cache = base.module.apply(
            variables,
            ids,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            return_hidden=True,
        )
        return head_logits(head, hidden[:, -1]), cache

    def write(index: Any, out: Any, done: Any, logits: Any) -> Any:
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            token = draw(logits, step_keys, temperature, top_k, top_p)
        token = jnp.where(done, stops[0], token)
        return out.at[:, index].set(token), done | (token[:, None] == stops).any(axis=1)

    def more(carry: Any) -> Any:
        index, _, done, _ = carry
        return (index < limit) & ~done.all()

    def advance(carry: Any) -> Any:
        index, out, done, cache = carry
        ones, positions = jnp.ones((batch, 1), jnp.int32), lengths + index - 1
        last = out[:, index - 1, None]
        logits, cache = run(each, last, ones, positions[:, None], cache)
        return index + 1, *write(index, out, done, logits), cache

    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(base.config, batch, width + new_slots, base.module.compute_dtype)
    logits, cache = run(variables, tokens, segments, positions, cache)
    each = variables
    if layers is not None:
        each, cache = unstack(variables, base.params, layers), by_layer(cache)
    out = jnp.full((batch, new_slots), stops[0], jnp.int32)
    start = (jnp.int32(1), *write(0, out, jnp.zeros(batch, bool), logits), cache)
    _, out, _, _ = jax.lax.while_loop(more, advance, start)
    return out
