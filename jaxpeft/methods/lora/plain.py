"""Plain LoRAs as sums of products, and plain LoRAs made of the factors of every layer.

The change of a kernel is ``s (A B - A0 B0)``; the second product exists if the initial product
belongs to the base, as with PiSSA. With further arrays (DoRA's magnitudes, biases, saved modules,
rows of tokens) the change of a LoRA is no sum of products.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Products

FACTORS = {
    "a": ArrayRole(side="in", rank_axis=-1, fast=False),
    "b": ArrayRole(side="out", rank_axis=-2, fast=True),
}
"""The roles of the factors of a kernel for code outside of their family."""

REQUIRED = {"a", "b", "scale", "rank"}
PLAIN = REQUIRED | {"dropout", "rslora", "a0", "b0"}
"""The arrays that a place may have if its change is a sum of products."""


def factors_shape(params: dict) -> tuple[int, ...]:
    """The shape of the kernel that the factors of one leaf belong to, layer axis included."""
    return (*params["a"].shape[:-1], params["b"].shape[-1])


def products(adapter: Adapter) -> Products:
    """By path and layer, the products whose sum is an adapter's change; empty if the rank is 0.

    Raises:
        UserError: A place has arrays that make its change something else.
    """
    found: Products = {}
    for path in adapter.spec.paths:
        arrays = paths.get(adapter.params, path) | paths.get(adapter.buffers, path)
        if odd := sorted(arrays.keys() - PLAIN) or sorted(REQUIRED - arrays.keys()):
            raise UserError(
                f"{path}: a LoRA with {first_few(odd)} (DoRA, biases, saved modules, ...) "
                "is no sum of products; convert it by to_lora with rank= or energy=, or merge it."
            )
        stack = adapter.spec.stack_axes(path)
        values = {name: np.asarray(value) for name, value in arrays.items()}
        values = {name: value.reshape((-1, *value.shape[stack:])) for name, value in values.items()}
        found[path] = []
        for layer, r in enumerate(values["rank"]):
            scale = float(values["scale"][layer])
            parts = [(values["a"][layer][:, :r], values["b"][layer][:r], scale)] if r else []
            if r and "a0" in values:
                parts.append((values["a0"][layer][:, :r], -values["b0"][layer][:r], scale))
            found[path].append(parts)
    return found


def lora_of(
    layers: Mapping[str, list[Any]],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float,
    dropout: float,
    sources: Sequence[Adapter],
) -> Adapter:
    """A plain LoRA from the factors of every layer, None for layers that are not adapted.

    Args:
        layers: By path, the factors of every kernel of a stack.
        shapes: By path, the shape of the stack of kernels.
        scale: The factor of all products.
        dropout: The dropout rate.
        sources: The adapters that it is made of. Base name, revision and chat settings are those of
            the first.

    Raises:
        UserError: No layer is adapted, so there is no LoRA to make, or the adapters were made for
            different models.
    """
    ranks = {
        path: [0 if f is None else f[0].shape[1] for f in each] for path, each in layers.items()
    }
    width = max(max(each) for each in ranks.values())
    if width == 0:
        raise UserError("the adapters change nothing: there is no LoRA to make.")
    trained, frozen = {}, {}
    for path, each in layers.items():
        (*stack, d_in, d_out), count = shapes[path], len(each)
        a, b = (
            np.zeros((count, d_in, width), np.float32),
            np.zeros((count, width, d_out), np.float32),
        )
        for layer, factors in enumerate(each):
            if factors is not None:
                a[layer, :, : ranks[path][layer]], b[layer, : ranks[path][layer]] = factors
        rank = np.array(ranks[path], np.int32)
        arrays = {
            "a": a,
            "b": b,
            "scale": np.where(rank > 0, np.float32(scale), np.float32(0)),
            "rank": rank,
            "dropout": np.full(count, dropout, np.float32),
            "rslora": np.zeros(count, bool),
        }
        arrays = {
            name: jnp.asarray(value.reshape((*stack, *value.shape[1:])))
            for name, value in arrays.items()
        }
        trained[path] = {name: arrays.pop(name) for name in ("a", "b")}
        frozen[path] = arrays
    chosen = tuple(sorted(layers))
    spec = Spec(kind="lora", paths=chosen, rank=width, **_of_model(sources, chosen))
    params, buffers = paths.unflatten(trained), paths.unflatten(frozen)
    return dataclasses.replace(sources[0], params=params, buffers=buffers, spec=spec)


def _of_model(sources: Sequence[Adapter], chosen: Sequence[str]) -> dict[str, Any]:
    """The fields of a `Spec` that tell of a model that is not ours, for some of its places.

    Raises:
        UserError: The adapters were made for different models.
    """
    fields = {}
    for field in ("axes", "biases"):
        found: dict[str, Any] = {}
        for path, value in (pair for one in sources for pair in getattr(one.spec, field)):
            if found.setdefault(path, value) != value:
                raise UserError(f"adapters: {path} has other axes; they are for different models.")
        fields[field] = tuple((path, found[path]) for path in chosen if path in found)
    if any(bool(one.spec.axes) != bool(sources[0].spec.axes) for one in sources):
        raise UserError("adapters: some are for a model of jaxpeft, and some for another one.")
    return fields
