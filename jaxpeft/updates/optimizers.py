"""Optimizers and schedules from optax, behind one small config.

``masked`` restricts any optax transformation by a tree of labels: frozen leaves have no moments,
and clipping, norms and weight decay apply to the trained leaves only.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import optax

from jaxpeft.core import float32
from jaxpeft.core.errors import UserError
from jaxpeft.core.records import Record
from jaxpeft.methods.adapter import Spec
from jaxpeft.methods.method import Method
from jaxpeft.methods.registry import KINDS
from jaxpeft.updates.lora_rules import EMBEDDING_RATE, lora_plus, project_b

MakeOptimizer = Callable[["OptimConfig", optax.Schedule], optax.GradientTransformation]
"""``make(config, rate)`` returns an update rule; `rate` maps updates done to a learning rate."""

OPTIMIZERS: dict[str, MakeOptimizer] = {}
"""Update rules by the name in ``optim.name``."""

WHOLE_ARRAYS: set[str] = set()
"""Names of the rules in which the update of a number depends on others in its array."""

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Record):
    """The optimizer and schedule of a run.

    Attributes:
        name: The update rule; b1 is the momentum of sgd.
        learning_rate: Peak learning rate.
        schedule: "constant", "linear" (to zero) or "cosine" (to zero) after the warm-up.
        warmup_steps: Updates over which the rate rises linearly from zero.
        clip_norm: Largest global norm of the gradient of the trained arrays, or None.
        weight_decay: Decoupled weight decay.
        b1: First decay rate.
        b2: Second decay rate.
        trainable: Base leaves to train as well: patterns matched against the end of their
            paths, such as "norm/scale".
        lora_plus_ratio: LoRA+: how many times faster factors B learn than factors A; None for
            the same rate. See `jaxpeft.updates.lora_rules`.
        lora_fa: LoRA-FA: factors A keep their initial values, and B's gradient is projected.
    """

    in_float32: ClassVar[bool] = True

    name: str = dataclasses.field(default="adamw", metadata={"choices": OPTIMIZERS})
    learning_rate: float = 2.0e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    trainable: tuple[str, ...] = ()
    lora_plus_ratio: float | None = None
    lora_fa: bool = False

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name must be one of {(*OPTIMIZERS,)}, got {self.name!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule must be one of {SCHEDULES}, got {self.schedule!r}.")
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(
                f"optim.learning_rate must be finite and positive, got {self.learning_rate!r}."
            )
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be at least 0, got {self.warmup_steps}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be positive or null, got {self.clip_norm!r}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay!r}.")
        for field in ("b1", "b2"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"optim.{field} must be in [0, 1), got {getattr(self, field)!r}.")
        ratio = self.lora_plus_ratio
        if ratio is not None and not (math.isfinite(ratio) and ratio >= 1):
            raise ValueError(
                f"optim.lora_plus_ratio must be finite and at least 1, or null, got {ratio!r}."
            )
        if ratio is not None and self.lora_fa:
            raise ValueError("optim.lora_fa must be false beside lora_plus_ratio: A is frozen.")
        rate = self.learning_rate * (ratio or 1.0)
        float32.require("optim.lora_plus_ratio times learning_rate", rate)
        if self.weight_decay:
            float32.require("optim.weight_decay times the largest rate", rate * self.weight_decay)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    Args:
        config: The peak, the shape, and the warm-up.
        steps: Updates of the whole run, the warm-up included.

    Returns:
        ``schedule(count)``.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    after: optax.Schedule = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig,
    steps: int,
    method: Method | None = None,
    *,
    spec: Spec | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run: clipping by global norm, then the update rule with its schedule.

    Args:
        config: Which rule, with its numbers.
        steps: Updates of the whole run, for the schedule.
        method: What is trained, or None. A method may add to the rule (AdaLoRA does), after
            clipping; and its family tells LoRA+ and LoRA-FA which arrays are the factors.
        spec: For LoRA+ with an adapter that was made with roles, the adapter's ``spec``, which
            knows the embedding tables. Without it they are told by their names.

    Returns:
        A transformation over the trained leaves; `masked` restricts it to them.

    Raises:
        UserError: The config asks for LoRA+ or LoRA-FA, and there is no method.
    """
    kind = None if method is None else KINDS[method.name]
    if kind is None and (config.lora_fa or config.lora_plus_ratio is not None):
        raise UserError(
            "make_optimizer: LoRA+ and LoRA-FA treat factors A and B differently; pass method=, "
            "the config of what is trained, which knows its factors."
        )
    if kind is None or config.lora_plus_ratio is None:
        rule = make_rule(config, steps)
    else:

        def scaled(factor: float, decay: bool) -> optax.GradientTransformation:
            rate = config.learning_rate * factor if factor else EMBEDDING_RATE
            weight_decay = config.weight_decay if decay else 0.0
            group = dataclasses.replace(config, learning_rate=rate, weight_decay=weight_decay)
            return make_rule(group, steps)

        rule = lora_plus(scaled, config.lora_plus_ratio, kind.arrays, spec)
    if method is not None:
        rule = method.wrap_optimizer(rule, steps)
    parts = [rule]
    if kind is not None and config.lora_fa:
        parts.insert(0, project_b(kind))
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts) if len(parts) > 1 else rule


