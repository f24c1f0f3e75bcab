"""Orbax's checkpointer with the options that adapters need."""

import os
from typing import Any

from jaxpeft.checkpoints.failures import silence_orbax_tracebacks
from jaxpeft.files.storage import StoragePath


def open_orbax(directory: StoragePath) -> Any:
    """A checkpointer that writes leaves, and nothing that the manifest already holds.

    Shapes, dtypes and shardings come from the manifest and from the state to restore into. Leaving
    out Orbax's own two files of them saves 220 kB for a thousand small leaves.

    Args:
        directory: The folder of all steps.

    Returns:
        An ``orbax.checkpoint.v1.training.Checkpointer``.
    """
    from orbax.checkpoint import v1 as ocp

    silence_orbax_tracebacks()
    context = ocp.Context()
    context.array.saving.array_metadata_store = None
    context.array.saving.enable_write_sharding_file = False
    return ocp.training.Checkpointer(os.fspath(directory), context=context)
