"""Repeats work that failed because of a disk or a store, a few times with growing waits."""

import time
from collections.abc import Callable
from typing import TypeVar

from jaxpeft.core.errors import ResourceError, StoreError, UserError

T = TypeVar("T")

DELAYS = (1, 5, 15)
"""Seconds between tries. Their sum fits into the grace time of a machine that is shut down."""


def persist(act: Callable[[], T], tell: Callable[[str], None]) -> T:
    """Calls a function until it succeeds, at most once more than there are `DELAYS`.

    If several processes act together, `act` must succeed or fail in all of them alike.

    Args:
        act: The function; it may be called several times.
        tell: Called with a line of text before every further try.

    Returns:
        The result of `act`.

    Raises:
        ResourceError: The disk is still full or still refuses.
        StoreError: The store still refuses or does not answer.
        UserError: `act` failed for another reason, which is not retried.
    """
    for delay in DELAYS:
        try:
            return act()
        except UserError as error:
            if not _may_pass(error):
                raise
            tell(f"warning: {error} (trying again in {delay} s)")
            time.sleep(delay)
    try:
        return act()
    except UserError as error:
        if not _may_pass(error) or isinstance(error, (ResourceError, StoreError)):
            raise
        raise ResourceError(str(error)) from error


def _may_pass(error: UserError) -> bool:
    """Whether an error of the disk or the store may disappear if somebody mends it meanwhile.

    An error that only this process has is not retried, since the other processes go on.
    """
    if error.alone:
        return False
    return isinstance(error, (ResourceError, StoreError)) or isinstance(error.__cause__, OSError)
