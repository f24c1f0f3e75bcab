"""Merges an adapter into a quantised base, and quantises the sum again.

`jaxpeft.merge` refuses a quantised base, because an adapter should be merged into the original
weights. If those are not available, this is the way; it reports the error that it causes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import adapters_of
from jaxpeft.methods.merging import merge
from jaxpeft.ops.quant import QuantTensor, quantize_kernel, relative_change


class MergeError(NamedTuple):
    """The error caused by quantising a merged kernel again.

    Attributes:
        kernel: Norm of the error relative to the norm of the merged kernel.
        change: Norm of the error relative to the norm of the adapter's change. Above 1, more is
            lost than the adapter contributed.
    """

    kernel: float
    change: float


def merge_quantized(
    params: dict, adapter: Adapter | Sequence[Adapter]
) -> tuple[dict, dict[str, MergeError]]:
    """Merges an adapter into a quantised base; the result has the same kinds of quantisation.

    Args:
        params: Base parameters with `jaxpeft.ops.quant.QuantTensor` leaves; they are not changed.
        adapter: An adapter of a mergeable kind, or several.

    Returns:
        The merged parameters, and a dict from paths to the errors. Leaves that are not quantised
        are merged as in `jaxpeft.merge`.

    Raises:
        UserError: If an adapter does not fit the base, or cannot be merged.
    """
    touched = {path for one in adapters_of(adapter) for path in one.spec.paths}
    leaves = {path: paths.get(params, path) for path in sorted(touched)}
    quantized = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantTensor)}
    dense = {path: leaf.materialize() for path, leaf in quantized.items()}
    merged = merge(paths.put(params, dense), adapter)
    again, errors = {}, {}
    for path, old in quantized.items():
        kernel = paths.get(merged, path)
        again[path] = quantize_kernel(kernel, old.quant_type, old.group_scale is not None)
        lost = relative_change(kernel, again[path].dequantize())
        brought = relative_change(kernel, dense[path])
        errors[path] = MergeError(lost, lost / max(brought, 1e-300))
    return paths.put(merged, again), errors
