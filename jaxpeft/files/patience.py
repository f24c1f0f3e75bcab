"""What failed because of a disk or a store is tried again a few times, with growing waits."""

import time
from collections.abc import Callable
from typing import TypeVar

from jaxpeft.core.errors import ResourceError, StoreError, UserError

T = TypeVar("T")

DELAYS = (1, 5, 15)
"""Seconds between tries; all of them fit into the grace time of a machine that goes away."""


def persist(act: Callable[[], T], tell: Callable[[str], None]) -> T:
    """Does something until it succeeds, or has failed once more than there are `DELAYS`.

    Where several processes act together, it must succeed or fail in all of them alike.

    Args:
        act: What to do; it may be done several times.
        tell: Called with a line of text before every further try.

    Returns:
        What `act` returns.

    Raises:
        ResourceError: The disk is still full, or refuses.
        StoreError: The store still refuses or does not answer.
        UserError: What is of another kind is raised at once.
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
    """Whether an error is one of the disk or the store, which somebody may mend meanwhile.

    One that other processes do not have is none of them.
    """
    if error.alone:
        return False
    return isinstance(error, (ResourceError, StoreError)) or isinstance(error.__cause__, OSError)
