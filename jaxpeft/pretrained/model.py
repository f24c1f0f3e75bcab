"""A loaded base model: frozen parameters with everything needed to call them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.mesh.constraints import layout_of, traced_on
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import bind
from jaxpeft.methods.mixed import check_index
from jaxpeft.methods.virtual_tokens import hide_unused, put_before_segments, virtual_ids
from jaxpeft.models.config import ModelConfig


@flax.struct.dataclass
class Model:
    """A base model. It is a pytree over `params`: pass it into ``jax.jit``, don't close over it.

    Attributes:
        params: Base parameters, a nested dict of arrays.
        config: Sizes and variants.
        module: The Linen module; ``module.apply(jaxpeft.bind(params, adapter), ids)``.
        tokenizer: The transformers tokenizer, with its chat template.
        fingerprint: A hash of the source tensors that identifies the weights, see
            `jaxpeft.pretrained.weights.fingerprint`.
        name: The folder, file or hub id that the model was loaded from.
        revision: Branch, tag or commit of a hub id; "" for none.
    """

    params: dict
    config: ModelConfig = flax.struct.field(pytree_node=False)
    module: Any = flax.struct.field(pytree_node=False)
    tokenizer: Any = flax.struct.field(pytree_node=False, default=None)
    fingerprint: str = flax.struct.field(pytree_node=False, default="")
    name: str = flax.struct.field(pytree_node=False, default="")
    revision: str = flax.struct.field(pytree_node=False, default="")

    if TYPE_CHECKING:  # flax adds it

        def replace(self, **updates: Any) -> Self:
            """A copy with other values in some fields."""
            ...

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
        """Computes logits in float32; adapters of the same shape share a compiled program.

        The virtual tokens of a soft prompt are put in front of every segment, and their own
        logits are cut off.

        Args:
            input_ids: Token ids; they must lie within the vocabulary.
            adapter: One adapter, several that act together, or None for the base alone.
            segment_ids: Packed segments; 0 is padding. Default: one segment per row.
            positions: Positions within the segments. Default: 0, 1, 2, ...
            task: For multitask prompt tuning, the task: one number, or one per row.
            index: For adapters from `jaxpeft.stack_adapters`, the adapter of each row, -1 for none.

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
        """Logits of the tokens after a soft prompt."""
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
