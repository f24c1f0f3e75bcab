"""Logits from hidden states, by the head's kernel or the tied embedding table."""

from typing import Any

from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.mesh.constraints import gathered, keep_vocab, rows_of_peers
from jaxpeft.ops.linear import SHARED, Transposed, attend, give_shared, linear
from jaxpeft.ops.products import wide_dtype


def head_weight(variables: dict) -> Any:
    """The weight that turns hidden states into logits: the head's kernel or the tied table.

    Args:
        variables: From `jaxpeft.bind`.

    Returns:
        An array or a node, for `head_logits`.

    Raises:
        ValueError: The variables have neither a head nor a table.
    """
    shared = variables.get(SHARED, {})
    for path in (paths.HEAD, paths.EMBEDDING):
        weight = paths.get(variables["params"], path)
        if weight is not None:
            weight = gathered(path, give_shared(weight, paths.get(shared, path, ())))
            return weight if path == paths.HEAD else Transposed(weight)
    raise ValueError("the variables have neither a head nor an embedding table.")


def head_logits(head: Any, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
    """Logits of final hidden states, in float32."""
    hidden = rows_of_peers(hidden)
    if isinstance(head, Transposed):
        return keep_vocab(attend(hidden, head.table))
    logits = linear(hidden, head)
    return keep_vocab(logits.astype(wide_dtype(logits)))
