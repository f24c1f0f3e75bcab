"""Communication between the processes of a run: shared answers, shared errors, whole arrays.

All processes of a run call these functions in the same order. In a run of one process they cost
nothing. `jaxpeft.cli.hosts` connects the processes.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.errors import UserError, of_exit_code
from jaxpeft.mesh.layouts import Layout, as_layout

T = TypeVar("T")

_ANSWER_BYTES = 1 << 14
_FRAME_BYTES = 2048
"""Bytes that `exchange` sends at once, length included; longer data needs a second round."""
_LENGTH_BYTES = 8


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def from_first(find: Callable[[], T]) -> T:
    """Calls `find` in the first process only, and gives its result or its error to all.

    Args:
        find: Its result must be short and JSON.

    Returns:
        The result in the first process.

    Raises:
        UserError: `find` raised it in the first process.
    """
    if jax.process_count() == 1:
        return find()
    from jax.experimental import multihost_utils

    told: dict[str, Any] = {}
    if is_first():
        try:
            told = {"answer": find()}
        except UserError as error:
            told = _failure(error)
    text = json.dumps(told).encode().ljust(_ANSWER_BYTES)
    buffer = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    told = json.loads(np.asarray(buffer).tobytes())
    if "error" in told:
        raise of_exit_code(told["code"])(told["error"])
    return told["answer"]


def together(act: Callable[[], T], shared: bool = True) -> T:
    """Calls `act` in all processes; if it fails in one of them, it fails in all.

    A process that raised alone would leave the others waiting in the next collective.

    Args:
        act: The function; it must not wait for other processes.
        shared: Whether the other processes call it too; if not, it is simply called.

    Returns:
        The result of `act` in this process.

    Raises:
        UserError: The same error in every process: that of the first process where `act` failed.
        Exception: Errors of other kinds are raised unchanged in the process where they happened.
    """
    if not shared or jax.process_count() == 1:
        return act()
    result, failure, told = None, None, {}
    try:
        result = act()
    except UserError as error:
        failure, told = error, _failure(error)
    except Exception as error:
        failure, told = error, {"error": f"{type(error).__name__}: {error}", "code": 2}
    answers = exchange(json.dumps(told).encode())
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    for index, answer in enumerate(map(json.loads, answers)):
        if answer:
            text = f"{answer['error']} (in process {index} of {len(answers)})"
            raise of_exit_code(answer["code"])(text) from failure
    return result  # pyright: ignore[reportReturnType]


def exchange(data: bytes) -> list[bytes]:
    """The data of every process, in the order of their numbers; all processes must call."""
    first = _gather(_framed(data, _FRAME_BYTES))
    lengths = [int.from_bytes(frame[:_LENGTH_BYTES], "little") for frame in first]
    most = _LENGTH_BYTES + max(lengths)
    if most > _FRAME_BYTES:
        first = _gather(_framed(data, 1 << (most - 1).bit_length()))
    ends = [_LENGTH_BYTES + length for length in lengths]
    return [frame[_LENGTH_BYTES:end] for frame, end in zip(first, ends, strict=True)]


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


def _failure(error: UserError) -> dict[str, Any]:
    """An error as it is sent to the other processes, short enough for one frame."""
    text = str(error).encode(errors="replace")[: _ANSWER_BYTES // 8].decode(errors="ignore")
    return {"error": text, "code": error.exit_code}


def require_same(what: str, mine: str) -> None:
    """Checks that all processes have the same data or config.

    Args:
        what: A name in the plural, for messages.
        mine: This process's fingerprint of it.

    Raises:
        UserError: Not all fingerprints are the same; it is raised in all processes.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(mine.encode()).hexdigest()
    equal = from_first(lambda: digest) == digest
    wrong = np.flatnonzero(~multihost_utils.process_allgather(np.array(equal)))
    if wrong.size:
        raise UserError(
            f"the {what} of process {wrong[0]} are not those of process 0; give all processes the "
            "same files and config."
        )


def whole(array: Any) -> Any:
    """An array with all its values on this process's devices.

    Arrays that are there already stay as they are; in a run of one process all are.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    from jax.experimental import multihost_utils

    return jnp.asarray(multihost_utils.process_allgather(array, tiled=True))


def to_host(array: Any) -> np.ndarray:
    """All values of an array of which this process may hold only a part."""
    return np.asarray(whole(array))
