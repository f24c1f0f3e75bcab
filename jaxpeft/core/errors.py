"""Errors that the user can mend, each with the exit code of a command that fails with it.

A command prints such an error as one line, ``error: <text>``, and never as a traceback.
"""


class UserError(ValueError):
    """A bad config, data file, model or adapter. The text says where, what, why and the way out.

    Attributes:
        alone: Whether only one of several processes met the error while the others went on. Then
            this process must end and may not repeat work that needs the others.
    """

    exit_code = 2
    alone = False


class DivergedError(UserError):
    """The loss or the gradient stayed non-finite; the last good state is kept."""

    exit_code = 3


class CheckpointError(UserError):
    """There is no usable checkpoint."""

    exit_code = 4


class ResourceError(UserError):
    """The disk or the memory is full."""

    exit_code = 5


class LostWorkerError(UserError):
    """A process that reads data ended. Running the same command again may succeed."""

    exit_code = 5


class StoreError(UserError):
    """An object store refuses or does not answer. Running the same command again may succeed."""

    exit_code = 5


class HubError(StoreError):
    """The Hugging Face hub gives no answer or a wrong one; the command may succeed later."""


class InterruptedRunError(UserError):
    """A signal stopped the run after it was saved. The same command continues it."""

    exit_code = 6


def of_exit_code(code: int) -> type[UserError]:
    """The class of the errors that make a command end with this exit code."""
    kinds = (DivergedError, CheckpointError, ResourceError, InterruptedRunError)
    return next((kind for kind in kinds if kind.exit_code == code), UserError)


def first_few(items: list[str], limit: int = 5) -> str:
    """Joins the first `limit` items with commas and counts the rest."""
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def nearest(name: str, known: list[str], count: int = 3) -> list[str]:
    """The known names closest to `name`, best first."""
    import difflib

    return difflib.get_close_matches(name, known, n=count, cutoff=0.5)
