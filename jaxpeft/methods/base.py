"""What every method shares: the adapter, its static description, and the method's own face.

An adapter is a tree of its own, never spliced into the base:

* ``params``: the trained arrays, the only thing differentiated, optimised and donated;
* ``buffers``: frozen arrays it needs (scales, ranks, dropout rates);
* ``spec``: static and hashable. All numbers are arrays, so adapters that differ in alpha or
  dropout share one compilation and stack under ``jax.vmap``.

Both trees are nested like the base parameters, one dict of arrays at each adapted leaf.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.struct
import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of an adapter.

    Attributes:
        kind: Name of the method family, a key of ``jaxpeft.methods.KINDS``.
        paths: "/"-joined paths of the adapted base leaves, sorted.
        rank: Inner width all layers are padded to; 0 where there is none.
        options: Further static choices of the family, as sorted pairs.
    """

    kind: str
    paths: tuple[str, ...]
    rank: int = 0
    options: tuple[tuple[str, Any], ...] = ()


@flax.struct.dataclass
class Adapter:
    """Trained arrays, frozen arrays and the static description that reads them.

    Attributes:
        params: Nested like the base; at each path of the spec a dict of trained arrays.
        buffers: The same nesting with frozen arrays.
        spec: What the trees mean.
    """

    params: dict
    buffers: dict
    spec: Spec = flax.struct.field(pytree_node=False)


@runtime_checkable
class Method(Protocol):
    """A frozen, validated record of what to train and how; see `jaxpeft.LoRA`."""

    name: ClassVar[str]

    def init(self, params: dict, key: jax.Array) -> Adapter:
        """A new adapter for base `params` (arrays or shapes)."""
        ...


class Kind(Protocol):
    """How one family of adapters reads its leaves: two pure functions a leaf.

    Attributes:
        NEEDS_BASE: Whether nodes hold the base's leaf; where not, the base may lack it.
    """

    NEEDS_BASE: bool

    def bind_leaf(
        self, base: Any, params: dict, buffers: dict, key: jax.Array | None, options: dict
    ) -> Any:
        """The node that stands for `base` in the bound tree."""
        ...

    def leaf_shape(self, params: dict) -> tuple[int, ...]:
        """The shape, layer axis included, of the base leaf that a leaf's `params` belong to."""
        ...
