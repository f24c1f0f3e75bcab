"""Cross-entropy over supervised tokens that never holds the logits of a whole batch.

The loss of a token with hidden state ``h``, head ``W`` and target ``t`` is ``logsumexp(h W) - (h
W)[t]``, in float32. Tokens are visited in chunks along time: the supervised tokens of every row are
moved to its front, and chunks without any are skipped, so the number of products with the head is
about proportional to the number of supervised tokens. Chunks run along time and never over
flattened rows, which would make every device compute all of them. On a mesh each device holds a
slice of the vocabulary and computes it for the rows of its peers along fsdp and tensor; a trained
head's gradient is summed over the data axis once, after the last chunk.

If the loss is differentiated, gradients are computed while a chunk's logits are in memory: the
gradient of the hidden states, ``(softmax(h W) - onehot(t)) W^T``, and of a trained head, summed
over the chunks. The backward pass only scales the stored gradients by the incoming cotangent; it
does not multiply with the vocabulary again. From the forward pass on, a trained head's gradient is
held in the dtype of the head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpeft.core.backend import choices
from jaxpeft.mesh.constraints import (
    by_group,
    copy_for_groups,
    groups_of_rows,
    keep_rows,
    row_shards,
    rows_of_peers,
    sum_groups,
)
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import bind
from jaxpeft.models.head import head_logits, head_weight


def cross_entropy(
    hidden: Float[Array, "batch seq d_model"],
    head: Callable[[Any, Array], Array],
    head_params: Any,
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    head_frozen: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sums the loss of all supervised tokens.

    Args:
        hidden: Final hidden states.
        head: ``head(head_params, x)`` gives float32 logits ``(*batch, vocab)`` for ``x``.
        head_params: The head's weights: a pytree.
        targets: The token that should follow; any number where the weight is 0.
        weights: How much each token counts; 0 for tokens that are not supervised.
        head_frozen: Treat `head_params` as constants: their gradient is zero, which saves a
            product with the vocabulary.
        chunk_tokens: About how many tokens' logits exist at once on a device, at most a quarter of
            its rows; None for the backend's choice.

    Returns:
        ``sum(weights * loss)``, and ``{"weight": sum(weights), "correct": weighted count of
        tokens whose target has the largest logit}``; divide by the weight for the mean.
    """
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    targets = jnp.take_along_axis(targets, order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    batch, seq = targets.shape
    rows = max(1, batch // row_shards())  # per device
    width = max(1, min(-(-seq // 4), (chunk_tokens or choices().loss_tokens) // rows))
    pad = -seq % width
    chunks = (seq + pad) // width

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, width, *x.shape[2:]), 1, 0)

    pieces = (cut(hidden), cut(targets), cut(weights))
    if head_frozen:
        head_params = jax.lax.stop_gradient(head_params)
    chunked: Any = _chunked
    loss, correct = chunked(head, head_params, *pieces)
    return loss, {"weight": weights.sum(), "correct": jax.lax.stop_gradient(correct)}


def _sums(
    logits: Array, best: Array, log_total: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = jnp.where(chosen >= best, weights, 0.0).sum()
    # Masked, not only multiplied by 0: unsupervised targets may lie outside the vocabulary.
    loss = jnp.where(weights != 0, weights * (log_total - chosen), 0.0)
    return loss.sum(), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: Any, head_params: Any, hidden: Any, targets: Any, weights: Any) -> Any:
    def step(sums: Any, chunk: Any) -> Any:
        def work(chunk: Any) -> Any:
            logits, t, w = head(head_params, chunk[0]), *chunk[1:]
            return _sums(logits, logits.max(axis=-1), jax.nn.logsumexp(logits, axis=-1), t, w)

        new = jax.lax.cond((chunk[2] != 0).any(), work, lambda chunk: sums_of_none, chunk)
        return jax.tree.map(jnp.add, sums, new), None

    sums_of_none = jnp.zeros(()), jnp.zeros(())
    return jax.lax.scan(step, sums_of_none, (hidden, targets, weights))[0]


def _chunked_forward(head: Any, head_params: Any, *pieces: Any) -> Any:
    moves = jax.tree.map(lambda leaf: leaf.perturbed, head_params)
    head_params, pieces = jax.tree.map(lambda leaf: leaf.value, (head_params, pieces))
    moving, still = (
        jax.tree.map(lambda leaf, on, want=want: leaf if on is want else None, head_params, moves)
        for want in (True, False)
    )

    def logits_of(moving: Any, x: Any) -> Array:
        whole = jax.tree.map(
            lambda a, b: b if a is None else a, moving, still, is_leaf=lambda x: x is None
        )
        return head(whole, x)

    groups = groups_of_rows() if jax.tree.leaves(moving) and _is_same_for_rows(still) else 1
    groups = 1 if pieces[1].shape[1] % groups else groups
    each = copy_for_groups(moving, groups)

    def work(sums: Any, chunk: Any) -> Any:
        hidden, t, w = chunk[0], *map(rows_of_peers, chunk[1:])
        logits, back = jax.vjp(by_group(logits_of, groups), each, hidden)
        highest = logits.max(axis=-1)
        # The barrier: XLA would compute the exponentials once for the sum and once more for the
        # slopes, those of the sum on one thread.
        powers = jax.lax.optimization_barrier(jnp.exp(logits - highest[..., None]))
        total = powers.sum(axis=-1)
        loss, correct = _sums(logits, highest, highest + jnp.log(total), t, w)
        slope = powers * (w / total)[..., None]
        hit = jnp.arange(logits.shape[-1]) == t[..., None]
        of_params, of_hidden = back(jnp.where(hit, slope - w[..., None], slope))
        return jax.tree.map(jnp.add, sums, (loss, correct, of_params)), keep_rows(of_hidden)

    def step(sums: Any, chunk: Any) -> Any:
        def idle(sums: Any, chunk: Any) -> Any:
            return sums, jnp.zeros_like(chunk[0])

        return jax.lax.cond((chunk[2] != 0).any(), work, idle, sums, chunk)

    # Sums in float32, whatever the weights are.
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), each)
    start = (jnp.zeros(()), jnp.zeros(()), nothing)
    (loss, correct, of_params), of_hidden = jax.lax.scan(step, start, pieces)
    of_params = sum_groups(of_params, groups)
    of_params = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), of_params, moving)
    return (loss, correct), (of_params, of_hidden)


