"""The config of a method: what is trained, and how it starts; see `jaxpeft.LoRA`."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax

from jaxpeft.core.errors import UserError
from jaxpeft.core.records import Record
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.peft.config_file import read_method

if TYPE_CHECKING:
    pass


M = TypeVar("M", bound="Method")


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
    def drops(self) -> bool:
        """Whether training drops anything, and so needs a key in every step."""
        return False

    @property
    def starts_dense(self) -> bool:
        """Whether `init` reads the weights as they are before the base is quantised."""
        return False

    def check_quantization(self, quantization: str | None, double: bool) -> None:
        """Finds out whether `init` can start from the weights before the base is quantised.

        Args:
            quantization: How the base is going to be quantised, None for not at all.
            double: Whether the scales of its blocks are quantised, too.

        A method that `starts_dense` overrides this, with a UserError where it has no use for a
        base that is quantised so.
        """
        del quantization, double

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
