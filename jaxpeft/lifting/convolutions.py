"""How a node answers for a convolution of a model that does not know it.

A convolution is linear in its kernel, so a low-rank change of it is two convolutions: one with A,
which keeps the window, and a pointwise one with B. A node gets the convolution as an operation that
takes a kernel ``(d_in, n)``, where ``d_in`` counts the window and the channels that enter.

Reference:
    HF PEFT 0.21, ``tuners/lora/layer.py``, ``_ConvNd``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.lifting import dialect
from jaxpeft.lifting.folded import Folded, folded
from jaxpeft.lifting.views import Part, UnroutableError, View
from jaxpeft.ops.linear import through


def convolution(eqn: Any, values: list[Any]) -> list[Any]:
    """The result of a ``conv_general_dilated`` whose kernel is a view.

    Raises:
        UnroutableError: The view is what is convolved, channels are in groups, or the node's
            inputs are not the window and the channels that enter.
    """
    x, view = values
    if not isinstance(view, View):
        raise UnroutableError("a convolution is done to it")
    if not dialect.is_known(eqn):
        raise UnroutableError("this version of JAX has convolutions of another form")
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise UnroutableError("its channels are convolved in groups")
    axes, out = folded(view.node).axes, numbers.rhs_spec[0]
    window = [dim for dim in range(len(view.dims)) if dim != out]
    if axes.stack or view.axes_of(window) != axes.ins or view.axes_of([out]) != axes.outs:
        raise UnroutableError(
            f"a convolution takes its axes {list(view.axes_of(window) or ())} as its inputs, and "
            f"the adapter was made for {list(axes.ins)}"
        )
    if len(axes.outs) != 1:
        raise UnroutableError("a convolution gives several axes of channels")
    to_last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    y = through(x.transpose(to_last), view.node, _Convolution(eqn, view))
    spec = numbers.out_spec
    order = (spec[0], *spec[2:], spec[1])
    y = y.transpose([order.index(axis) for axis in range(y.ndim)])
    return [y.astype(eqn.outvars[0].aval.dtype)]


class _Convolution:
    """The convolution of an equation, for inputs ``(batch, *spatial, channels)``."""

    def __init__(self, eqn: Any, view: View):
        self._params, self._view = eqn.params, view

    def __call__(self, x: Any, kernel: Any) -> Any:
        """The convolution with the model's own kernel, or with another one ``(d_in, n)``."""
        params = self._params
        if isinstance(kernel, Folded):
            rhs = self._view.array(kernel.whole())
            how = {key: params[key] for key in ("precision", "preferred_element_type")}
        else:
            rhs = self._unfolded(kernel.astype(x.dtype))
            how = {"precision": params["precision"]}
        rank = x.ndim
        spec = (0, rank - 1, *range(1, rank - 1))
        keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        return jax.lax.conv_general_dilated(
            x.astype(rhs.dtype),
            rhs,
            **{key: params[key] for key in keys},
            dimension_numbers=jax.lax.ConvDimensionNumbers(
                spec, params["dimension_numbers"].rhs_spec, spec
            ),
            **how,
        )

    def _unfolded(self, kernel: Any) -> Any:
        """A kernel ``(d_in, n)`` with its axes as the convolution expects them."""
        view, axes = self._view, folded(self._view.node).axes
        (out,) = axes.outs
        count = kernel.shape[-1]
        sizes = [view.raw_shape[axis] for axis in axes.ins]
        raw = jnp.moveaxis(kernel.reshape(*sizes, count), -1, out)
        dim = self._params["dimension_numbers"].rhs_spec[0]
        dims = (*view.dims[:dim], (Part(out, 1, count),), *view.dims[dim + 1 :])
        return dataclasses.replace(view, dims=dims, casts=()).array(raw)
