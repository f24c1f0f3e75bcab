"""Nodes with drawn factors for arrays of any model, and the sums they stand for."""

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxpeft.lifting.folded import Folded
from jaxpeft.lifting.trees import named_leaves, with_leaves
from jaxpeft.methods.lora.nodes import LoRAKernel

RANK = 3


def adapted(params, axes, seed=0):
    """LoRA nodes with drawn factors at some paths, and the merged arrays, summed in float64."""
    rng, nodes, merged = np.random.default_rng(seed), {}, {}
    leaves = named_leaves(params)
    for path, where in axes.items():
        raw = leaves[path]
        bottom = Folded(raw, where)
        *stack, d_in, d_out = bottom.shape
        a = 0.3 * rng.standard_normal((*stack, d_in, RANK)).astype(np.float32)
        b = 0.3 * rng.standard_normal((*stack, RANK, d_out)).astype(np.float32)
        scale = rng.uniform(0.5, 2.0, stack).astype(np.float32)
        zero = np.zeros(stack, np.float32)
        nodes[path] = LoRAKernel(bottom, *map(jnp.asarray, (a, b, scale, zero)))
        change = scale[..., None, None].astype(np.float64) * (a.astype(np.float64) @ b)
        order = (*where.stack, *where.ins, *where.outs)
        turned = change.reshape([raw.shape[axis] for axis in order])
        unfolded = np.transpose(turned, np.argsort(order))
        merged[path] = jnp.asarray(np.asarray(raw, np.float64) + unfolded, raw.dtype)
    return with_leaves(params, nodes), with_leaves(params, merged)


def numbers(seed, *shape):
    """Drawn numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shapes_made(jaxpr):
    """The shape of every result of every equation, inside of loops too, with its primitive."""
    for equation in jaxpr.eqns:
        for result in equation.outvars:
            yield tuple(result.aval.shape), equation.primitive.name
        for inner in jex_core.jaxprs_in_params(equation.params):
            yield from shapes_made(getattr(inner, "jaxpr", inner))
