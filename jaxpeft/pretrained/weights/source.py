"""Tensors in files of any format: where their bytes lie and how they become floats.

A safetensors folder and a GGUF file both become a `Source`: a dict from tensor name to file,
offset, dtype and shape. Everything after that (strict checks, stacking, casting, hashing) is
written once, in `jaxpeft.pretrained.weights.params` and `jaxpeft.pretrained.weights.reading`.
"""

import dataclasses

from jaxpeft.files.storage import StoragePath
from jaxpeft.files.tensors import TensorInfo
from jaxpeft.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """All tensors of a model, with the naming scheme of the file.

    Attributes:
        path: The folder or file, for messages.
        config: The architecture that the tensors must fit.
        tensors: Tensor name to place.
        style: "hf" or "gguf": the column of the table of names.
        interleaved: Whether the rows of q and k are in llama.cpp's order.
        ignored: Names that may be there and are not read.
    """

    path: StoragePath
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    style: str
    interleaved: bool = False
    ignored: frozenset[str] = frozenset()
