"""A base known by its config alone: weights have shapes but no values."""

import dataclasses
import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.mesh.layouts import Layout
from jaxpeft.mesh.placement import leaf_sharding, placed_shapes
from jaxpeft.models.config import ModelConfig
from jaxpeft.ops.quant import is_quantized, quantize_kernel
from jaxpeft.pretrained.load import activation_dtype, load_model_config
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.weights.names import param_shapes


class NeedsWeightsError(UserError):
    """Values of a base were requested, but only shapes are known."""


@dataclasses.dataclass(frozen=True)
class Weightless:
    """Stands for a base weight without values; reading its values is a `NeedsWeightsError`.

    Attributes:
        shape: Shape of the weight, layer axis included.
        path: Its path in the parameters.
        base_name: The base that it belongs to.
    """

    shape: tuple[int, ...]
    path: str
    base_name: str

    @property
    def dtype(self) -> Any:
        """The dtype in which weights are usually loaded."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses to give values.

        Raises:
            NeedsWeightsError: Always.
        """
        raise NeedsWeightsError(
            f"{self.path}: this adapter needs the weights of its base to be loaded; pass it: "
            f"load_adapter(..., base=load_model({self.base_name!r}))."
        )

    __array__ = __getitem__ = __matmul__ = __mul__ = astype = refuse

    @property
    def T(self) -> NoReturn:
        """The transpose, which would need values."""
        self.refuse()


jax.tree_util.register_pytree_node(  # so that a jitted function refuses it too
    Weightless, Weightless.refuse, Weightless.refuse
)


def load_shapes(name: str, revision: str | None = None) -> Model:
    """A `jaxpeft.Model` without weights, from a model's config.

    Args:
        name: A Hugging Face folder, a hub id, or a ``.gguf`` file.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model; its leaves are `Weightless`, and its fingerprint is unknown.

    Raises:
        UserError: Nothing is there, or the model is not supported.
    """
    return without_weights(load_model_config(name, revision), name)


def without_weights(config: ModelConfig, name: str) -> Model:
    """A `jaxpeft.Model` without weights, like that of `load_shapes`, from a given config.

    Args:
        config: The architecture.
        name: The place that the config comes from.
    """
    from jaxpeft.models.transformer import Transformer

    leaves = {path: Weightless(shape, path, name) for path, shape in param_shapes(config).items()}
    return Model(paths.unflatten(leaves), config, Transformer(config), name=name)


def placed_model(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: str = "float32",
    compute_dtype: str = "auto",
    quantization: str | None = None,
    double_quantization: bool = False,
) -> Model:
    """The model that `load_model` would put on a mesh, as shapes for which to compile programs.

    Args:
        config: The architecture.
        layout: The placement of the parameters; its devices need not be present.
        dtype: Dtype of the parameters.
        compute_dtype: Dtype of the activations; "auto" depends on the platform traced for.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers; None for none.
        double_quantization: Quantise their scales too.

    Returns:
        A `jaxpeft.Model` whose leaves are ``jax.ShapeDtypeStruct`` with shardings.
    """
    from jaxpeft.models.transformer import Transformer

    leaves = {}
    for path, shape in param_shapes(config).items():
        leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        if quantization is not None and is_quantized(path):
            code = functools.partial(
                quantize_kernel, quant_type=quantization, double=double_quantization
            )
            leaf = jax.eval_shape(code, leaf)
        leaves[path] = placed_shapes(leaf, leaf_sharding(path, leaf, layout))
    params = paths.unflatten(leaves)
    return Model(params, config, Transformer(config, activation_dtype(compute_dtype, params)))
