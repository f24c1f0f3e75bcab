"""A loaded base model: frozen parameters with everything needed to call them."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh.constraints import layout_of, traced_on
from jaxpeft.mesh.processes import is_first
from jaxpeft.methods.binding import bind, merge
from jaxpeft.methods.chat_settings import chat_of
from jaxpeft.methods.family import Adapter
from jaxpeft.methods.mixed import check_index
from jaxpeft.methods.virtual_tokens import hide_unused, put_before_segments, virtual_ids
from jaxpeft.models.config import ModelConfig


@flax.struct.dataclass
class Model:
    """A base model. A pytree over `params`: pass it into ``jax.jit``, don't close over it.

    Attributes:
        params: Base parameters, a nested dict of arrays.
        config: Sizes and variants.
        module: The Linen module; ``module.apply(jaxpeft.bind(params, adapter), ids)``.
        tokenizer: The transformers tokenizer, with its chat template.
        fingerprint: Which weights these are: a hash of the source tensors, see
            `jaxpeft.pretrained.weights.fingerprint`.
        name: Where the model came from: a folder, a file or a hub id.
        revision: Branch, tag or commit of a hub id; "" for none.
    """

    params: dict
    config: ModelConfig = flax.struct.field(pytree_node=False)
    module: Any = flax.struct.field(pytree_node=False)
    tokenizer: Any = flax.struct.field(pytree_node=False, default=None)
    fingerprint: str = flax.struct.field(pytree_node=False, default="")
    name: str = flax.struct.field(pytree_node=False, default="")
    revision: str = flax.struct.field(pytree_node=False, default="")

    def __repr__(self) -> str:
        """One line instead of all arrays."""
        shapes = [getattr(leaf, "shape", (0,)) for leaf in paths.flatten(self.params).values()]
        size = sum(math.prod(shape) for shape in shapes)
        return f"Model({self.name!r}, {self.config.model_type}, {size:,} parameters)"

    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "batch seq"],
        *,
        adapter: Adapter | Sequence[Adapter] | None = None,
        segment_ids: Int[Array | np.ndarray, "batch seq"] | None = None,
        positions: Int[Array | np.ndarray, "batch seq"] | None = None,
        task: Any = 0,
        index: Any = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits in float32, compiled; another adapter of the same shape costs no new compile.

        The virtual tokens of a soft prompt stand in front of every segment; their own logits are
        cut off.

        Args:
            input_ids: Token ids; they must lie within the vocabulary.
            adapter: What to put on the base; None for the base alone.
            segment_ids: Packed segments; 0 is padding. Default: one segment a row.
            positions: Positions within the segments. Default: 0, 1, 2, ...
            task: Which task's prompt, for multitask prompt tuning: a number, or one a row.
            index: For adapters from `jaxpeft.stack_adapters`, which of them each row gets, -1 for
                none.

        Returns:
            Logits.

        Raises:
            UserError: If the adapter was made for another model, has no such task, or has a prompt
                and `segment_ids` are traced; if an index addresses none of the adapters.
        """
        if index is not None and not isinstance(index, Tracer):
            index = check_index(adapter, index, input_ids.shape[0])
        virtual = virtual_ids(adapter, task)
        inputs = (input_ids, segment_ids, positions)
        with traced_on(layout_of(self.params, self.config)):
            if count := virtual.shape[-1]:
                return self._prompted(virtual, count, adapter, index, *inputs)
            return _logits(self, input_ids, adapter, segment_ids, positions, index)

    def _prompted(
        self,
        virtual: np.ndarray,
        count: int,
        adapter: Any,
        index: Any,
        input_ids: Any,
        segment_ids: Any,
        positions: Any,
    ) -> Any:
        """Logits of the tokens behind a soft prompt."""
        if segment_ids is not None:
            long = put_before_segments(virtual, input_ids, segment_ids)
            at = long.positions
            if positions is not None:
                at[np.arange(len(at))[:, None], long.places] = np.asarray(positions) + count
            inputs = hide_unused(long.input_ids, long.segment_ids, at, virtual, index)
            logits = _logits(self, long.input_ids, adapter, *inputs, index)
            return jnp.take_along_axis(logits, long.places[..., None], axis=1)
        shape = (input_ids.shape[0], count)
        ids = jnp.concatenate([np.broadcast_to(virtual, shape), input_ids], axis=1)
        if positions is not None:
            front = np.broadcast_to(np.arange(count), shape)
            positions = jnp.concatenate([front, jnp.asarray(positions) + count], axis=1)
        inputs = hide_unused(ids, None, positions, virtual, index)
        return _logits(self, ids, adapter, *inputs, index)[:, count:]


@jax.jit
def _logits(
    model: Model, input_ids: Any, adapter: Any, segment_ids: Any, positions: Any, index: Any
) -> Any:
    variables = bind(model.params, adapter, index=index)
    return model.module.apply(variables, input_ids, segment_ids=segment_ids, positions=positions)


def save_model(
    path: str,
    base: Model,
    *,
    adapter: Adapter | Sequence[Adapter] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder that transformers loads.

    Of a base that was loaded from such a folder, the files of the tokenizer, the generation
    settings and the further keys of ``config.json`` come along as they are. Changed is what has
    to be: generation stops where the adapter learned to end its turns, which is told on standard
    error, and a chat template that overrides the base's takes its place.

    Args:
        path: The folder to make; it may exist if it is empty.
        base: The model.
        adapter: Merged into the weights where given; the base itself stays as it is.
        dtype: Of the saved weights: "float32", "bfloat16" or "float16"; None keeps the base's.
        overwrite: Replace a model folder at `path`, once the new one is whole (in a bucket the
            old one goes first); never the folder that `base` was loaded from.

    Raises:
        UserError: An unknown dtype, an adapter that cannot be merged, a file of the base that is
            a link out of its folder, or a `path` that is taken or cannot be written.
        ResourceError: The disk is full.
    """
    from jaxpeft.pretrained.load import DTYPES
    from jaxpeft.pretrained.save import require_place, save_hf
    from jaxpeft.pretrained.saved_files import files_for

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    require_place(path, overwrite=overwrite, source=base.name or None)
    saved = files_for(base, chat_of(adapter))
    params = base.params if adapter is None else merge(base.params, adapter)
    save_hf(path, base.config, params, saved=saved, dtype=dtype, overwrite=overwrite)
    if is_first():
        for note in saved.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
