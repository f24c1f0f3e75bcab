"""Quantises the kernels of a base: ``quantize``.

Reference:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
    https://arxiv.org/abs/2305.14314, section 3.
"""

from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.lifting.coded import Coded
from jaxpeft.lifting.folded import Folded
from jaxpeft.lifting.roles import Roles
from jaxpeft.lifting.trees import with_leaves
from jaxpeft.methods.foreign import as_base
from jaxpeft.ops.quant import (
    QuantTensor,
    check_quant_type,
    is_coded,
    is_quantized,
    quantize_kernel,
)


def quantize(
    params: Any,
    quant_type: str = "nf4",
    *,
    double: bool = False,
    head: bool = False,
    roles: Roles | None = None,
    exclude: Any = (),
) -> Any:
    """Quantises the kernels of a base's layers; embeddings, norms and biases stay as they are.

    Args:
        params: Base parameters: those of a `jaxpeft.Model`, or with roles any tree of parameters.
        quant_type: "nf4", "int4" or "int8".
        double: Quantise the scales to 8 bits too.
        head: For a model of jaxpeft: quantise an untied head's kernel as well.
        roles: For parameters of a model that is not ours, what `jaxpeft.describe` found. All
            kernels of products are quantised, also that of a head; convolutions are not.
        exclude: With roles: kernels to leave as they are, in the forms of `jaxpeft.LoRA.exclude`.

    Returns:
        The same kind of tree with nodes in the place of such kernels.

    Raises:
        UserError: If the type is unknown, kernels are quantised already, parameters that are not
            ours come without roles, or an argument has no meaning for these.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((2, 64, 8))
        >>> params = {"layers": {"mlp": {"up_proj": {"kernel": kernel}}}}
        >>> quantize(params)["layers"]["mlp"]["up_proj"]["kernel"].nbytes
        576
    """
    check_quant_type(quant_type)
    if roles is not None:
        if head:
            raise UserError("quantize: head has no meaning with roles; a head is a kernel there.")
        chosen = _kernels(params, roles, exclude)
        _require_dense(chosen)
        return with_leaves(
            params, {path: _coded(leaf, quant_type, double) for path, leaf in chosen.items()}
        )
    if exclude:
        raise UserError("quantize: exclude goes with roles=.")
    paths.require_tree(params)
    if not paths.is_own(params):
        raise UserError(
            "quantize: these are not the parameters of a model of jaxpeft; pass "
            "roles=jaxpeft.describe(function, params, inputs)."
        )
    leaves = paths.flatten(params)
    chosen = {path: leaf for path, leaf in leaves.items() if is_quantized(path, head)}
    _require_dense(chosen)
    coded = {path: quantize_kernel(leaf, quant_type, double) for path, leaf in chosen.items()}
    return paths.unflatten(leaves | coded)


def _kernels(params: Any, roles: Roles, exclude: Any) -> dict[str, Folded]:
    """The kernels to quantise of a model that is not ours, by path."""
    base = as_base(params, roles)
    chosen = paths.match(paths.ALL_LINEAR, exclude, paths.module_names(base))
    return {site.path: paths.get(base, site.path) for site in chosen.values()}


def _require_dense(chosen: dict[str, Any]) -> None:
    if coded := [path for path, leaf in chosen.items() if is_coded(leaf)]:
        raise UserError(
            f"quantize: {len(coded)} kernels are quantised already: {first_few(coded)}."
        )


def _coded(leaf: Folded, quant_type: str, double: bool) -> Coded:
    kernel: QuantTensor = quantize_kernel(leaf.materialize(), quant_type, double)
    return Coded(kernel, leaf.axes, None, leaf.raw_shape)
