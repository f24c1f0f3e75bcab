"""The environment that a checkpoint is written in: versions, devices, processes."""

import importlib.metadata
import os
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Versions of packages, kind and number of devices, number of processes, and XLA's flags."""
    versions = {}
    for name in ("jaxpeft", "jax", "jaxlib", "flax", "orbax-checkpoint"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