def make_rule(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The update rule alone, with its schedule; see `make_optimizer`."""
    return OPTIMIZERS[config.name](config, make_schedule(config, steps))


def register_optimizer(name: str, make: MakeOptimizer, *, whole_arrays: bool = False) -> None:
    """Adds an update rule, so that configs can name it in ``optim.name``.

    Args:
        name: Its name in configs.
        make: ``make(config, rate)`` returns an optax transformation. `config` is an `OptimConfig`,
            and `rate` maps updates done to a learning rate. It is called once for each group of
            LoRA+, with that group's rate and weight decay. Fields of the config that it does not
            use have no effect.
        whole_arrays: Whether the update of a number depends on others in its array, as in
            Adafactor, which scales by means. Such a rule is refused if layers of a stack are not
            adapted or are padded.

    Raises:
        UserError: If there is another rule of that name.

    Example:
        >>> def nadamw(config, rate):
        ...     return optax.nadamw(rate, b1=config.b1, b2=config.b2)
        >>> jp.register_optimizer("nadamw", nadamw)  # doctest: +SKIP
    """
    if OPTIMIZERS.get(name, make) is not make:
        raise UserError(f"register_optimizer: there is an optimizer called {name!r} already.")
    OPTIMIZERS[name] = make
    if whole_arrays:
        WHOLE_ARRAYS.add(name)


def _adamw(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)


def _adafactor(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        # optax's own decay is not multiplied by the learning rate.
        weight_decay_rate=(lambda count: decay * rate(count)) if decay else None,
    )


def _lion(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)


def _sgd(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(config.b1),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


register_optimizer("adamw", _adamw)
register_optimizer("adafactor", _adafactor, whole_arrays=True)
register_optimizer("lion", _lion)
register_optimizer("sgd", _sgd)


TRAINABLE, FROZEN = "trainable", "frozen"


class MaskedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that also knows its labels: see `masked`."""

    labels: Any


def masked(
    tx: optax.GradientTransformation, trainable: Any | Callable[[Any], Any]
) -> MaskedTransformation:
    """Restricts `tx` to the trainable leaves; frozen leaves get no state and no update.

    Args:
        tx: Any optax transformation.
        trainable: A tree of booleans over ``{"base": params, "adapter": adapter.params}``, or
            a function from that tree to the booleans.

    Returns:
        ``optax.partition`` over the labels "trainable" and "frozen" of the whole tree. Gradients
        may be None at frozen leaves; the updates then are too. `tx` gets the whole tree with its
        frozen leaves as the extra argument ``whole=``. The attribute ``labels`` is for
        `jaxpeft.make_train_step`.
    """

    def labels(tree: Any) -> Any:
        chosen = trainable(tree) if callable(trainable) else trainable
        return jax.tree.map(lambda on: TRAINABLE if on else FROZEN, chosen)

    def partition(tree: Any) -> optax.GradientTransformationExtraArgs:
        return optax.partition({TRAINABLE: tx, FROZEN: optax.set_to_zero()}, labels(tree))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("masked: update needs params, the whole tree that was labelled.")
        return partition(params).update(updates, state, params, whole=params, **extra)

    result = MaskedTransformation(lambda params: partition(params).init(params), update)
    result.labels = labels
    return result
