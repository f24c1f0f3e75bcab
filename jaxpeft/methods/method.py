"""The config of a method: what is trained, and how it is initialised; see `jaxpeft.LoRA`."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import jax

from jaxpeft.core.errors import UserError
from jaxpeft.core.records import Record
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.peft.config_file import read_method

M = TypeVar("M", bound="Method")


@dataclasses.dataclass(frozen=True)
class Context:
    """Further inputs that an initialisation may need; all of them are optional.

    Attributes:
        config: The base's `jaxpeft.ModelConfig`.
        module: Its Linen module.
        tokenizer: Its tokenizer.
        batches: Batches for the training step, for initialisations from data.
        shapes_only: The caller uses shapes only; values that depend on batches may be arbitrary.
        steps: Updates of the coming run, 0 if unknown.
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
        init_from: An adapter to start from, as for `jaxpeft.load_adapter`, or a hub id and
            revision, "org/name@v1". The other fields must then describe that adapter.
    """

    name: ClassVar[str]
    in_float32: ClassVar[bool] = True

    init_from: str | None = None

    def __str__(self) -> str:
        """The fields that differ from the defaults, such as ``lora(rank=8, dora=True)``."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @classmethod
    def from_peft(cls: type[M], config: Any, *, revision: str | None = None) -> M:
        """The config that describes the same method as a config of HF PEFT.

        Args:
            config: An ``adapter_config.json``, its folder, a hub id, a dict of its values, or a
                config object of PEFT. Missing values have PEFT's defaults.
            revision: Branch, tag or commit of a hub id.

        Returns:
            A config of this class.

        Raises:
            UserError: If it is of another method, or this class cannot express it.

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
        """The number of virtual tokens that its adapters put in front of every segment."""
        return 0

    @property
    def num_tasks(self) -> int:
        """The number of tasks that rows of data may name; 0 for methods without tasks."""
        return 0

    @property
    def needs_batches(self) -> bool:
        """Whether `init` reads batches; it then runs outside of ``jax.jit``."""
        return False

    @property
    def drops(self) -> bool:
        """Whether training uses dropout, and so needs a key in every step."""
        return False

    @property
    def starts_dense(self) -> bool:
        """Whether `init` reads the weights as they are before the base is quantised."""
        return False

    def check_any_model(self) -> None:
        """Checks whether `init` can make an adapter for a model that is not of this package.

        A method that can overrides this.

        Raises:
            UserError: It cannot.
        """
        raise UserError(
            f"{self.name}: is for models of jaxpeft alone; methods that change kernels, such as "
            "LoRA, work with every model."
        )

    def check_quantization(self, quantization: str | None, double: bool) -> None:
        """Checks whether `init` can start from the weights before the base is quantised.

        A method that `starts_dense` overrides this, and raises a UserError if it cannot use a base
        with this quantisation.

        Args:
            quantization: How the base is going to be quantised, None for not at all.
            double: Whether the scales of its blocks are quantised, too.
        """
        del quantization, double

    @abc.abstractmethod
    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new adapter.

        Args:
            params: Base parameters; shapes are enough for initialisations that do not read them.
            key: Typed PRNG key.
            context: Further inputs; a method raises if it needs one that is missing.

        Returns:
            The adapter; ``jax.jit`` of this function works, unless it `needs_batches`.
        """

    def go_on(self, saved: Adapter, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """The adapter a run starts from when it continues `saved`, which this config must describe.

        Args:
            saved: The adapter.
            key: Typed PRNG key.
            context: See `init`.
        """
        del key, context
        return saved

    def trainable(self, params: dict) -> dict:
        """The trained leaves of an adapter's `params`: a tree of booleans, all True by default."""
        return jax.tree.map(lambda _: True, params)

    def penalty(self, adapter: Adapter) -> Any:
        """A scalar added to the mean loss of a step, or None."""
        del adapter
        return None

    def wrap_optimizer(self, tx: Any, steps: int) -> Any:
        """The update rule of the trained leaves, with the method's additions.

        Args:
            tx: An optax transformation of gradients that are clipped already. Its update gets
                ``buffers=``, those of the adapter, as an extra argument.
            steps: Updates of the whole run.
        """
        del steps
        return tx
