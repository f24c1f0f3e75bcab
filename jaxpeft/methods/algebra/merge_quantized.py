"""Merging into a quantised base, which rounds the sum to codes again.

`jaxpeft.merge` refuses a quantised base: merging belongs into the weights it was made from. Where
those are not at hand, this is the way, and it says what it costs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.binding import adapters_of, merge
from jaxpeft.ops.quant import QuantTensor, quantize_kernel, relative_change


class MergeError(NamedTuple):
    """What quantising a merged kernel again changed.

    Attributes:
        kernel: Length of that change over the length of the merged kernel.
        change: The same over the length of what the adapter changed; above 1, more is lost than
            the adapter brought.
    """

    kernel: float
    change: float


def merge_quantized(
    params: dict, adapter: Adapter | Sequence[Adapter]
) -> tuple[dict, dict[str, MergeError]]:
    """Base and adapter as one quantised base, in the kinds of the old one.

    Args:
        params: Base parameters with `jaxpeft.ops.quant.QuantTensor` leaves; they stay as they are.
        adapter: An adapter of a mergeable kind, or several.

    Returns:
        The merged parameters, and by path what it cost. Leaves that are not quantised are merged
        as `jaxpeft.merge` does it.

    Raises:
        UserError: If an adapter does not fit the base, or cannot be merged.
    """
    touched = {path for one in adapters_of(adapter) for path in one.spec.paths}
    leaves = {path: paths.get(params, path) for path in sorted(touched)}
    quantised = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantTensor)}
    dense = {path: leaf.materialise() for path, leaf in quantised.items()}
    merged = merge(paths.put(params, dense), adapter)
    again, errors = {}, {}
    for path, old in quantised.items():
        kernel = paths.get(merged, path)
        again[path] = quantize_kernel(kernel, old.kind, old.group_scale is not None)
        lost = relative_change(kernel, again[path].dequantise())
        brought = relative_change(kernel, dense[path])
        errors[path] = MergeError(lost, lost / max(brought, 1e-300))
    return paths.put(merged, again), errors
