"""What every method shares: the adapter, its static description, and the face of a family.

An adapter is a tree of its own, never spliced into the base:

* ``params``: the trained arrays, the only thing differentiated, optimised and donated;
* ``buffers``: frozen arrays it needs (scales, ranks, dropout rates);
* ``spec``: static and hashable. All numbers are arrays, so adapters that differ in alpha or
  dropout share one compilation and stack under ``jax.vmap``.

Both trees are nested like the base parameters, one dict of arrays at each adapted place; what all
places share (VeRA's matrices) lies under the key ``shared``.

A family is one file: a config class (`Method`), its nodes, and a `Kind` that says how they are
bound. **Identity:** where a place has a buffer ``rank``, a layer of rank 0 whose arrays are all
zero is left as it is, with zero gradients; so layers of a stack that are not adapted stay, and an
adapter of zeros is "no adapter" in a mixed batch.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import flax.struct
import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.core.records import Record
from jaxpeft.ops.linear import Node, Transposed, materialise

if TYPE_CHECKING:
    from jaxpeft.methods.peft.values import PeftFormat

M = TypeVar("M", bound="Method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of an adapter.

    Attributes:
        kind: Name of the method family, a key of ``jaxpeft.methods.registry.KINDS``.
        paths: "/"-joined paths of the adapted places, sorted.
        rank: Inner width all layers are padded to; 0 where there is none.
        options: Further static choices of the family, as sorted pairs.
    """

    kind: str
    paths: tuple[str, ...]
    rank: int = 0
    options: tuple[tuple[str, Any], ...] = ()


