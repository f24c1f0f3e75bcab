"""How a run begins: its start is chosen first, then it is placed on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.array_role import ArrayRole
from jaxpeft.mesh import placement
from jaxpeft.mesh.layouts import Layout
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.method import Context
from jaxpeft.methods.quantizing import quantize
from jaxpeft.pretrained.model import Model
from jaxpeft.training.checks import starts_dense
from jaxpeft.training.init_from import load_start
from jaxpeft.updates.step import TrainState


def choose_start(
    config: RunConfig, base: Model, layout: Layout, key: jax.Array, context: Context
) -> tuple[Model, Adapter | None]:
    """Chooses what a run starts from.

    Args:
        config: The run.
        base: The base model as it was loaded: not yet quantised if the adapter starts from the
            error of quantisation, see `jaxpeft.training.checks.starts_dense`.
        layout: Where the base lives.
        key: Typed PRNG key of the adapter.
        context: What the method's initialisation may need. With ``shapes_only`` the values of the
            start are arbitrary, so nothing is read or computed.

    Returns:
        The base that is trained on, and the adapter. The adapter is None where it is drawn from
        `key` and the base's shapes alone: then it is made where it is placed.

    Raises:
        UserError: If a saved adapter cannot be loaded, or is not what the method describes.
    """
    method, restored = config.method, context.shapes_only
    if starts_dense(config, restored):
        adapter = method.init(base.params, key, context)
        params = placement.shard_params(quantize(base.params), layout)
        return dataclasses.replace(base, params=params), adapter
    if restored:
        return base, None
    if method.init_from is not None:
        return base, load_start(method, base, key, context)
    if method.needs_batches:
        return base, method.init(base.params, key, context)
    return base, None


def place_start(
    make_state: Callable[..., TrainState],
    layout: Layout,
    arrays: Mapping[str, ArrayRole],
    *arguments: Any,
    shapes_only: bool,
) -> tuple[TrainState, TrainState]:
    """Makes the first state of a run, each array on the devices where it is to live.

    Args:
        make_state: The first state from `arguments`; it is traced.
        layout: Decides where arrays live.
        arrays: What the adapter's arrays are, by name; `Kind.arrays` of its family.
        *arguments: Arrays, or with `shapes_only` shapes.
        shapes_only: Whether the state is only described, and nothing is computed.

    Returns:
        The state, or its shapes, and the sharding of every leaf.
    """
    shapes = jax.eval_shape(make_state, *arguments)
    shardings = placement.state_shardings(shapes, layout, arrays)
    if shapes_only:
        return placement.placed_shapes(shapes, shardings), shardings
    return jax.jit(make_state, out_shardings=shardings)(*arguments), shardings
