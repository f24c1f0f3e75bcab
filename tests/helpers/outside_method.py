"""A family of adapters that is defined outside of the package: kernels with scaled outputs.

    y = (x W) * (1 + g)

A vector ``g`` of every adapted kernel is trained and starts at zero. It is the smallest family that
has all there is: a config, a node, a folder, and a `Kind` that brings them together.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind
from jaxpeft.methods.leaves.replace import selected_layers
from jaxpeft.methods.method import NO_CONTEXT, Method
from jaxpeft.methods.peft.modules import contiguous, modules_of, stack, targets_value
from jaxpeft.methods.peft.patterns import keep_names
from jaxpeft.methods.peft.values import PREFIX, PeftFormat
from jaxpeft.ops.linear import OnBase, linear, materialize, shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputScaling(Method):
    """Which kernels have scaled outputs.

    Attributes:
        targets: "all-linear", a regex matched in full, or module names.
    """

    name: ClassVar[str] = "output_scaling"

    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self):
        keep_names(self, "targets")

    def init(self, params, key, context=NO_CONTEXT):
        sites = paths.match(self.targets, (), paths.module_names(params))
        ranks = selected_layers(params, sites)
        widths = {path: shape_of(paths.get(params, path))[-1] for path in ranks}
        gains = {path: jnp.zeros((*rank.shape, widths[path])) for path, rank in ranks.items()}
        return make_adapter(gains, ranks)


def make_adapter(gains, ranks):
    params = paths.unflatten({path: {"gain": gain} for path, gain in gains.items()})
    buffers = paths.unflatten({path: {"rank": rank} for path, rank in ranks.items()})
    return Adapter(params, buffers, Spec(kind=OutputScaling.name, paths=tuple(sorted(gains))))


@flax.struct.dataclass
class ScaledKernel(OnBase):
    """A frozen kernel ``(d_in, d_out)`` whose outputs are scaled by ``1 + gain``, ``(d_out,)``."""

    base: Any
    gain: Any

    def multiply(self, x):
        return (linear(x, self.base) * (1 + self.gain)).astype(x.dtype)

    def materialize(self):
        return (materialize(self.base) * (1 + self.gain[..., None, :])).astype(self.dtype)


def bind(leaf):
    gain = jnp.where(leaf.buffers["rank"][..., None] > 0, leaf.params["gain"], 0.0)
    return {leaf.path: ScaledKernel(leaf.base, gain)}


def config_of(adapter):
    return OutputScaling(targets=tuple(name for name, _, _ in modules_of(adapter)))


def read(values, tensors, base):
    sites = paths.module_names(base.params)
    chosen = values.selection().select(sites, values.file)
    shapes = {key_of(n): shape_of(paths.get(base.params, s.path))[-1:] for n, s in chosen.items()}
    tensors.require(shapes, base.name)
    modules = {name: {"gain": tensors.read(key_of(name))} for name in chosen}
    gains = {path: arrays["gain"] for path, arrays in stack(modules, sites, base.params).items()}
    return make_adapter(gains, selected_layers(base.params, chosen))


def write(adapter, base):
    found = {
        name: np.asarray(paths.get(adapter.params, f"{path}/gain"))[at]
        for name, path, at in modules_of(adapter)
    }
    targets = targets_value(found, paths.module_names(base.params))
    tensors = {key_of(name): contiguous(gain) for name, gain in found.items()}
    return {"target_modules": targets}, tensors


def key_of(name):
    return f"{PREFIX}{name}.output_gain"


def trained(params: dict, method: OutputScaling, seed: int) -> Adapter:
    """An adapter with gains drawn at random, zero in layers that are not adapted."""
    adapter = method.init(params, jax.random.key(0))
    drawn = {}
    for path, gain in paths.flatten(adapter.params).items():
        on = paths.get(adapter.buffers, path.removesuffix("gain") + "rank")[..., None] > 0
        drawn[path] = np.where(on, np.random.default_rng(seed).normal(0, 0.3, gain.shape), 0.0)
    made = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), paths.unflatten(drawn))
    return dataclasses.replace(adapter, params=made)


KIND = Kind(
    config=OutputScaling,
    bind=bind,
    leaf_shape=lambda params: None,
    config_of=config_of,
    arrays={"gain": ArrayRole(side="out")},
    peft=PeftFormat(
        type="OUTPUT_SCALING",
        title="Output scaling adapter",
        defaults={"target_modules": None},
        read_keys=("target_modules",),
        read=read,
        write=write,
        config=lambda values: OutputScaling(targets=values.selection().targets),
    ),
)
