"""What the processes of one run have together: one that writes, answers, and whole arrays.

Every function here is called by all processes of a run in the same order, and costs nothing in a
run of one process. `jaxpeft.hosts` lets them meet.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import UserError, of_exit_code

T = TypeVar("T")

_ANSWER_BYTES = 1 << 14


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def from_first(find: Callable[[], T]) -> T:
    """Calls `find` in the first process only and gives its answer, or its failure, to all.

    Args:
        find: Its answer must be short and JSON.

    Returns:
        The answer of the first process.

    Raises:
        UserError: What `find` raised there.
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


def together(act: Callable[[], None]) -> None:
    """Calls `act` in all processes; its failure in one of them is raised in all.

    Raises:
        UserError: What `act` raised here or, with the same text and kind, in the first process
            where it failed.
    """
    if jax.process_count() == 1:
        return act()
    from jax.experimental import multihost_utils

    failed: UserError | None = None
    try:
        act()
    except UserError as error:
        failed = error
    told = json.dumps(_failure(failed) if failed else {}).encode().ljust(_ANSWER_BYTES)
    frames = multihost_utils.process_allgather(np.frombuffer(told, np.uint8))
    if failed is not None:
        raise failed
    for frame in frames:
        if error := json.loads(np.asarray(frame).tobytes()):
            raise of_exit_code(error["code"])(error["error"])
    return None


def _failure(error: UserError) -> dict[str, Any]:
    """What the others are told of an error; escaped for JSON it fits into a frame."""
    text = str(error).encode(errors="replace")[: _ANSWER_BYTES // 8].decode(errors="ignore")
    return {"error": text, "code": error.exit_code}


def require_same(what: str, mine: str) -> None:
    """Raises a UserError, in all processes, unless `mine` is the same in all of them."""
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

    Arrays that are there already, as all are in a run of one process, stay as they are.
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
