"""The devices that a plan is made for: those of this machine, or TPUs that need not be present."""

import contextlib
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from jaxpeft.core.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU.

    Attributes:
        hbm_bytes: Memory of a chip.
        axes: Number of dimensions of its topologies.
        options: What libtpu needs besides the topology's name.
    """

    hbm_bytes: int
    axes: int
    options: dict[str, Any]


CHIPS = {
    "v4": Chip(32 * GIB, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, 2, {}),
    "v5p": Chip(95 * GIB, 3, {}),
    "v6e": Chip(32 * GIB, 2, {}),
}
"""TPUs by name. The HBM per chip is from the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
the Cloud TPU documentation (https://cloud.google.com/tpu/docs/v5e and so on). XLA reserves some of
it, and refuses to compile a program that needs more than the rest.
"""


class Machine(NamedTuple):
    """The devices that a plan is made for.

    Attributes:
        name: Such as "v5e:2x4", or "this machine (cpu)".
        devices: All devices; None for those of this process.
        count: The number of devices.
        unit: The word for one of them in messages.
        device_bytes: Memory of each device.
        platform: The platform that programs are traced for; None for the one that is present.
    """

    name: str
    devices: list[Any] | None
    count: int
    unit: str
    device_bytes: int
    platform: str | None


def find_machine(topology: str | None) -> Machine:
    """This machine's devices, or those of a TPU topology that need not be present.

    Args:
        topology: Such as "v5e:2x4" or "v5p:2x2x4"; None for this machine.

    Raises:
        UserError: There is no such topology, libtpu is not installed, or this machine's devices do
            not report their memory.
    """
    if topology is not None:
        return _find_tpu(topology)
    backend, count = jax.default_backend(), jax.device_count()
    if backend == "cpu":
        device_bytes = _host_bytes() // jax.local_device_count()
    else:
        device_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        if not device_bytes:
            raise UserError(f"the {backend} devices of this machine do not say what they hold.")
    return Machine(f"this machine ({backend})", None, count, "device", device_bytes, None)


def _find_tpu(text: str) -> Machine:
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[1] not in CHIPS:
        raise UserError(
            f"--topology: {text!r} is none; give a chip and its arrangement, such as v5e:1x1, "
            f"v5e:2x4 or v5p:2x2x4; chips: {', '.join(CHIPS)}."
        )
    name, chip = found[1], CHIPS[found[1]]
    sizes = tuple(int(size) for size in found[2].split("x"))
    if len(sizes) != chip.axes or 0 in sizes:
        example = "x".join("2" * chip.axes)
        raise UserError(
            f"--topology: {text!r}: {name} chips stand in {chip.axes} dimensions, at least one "
            f"along each, such as {name}:{example}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology: libtpu, which compiles for TPUs and needs none, is not installed: "
            "pip install 'jaxpeft[plan]'"
        )
    from jax.experimental import topologies

    options = dict(chip.options)
    if max(sizes) == 1:  # larger topologies have hosts with four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(text, "tpu", **options)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"--topology: {text!r} is refused by libtpu: {reason}") from error
    devices = list(described.devices)
    return Machine(text, devices, len(devices), f"{name} chip", chip.hbm_bytes, "tpu")


def _host_bytes() -> int:
    """The memory of this machine, or the part that its control group may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        total = min(total, int(file.read()))
    return total