class Label(str):
    """A text that says something about an adapter and does not tell two of them apart.

    All labels are equal: they are static parts of pytrees, and adapters that differ in nothing
    else share one compilation.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label)

    def __hash__(self) -> int:
        return 0


@flax.struct.dataclass
class Adapter:
    """Trained arrays, frozen arrays and the static description that reads them.

    Attributes:
        params: Nested like the base; at each path of the spec a dict of trained arrays.
        buffers: The same nesting with frozen arrays.
        spec: What the trees mean.
        base_name: The base it was trained on, as `jaxpeft.load_model` takes it; "" if not known.
        base_revision: Its branch, tag or commit on the hub; "" for none.
        chat: How it was taught to chat, see `jaxpeft.methods.chat_settings`; "" if not known.
    """

    params: dict
    buffers: dict
    spec: Spec = flax.struct.field(pytree_node=False)
    base_name: Label = flax.struct.field(pytree_node=False, default=Label(""))
    base_revision: Label = flax.struct.field(pytree_node=False, default=Label(""))
    chat: Label = flax.struct.field(pytree_node=False, default=Label(""))

    def __repr__(self) -> str:
        """One line instead of all arrays."""
        sizes = [math.prod(getattr(x, "shape", ())) for x in jax.tree.leaves(self.params)]
        rank = f", rank {self.spec.rank}" if self.spec.rank else ""
        places = f"{len(self.spec.paths)} places"
        return f"Adapter({self.spec.kind}{rank}, {places}, {sum(sizes):,} trained numbers)"


def ranks_at(adapter: Adapter, path: str) -> np.ndarray | None:
    """The rank of every layer at `path`, or None for a kind that has none."""
    rank = paths.get(adapter.buffers, f"{path}/rank")
    return None if rank is None else np.asarray(rank)


@dataclasses.dataclass(frozen=True)
class Context:
    """What an initialisation may need beside the parameters; all of it is optional.

    Attributes:
        config: The base's `jaxpeft.ModelConfig`.
        module: Its Linen module.
        tokenizer: Its tokenizer.
        batches: Batches as the training step takes them, for initialisations from data.
        shapes_only: Only shapes matter to the caller: what batches decide may be anything.
        steps: Updates of the run that is to come, 0 if not known.
    """

    config: Any = None
    module: Any = None
    tokenizer: Any = None
    batches: Iterable[Mapping[str, Any]] | None = None
    shapes_only: bool = False
    steps: int = 0


NO_CONTEXT = Context()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Record, abc.ABC):
    """A frozen, validated record of what to train and how; see `jaxpeft.LoRA`.

    Attributes:
        init_from: An adapter to go on from, as `jaxpeft.load_adapter` takes it, or a hub id and
            revision, "org/name@v1"; the other values must then describe that adapter.
    """

    name: ClassVar[str]
    in_float32: ClassVar[bool] = True

    init_from: str | None = None

    def __str__(self) -> str:
        """What differs from the defaults, such as ``lora(rank=8, dora=True)``."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @classmethod
    def from_peft(cls: type[M], config: Any, *, revision: str | None = None) -> M:
        """The config that describes the same method as one of HF PEFT.

        Args:
            config: An ``adapter_config.json``, its folder, a hub id, a dict of its values, or a
                config object of PEFT. What it leaves out has PEFT's defaults, not ours.
            revision: Branch, tag or commit of a hub id.

        Returns:
            A config of this class.

        Raises:
            UserError: If it is of another method, or says what this class cannot.

        Example:
            >>> from jaxpeft import LoRA
            >>> LoRA.from_peft({"peft_type": "LORA", "r": 4}).targets
            ('q_proj', 'v_proj')
        """
        from jaxpeft.pretrained.adapters import read_method

        method = read_method(config, revision)
        if not isinstance(method, cls):
            theirs = type(method).__name__
            raise UserError(
                f"{cls.__name__}.from_peft: the config describes {theirs}; call {theirs}.from_peft."
            )
        return method

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens that its adapters put in front of every segment."""
        return 0

    @property
    def num_tasks(self) -> int:
        """How many tasks rows of data may name; 0 where the method knows none."""
        return 0

    @property
    def needs_batches(self) -> bool:
        """Whether `init` reads batches; it then runs outside of ``jax.jit``."""
        return False

    @property
    def starts_dense(self) -> bool:
        """Whether `init` reads the weights as they are before the base is quantised."""
        return False

    @abc.abstractmethod
    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter.

        Args:
            params: Base parameters; shapes are enough for initialisations that don't read them.
            key: Typed PRNG key.
            context: What else there is; a method that misses something says so.

        Returns:
            The adapter; ``jax.jit`` of this function works, unless it `needs_batches`.
        """

    def go_on(self, saved: Adapter, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """What a run starts from that goes on from a saved adapter, one that this describes.

        Args:
            saved: The adapter.
            key: Typed PRNG key.
            context: As `init` takes it.
        """
        del key, context
        return saved

    def trainable(self, params: dict) -> dict:
        """Which leaves of an adapter's `params` are trained: a tree of booleans, all by default."""
        return jax.tree.map(lambda _: True, params)

    def penalty(self, adapter: Adapter) -> Any:
        """A scalar added to the mean loss of a step, or None."""
        del adapter
        return None

    def wrap_optimizer(self, tx: Any, steps: int) -> Any:
        """The update rule of the trained leaves, with what the method adds to it.

        Args:
            tx: An optax transformation of gradients that are clipped already. Its update gets
                ``buffers=``, those of the adapter, as an extra argument.
            steps: Updates of the whole run.
        """
        del steps
        return tx


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a family sees of one adapted place when it is bound.

    Attributes:
        path: The place.
        base: The base's leaf there: an array, a node, or None where the base has none.
        params: The adapter's trained arrays of this place.
        buffers: Its frozen arrays.
        shared: Trained and frozen arrays that all places share.
        options: The spec's options as a dict.
        key: Typed PRNG key of this step and place, or None to drop nothing.
        layers: How many layers the arrays are stacks of, None where they are not stacked.
        bound: The tree as bound so far, for neighbours such as a kernel's bias.
    """

    path: str
    base: Any
    params: dict
    buffers: dict
    shared: dict
    options: dict
    key: Any = None
    layers: int | None = None
    bound: dict = dataclasses.field(default_factory=dict)

    def beside(self, name: str) -> str:
        """The path of another leaf of the same module: ``beside("bias")``."""
        return f"{self.path.rpartition('/')[0]}/{name}"

    def keys(self) -> Any:
        """The key as every leaf of a node: one a layer where layers are stacked; None stays."""
        if self.key is None or self.layers is None:
            return self.key
        return jax.random.split(self.key, self.layers)


def weight_at(params: Mapping, path: str) -> Any:
    """The base's leaf at a path, for the head of a tied model the table's transpose; or None."""
    weight = paths.get(params, path)
    table = paths.get(params, paths.EMBEDDING) if weight is None and path == paths.HEAD else None
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    return weight if table is None else Transposed(table)


def require_values(weight: Any, what: str) -> None:
    """Raises a UserError if there is only the shape of a weight; `what` says why that won't do."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise UserError(f"{what}; pass parameters, not their shapes.")


def merge_leaf(leaf: Leaf, nodes: dict[str, Any]) -> dict[str, Any]:
    """The usual way to merge: every bound node as the matrix it stands for, by path."""
    del leaf
    return {
        path: jax.jit(materialise)(node) if isinstance(node, Node) else node
        for path, node in nodes.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How one family of adapters is read: pure functions of a place.

    Attributes:
        config: The family's config class; its ``name`` is the kind's.
        bind: What stands in the bound tree, by path: usually ``{leaf.path: node}``.
        leaf_shape: The shape, layer axis included, of the base leaf that a place's trained arrays
            belong to; None where any fits.
        config_of: The config that describes an adapter, rebuilt from its spec and buffers.
        bind_rows: For families whose `bind` leaves no node that a mixed batch could map over its
            rows: ``bind_rows(leaf, used)`` gives the same from arrays with an axis of rows in
            front; `used` says which rows have an adapter at all. See `jaxpeft.methods.mixed`.
        own_axes: Names of arrays of a place and how many axes each has in a single adapter, for
            families without a buffer ``rank``: it tells stacked adapters.
        needs_base: Whether nodes hold the base's leaf; where not, the base may lack it.
        merge: Merged arrays by path, from a place and its nodes.
        no_merge: Why adapters of this family cannot be merged, "" if they can.
        weigh: ``weigh(adapter, weight)``: the adapter with its change of the model multiplied by a
            scalar; None where that has no meaning.
        virtual_tokens: How many virtual tokens an adapter puts in front of every segment.
        offset: How many positions an adapter takes in front of every segment beside its virtual
            tokens, without a slot of the input.
        check: ``check(params, adapter)`` raises a UserError where shapes alone don't tell that an
            adapter fits.
        peft: How HF PEFT writes such adapters, None if it has none.
    """

    config: type[Method]
    bind: Callable[[Leaf], dict[str, Any]]
    leaf_shape: Callable[[dict], tuple[int, ...] | None] = lambda params: None
    config_of: Callable[[Adapter], Method]
    bind_rows: Callable[[Leaf, Any], dict[str, Any]] | None = None
    own_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    needs_base: bool = True
    merge: Callable[[Leaf, dict[str, Any]], dict[str, Any]] = merge_leaf
    no_merge: str = ""
    weigh: Callable[[Adapter, Any], Adapter] | None = None
    virtual_tokens: Callable[[Adapter], int] = lambda adapter: 0
    offset: Callable[[Adapter], int] = lambda adapter: 0
    check: Callable[[dict, Adapter], None] | None = None
    peft: "PeftFormat | None" = None

    @property
    def name(self) -> str:
        """The family's name."""
        return self.config.name
