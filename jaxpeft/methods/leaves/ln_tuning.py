"""LayerNorm tuning: only the scales of norms are trained.

A norm ``y = s * x / rms(x)`` keeps its form; ``s`` is a trained copy of the base's scale, in
float32.

Reference:
    Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
    2023, https://arxiv.org/abs/2312.11420, section 3.1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Kind
from jaxpeft.methods.leaves.replace import ARRAYS, bind_selected, selected_replacement, value_shape
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import contiguous, modules_of, require_finite, targets_value
from jaxpeft.methods.peft.patterns import keep_names
from jaxpeft.methods.peft.values import PREFIX, PeftFormat, Tensors, Values
from jaxpeft.ops.linear import shape_of

LEAF = "scale"
DEFAULT_TARGETS = ("input_layernorm", "post_attention_layernorm", "norm")
"""Norms that PEFT trains in Llama, Mistral and Qwen models if no targets are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Trains the scales of norms.

    Attributes:
        targets: Norms: names and suffixes, or a regex matched in full, as in PEFT. The norms of
            queries and keys (``q_norm``, ``k_norm``) are trained if they are named. In a model
            that is not ours, all norms by default, with their offsets.
        exclude: Norms to leave alone, in the same forms; wins over `targets`.
    """

    name: ClassVar[str] = "ln_tuning"

    targets: paths.Targets = DEFAULT_TARGETS
    exclude: paths.Targets = ()

    def __post_init__(self):
        keep_names(self, "targets", "exclude")
        if not self.targets or self.targets == paths.ALL_LINEAR:
            raise ValueError(f"LNTuning.targets must name norms, got {self.targets!r}.")

    def check_any_model(self) -> None:
        """It can: norms are known by their role."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """Copies the chosen scales; `key` and `context` are not used.

        Args:
            params: Base parameters.
            key: Not used.
            context: Not used.

        Returns:
            An adapter that leaves the model's function unchanged.

        Raises:
            UserError: If a pattern matches no norm.
        """
        del key, context
        sites, targets = paths.module_names(params, LEAF), self.targets
        if isinstance(params, paths.NamedTree) and targets == DEFAULT_TARGETS:
            targets = ".*"
        chosen = paths.match(targets, self.exclude, sites, what="norm")
        return selected_replacement(self.name, params, chosen)


def config_of(adapter: Adapter) -> LNTuning:
    """The config of an adapter; targets come back as full names."""
    return LNTuning(targets=tuple(name for name, _, _ in modules_of(adapter)))


def config_from_peft(values: Values) -> LNTuning:
    """Reads PEFT's config; see `PeftFormat`."""
    return LNTuning(**values.selection(DEFAULT_TARGETS).fields(values.file))


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads an adapter from PEFT's config and tensors; see `PeftFormat`."""
    sites = paths.module_names(base.params, LEAF)
    chosen = values.selection(DEFAULT_TARGETS).select(sites, values.file)
    shapes = {
        _key(name): shape_of(paths.get(base.params, site.path))[-1:]
        for name, site in chosen.items()
    }
    tensors.require(shapes, base.name)
    adapter = selected_replacement(LNTuning.name, base.params, chosen)
    trained = {path: np.array(leaf) for path, leaf in paths.flatten(adapter.params).items()}
    for name, site in chosen.items():
        at = () if site.layer is None else site.layer
        trained[f"{site.path}/value"][at] = tensors.read(_key(name))
    return adapter.replace(  # pyright: ignore[reportAttributeAccessIssue]
        params=jax.tree.map(jax.numpy.asarray, paths.unflatten(trained))
    )


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder; see `PeftFormat`."""
    tensors, names = {}, []
    for name, path, at in modules_of(adapter):
        value = np.asarray(paths.get(adapter.params, f"{path}/value"))[at]
        require_finite(name, value)
        tensors[_key(name)] = contiguous(value)
        names.append(name)
    known = (*paths.module_names(base.params, LEAF), *paths.module_names(base.params))
    return {"target_modules": targets_value(names, known)}, tensors


def _key(name: str) -> str:
    return f"{PREFIX}{name}.ln_tuning_layers.weight"


PEFT = PeftFormat(
    type="LN_TUNING",
    title="LayerNorm tuning adapter",
    defaults={"exclude_modules": None, "modules_to_save": None, "target_modules": None},
    read_keys=("exclude_modules", "target_modules"),
    read=read,
    write=write,
    config=config_from_peft,
)

KIND = Kind(
    config=LNTuning,
    bind=bind_selected,
    leaf_shape=value_shape,
    config_of=config_of,
    arrays=ARRAYS,
    peft=PEFT,
)