def _is_same_for_rows(head_params: Any) -> bool:
    """Whether a head treats all rows alike: it has no dropout key and no index of adapters."""
    leaves = jax.tree.leaves(head_params)
    return all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)


def _chunked_backward(head: Any, slopes: Any, cotangents: Any) -> Any:
    del head
    of_params, of_hidden = jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), slopes)
    return of_params, of_hidden, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def make_lm_loss(
    module: Any,
    *,
    head_frozen: bool,
    dropout: bool = False,
    penalty: Callable[[Adapter], Any] | None = None,
) -> Callable[..., Any]:
    """The next-token loss of a decoder, as `jaxpeft.make_train_step` takes it.

    Args:
        module: A `jaxpeft.models.transformer.Transformer`.
        head_frozen: See `cross_entropy`.
        dropout: Whether the key of the step reaches the adapter.
        penalty: A function of the adapter whose scalar is added to the mean loss, or None.

    Returns:
        ``loss_fn(params, adapter, batch, key) -> (total, aux)`` for batches of
        ``tokens, targets, weights, segment_ids, positions``, and for stacked adapters ``index``,
        the adapter of each row. Positions must count up slot by slot in every segment.
        ``aux["penalty"]`` is the penalty times the weight. It raises a UserError where the adapter
        does not fit the parameters, as `jaxpeft.bind` does.
    """

    def loss_fn(params: dict, adapter: Adapter | None, batch: dict, key: Any = None) -> Any:
        variables = bind(
            params, adapter, index=batch.get("index"), dropout_key=key if dropout else None
        )
        hidden = module.apply(
            variables,
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            in_order=True,
            return_hidden=True,
        )
        total, aux = cross_entropy(
            hidden,
            head_logits,
            head_weight(variables),
            batch["targets"],
            batch["weights"],
            head_frozen=head_frozen,
        )
        extra = None if penalty is None or adapter is None else penalty(adapter)
        if extra is not None:  # times the weight, by which the total is divided
            aux["penalty"] = extra * aux["weight"]
            total += aux["penalty"]
        return total, aux

    return loss_fn
