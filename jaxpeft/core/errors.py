"""Errors that are the user's to mend, each with the exit code a command ends with.

A command prints them as one line, ``error: <text>``, and never as a traceback.
"""


class UserError(ValueError):
    """Bad config, data, model or adapter: the text says where, what, why and the way out.

    Attributes:
        alone: Whether it happened in one of several processes while the others went on, so that
            this one must end, and not try again what they would have to do with it.
    """

    exit_code = 2
    alone = False


class DivergedError(UserError):
    """The loss or the gradient stayed non-finite; the last good state is kept."""

    exit_code = 3


class CheckpointError(UserError):
    """No usable checkpoint."""

    exit_code = 4


class ResourceError(UserError):
    """Out of disk or memory."""

    exit_code = 5


class LostWorkerError(UserError):
    """A process that reads data ended; the same command may do later."""

    exit_code = 5


class StoreError(UserError):
    """An object store refuses or does not answer; the same command may do later."""

    exit_code = 5


class HubError(StoreError):
    """The Hugging Face hub does not answer, or not as a hub does; it may do later."""


class InterruptedRunError(UserError):
    """Stopped by a signal after saving; the same command goes on."""

    exit_code = 6


def of_exit_code(code: int) -> type[UserError]:
    """The class of errors that a command ends with this exit code for."""
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
