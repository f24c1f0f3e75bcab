"""Reads the ``adapter_model.safetensors`` of a PEFT folder."""

import numpy as np

from jaxpeft.core.errors import UserError
from jaxpeft.files import other_folders, storage
from jaxpeft.files.safetensors_file import read_header
from jaxpeft.files.storage import StoragePath
from jaxpeft.files.tensors import decode
from jaxpeft.methods.peft.values import Tensors

TENSORS = "adapter_model.safetensors"


def tensors_in(folder: StoragePath) -> Tensors:
    """The tensors of a folder; each one is read when it is asked for.

    Raises:
        UserError: There is no such file.
    """
    file = folder / TENSORS
    if not file.is_file():
        raise UserError(f"{folder}: {_no_tensors(folder)}")
    return _open(file)


def _open(file: StoragePath) -> Tensors:
    infos = read_header(file)
    whole = file.read_bytes() if storage.is_remote(file) else None  # one request, not thousands

    def read(key: str) -> np.ndarray:
        info = infos[key]
        if whole is not None:
            raw = np.frombuffer(whole, np.uint8, info.nbytes, offset=info.offset)
        else:
            raw = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset)
        return decode(raw, info)

    shapes = {key: info.shape for key, info in infos.items()}
    return Tensors(file, shapes, {key: info.dtype for key, info in infos.items()}, read)


def _no_tensors(folder: StoragePath) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            "has only adapter_model.bin, a pickle, which can run code and is never opened here; "
            "save it again with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    found = "" if storage.is_remote(folder) else other_folders.no_tensors(folder)
    return f"{found or f'has no {TENSORS}; the download or save is incomplete'}."
