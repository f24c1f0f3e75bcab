"""Separate instead of stacked layers, for decoding on CPU.

A loop over stacked layers reads each kernel as a slice, and XLA on CPU copies the slice before it
multiplies with it. For few tokens the copy takes longer than the product. `views` returns the
kernels as separate arrays in the memory of the stack, and `unstack` gives them to the model in
place of the stack.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.core.backend import choices

LAYERS = "layers"


def views(params: dict) -> list[list[jax.Array]] | None:
    """The part of every stacked array that belongs to each layer, without a copy.

    Args:
        params: Base parameters; concrete arrays.

    Returns:
        For each stacked leaf a list with one array per layer. None where separate arrays would not
        help or would be copies: on other backends, and for arrays that are spread over devices.
    """
    leaves = jax.tree.leaves(params[LAYERS])
    if not choices().unstack or any(len(leaf.devices()) > 1 for leaf in leaves):
        return None
    return [
        [jax.device_put(layer, device, may_alias=True) for layer in np.asarray(leaf)]
        for leaf in leaves
        for device in leaf.devices()
    ]


def unstack(variables: dict, params: dict, layers: Sequence[Sequence[Any]]) -> dict:
    """Variables with separate layers; for use inside the traced function.

    Args:
        variables: The result of `jaxpeft.bind` for `params`.
        params: Base parameters, the same objects that `bind` got: their leaves are recognised by
            identity.
        layers: From `views`.

    Returns:
        Variables with a tuple of one tree per layer instead of the stack; arrays of an adapter are
        sliced.
    """
    own = {id(leaf): at for at, leaf in enumerate(jax.tree.leaves(params[LAYERS]))}

    def take(leaf: Any, index: int) -> Any:
        at = own.get(id(leaf))
        # This slices once, before the loop over tokens, and not in every iteration.
        return jax.lax.optimization_barrier(leaf[index]) if at is None else layers[at][index]

    bound = variables["params"]
    each = tuple(
        jax.tree.map(functools.partial(take, index=index), bound[LAYERS])
        for index in range(len(layers[0]))
    )
    return variables | {"params": bound | {LAYERS: each}}
