"""Processes of one program that load a model together: none goes on where another has failed.

A process that raised alone would leave the others waiting in the next collective. So whatever may
fail in one of them alone (a file that is missing on its host, a damaged tensor in its rows) runs
in `together`, which lets every process know how it went.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxpeft.errors import UserError
from jaxpeft.sharding import Layout, as_layout

# What is sent at once, length included; more needs a second round.
FRAME_BYTES = 2048
_LENGTH_BYTES = 8

T = TypeVar("T")


def spans_processes(mesh: jax.sharding.Mesh | Layout | None) -> bool:
    """Whether the devices of a mesh belong to several processes.

    Raises:
        UserError: They belong to several, but not to all.
    """
    if mesh is None or jax.process_count() == 1:
        return False
    owners = {device.process_index for device in as_layout(mesh).mesh.devices.flat}
    if owners == {jax.process_index()}:
        return False
    if len(owners) != jax.process_count():
        raise UserError(
            f"mesh: its devices belong to {len(owners)} of {jax.process_count()} processes; it "
            "must be made of devices of all of them, or of this one"
        )
    return True


def exchange(data: bytes) -> list[bytes]:
    """What each process has given, in the order of their numbers; all must call."""
    first = _gather(_framed(data, FRAME_BYTES))
    lengths = [int.from_bytes(frame[:_LENGTH_BYTES], "little") for frame in first]
    most = _LENGTH_BYTES + max(lengths)
    if most > FRAME_BYTES:
        first = _gather(_framed(data, 1 << (most - 1).bit_length()))
    ends = [_LENGTH_BYTES + length for length in lengths]
    return [frame[_LENGTH_BYTES:end] for frame, end in zip(first, ends, strict=True)]


def together(task: Callable[[], T], shared: bool = True) -> T:
    """Runs a task in every process; if it fails in one of them, it fails in all.

    Args:
        task: What to do; it must not wait for other processes.
        shared: Whether there are others that do the same; without them the task is just called.

    Returns:
        What the task returns here.

    Raises:
        UserError: In every process the same one, of the first process that failed.
        Exception: Another error is raised as it is where it happened.
    """
    if not shared:
        return task()
    result, failure, text = None, None, ""
    try:
        result = task()
    except UserError as error:
        failure, text = error, str(error)
    except Exception as error:
        failure, text = error, f"{type(error).__name__}: {error}"
    texts = [found.decode() for found in exchange(text.encode())]
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    for index, found in enumerate(texts):
        if found:
            raise UserError(f"{found} (in process {index} of {len(texts)})") from failure
    return result  # pyright: ignore[reportReturnType]


def _framed(data: bytes, size: int) -> np.ndarray:
    frame = np.zeros(size, np.uint8)
    head = len(data).to_bytes(_LENGTH_BYTES, "little")
    sent = (head + data)[:size]
    frame[: len(sent)] = np.frombuffer(sent, np.uint8)
    return frame


def _gather(frame: np.ndarray) -> list[bytes]:
    from jax.experimental import multihost_utils

    rows = multihost_utils.process_allgather(frame)
    return [np.asarray(row).tobytes() for row in rows]
