"""Downloads from the Hugging Face hub, with one-line errors and a time limit on every request.

huggingface_hub asks some questions without a time limit, and repeats others up to five times. Here
every request has a limit (HF_HUB_ETAG_TIMEOUT, 10 seconds by default), and after two failures in a
row the download is given up.
"""

import contextlib
import errno
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxpeft.core.errors import HubError, ResourceError, UserError

_TRIES = 2  # failures in a row
_LONGEST_WAIT = 20  # seconds that the hub may tell us to wait
_BUSY = (408, 429, 500, 502, 503, 504)
_LATER = "try again later"
_ADDRESS = "look at HF_ENDPOINT and at proxies, or " + _LATER


class _GivenUpError(Exception):
    """The hub failed several times in a row; the text says how."""


def download(text: str, revision: str | None, files: Iterable[str], what: str) -> pathlib.Path:
    """Downloads some files of a repository, or finds them in the hub's local cache.

    Args:
        text: The hub id.
        revision: Branch, tag or commit; None for the newest.
        files: Patterns of names.
        what: "model" or "adapter", for messages.

    Returns:
        The folder in the cache.

    Raises:
        UserError: There is no such repository or revision, access is denied, or the hub is switched
            off.
        HubError: The hub gives no answer or a wrong one; the same command may succeed later.
        ResourceError: The disk of the cache is full.
    """
    import huggingface_hub

    try:
        with _bounded():
            folder = huggingface_hub.snapshot_download(
                text, revision=revision, allow_patterns=[*files]
            )
    except UserError:
        raise
    except Exception as error:
        raise explain(error, text, revision, what) from error
    return pathlib.Path(folder)


def explain(error: Exception, text: str, revision: str | None, what: str) -> UserError:
    """The error to raise for an exception of huggingface_hub."""
    name = f"{text} (revision {revision})" if revision else text
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return UserError(
            f"{name}: no such folder here, not in the hub's local cache, and HF_HUB_OFFLINE is "
            "set; unset it, or download it once with a connection"
        )
    if "LocalEntryNotFoundError" in kinds:
        cause = error.__cause__
        if isinstance(cause, Exception):
            return explain(cause, text, revision, what)
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return explain(_offline(), text, revision, what)
        return HubError(
            f"{name}: not in the hub's local cache, and the hub was not reached; {_LATER}"
        )
    if "GatedRepoError" in kinds:
        return UserError(
            f"{name}: access to this {what} is restricted; accept its terms on the hub and log in "
            "with `hf auth login`"
        )
    if "RevisionNotFoundError" in kinds:
        return UserError(f"{text}: the hub has no revision {revision!r} of this {what}")
    if "DisabledRepoError" in kinds:
        return UserError(f"{name}: the hub has disabled this {what}; choose another one")
    if "HFValidationError" in kinds:
        return UserError(f"{name}: is no folder here and no hub id: {_first_line(error)}")
    status = _status(error)
    if "RepositoryNotFoundError" in kinds or status in (401, 404):
        code = f" (HTTP {status})" if status else ""
        return UserError(
            f"{name}: no such folder here and no such {what} on the hub{code}, or it is private; "
            "look at the spelling, or log in with `hf auth login`"
        )
    if status == 403:
        return UserError(
            f"{name}: the hub does not allow it (HTTP 403); log in with an account that may read "
            f"this {what}: `hf auth login`"
        )
    if status == 429:
        return HubError(
            f"{name}: the hub has had too many requests from here (HTTP 429); wait some minutes, "
            "or log in with `hf auth login`, which allows more"
        )
    if status is not None and status >= 500:
        return HubError(f"{name}: the hub fails (HTTP {status}); {_LATER}")
    if status is not None:
        return UserError(f"{name}: the hub refuses the request (HTTP {status}); {_ADDRESS}")
    return _explain_connection(error, kinds, name)


def _explain_connection(error: Exception, kinds: set[str], name: str) -> UserError:
    """The error for an exception that is not an answer of the hub."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{name}: no space left for it in the hub's local cache; free some")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"{name}: the hub's local cache cannot be written ({_first_line(error)}); set HF_HOME "
            "to another folder"
        )
    if isinstance(error, _GivenUpError):
        return HubError(f"{name}: {error}; {_LATER}")
    if "TooManyRedirects" in kinds:
        return HubError(f"{name}: the hub's answers lead in a circle; {_ADDRESS}")
    if kinds & {"InvalidURL", "UnsupportedProtocol"}:
        return UserError(
            f"{name}: HF_ENDPOINT is no address of the web ({_first_line(error)}); unset it, or "
            "give one such as https://huggingface.co"
        )
    if "TimeoutException" in kinds:
        return HubError(
            f"{name}: not in the hub's local cache, and the hub did not answer in time; {_LATER}, "
            "or raise HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if "Consistency check failed" in str(error) or kinds & {"RemoteProtocolError", "ReadError"}:
        return HubError(
            f"{name}: the download was cut ({_first_line(error)}); the same command goes on with it"
        )
    if "TransportError" in kinds or isinstance(error, ConnectionError):
        return HubError(
            f"{name}: no such folder here, not in the hub's local cache, and the hub was not "
            f"reached ({_first_line(error)}); look at the connection, or {_LATER}"
        )
    return HubError(
        f"{name}: the answer is not one of a hub ({type(error).__name__}: {_first_line(error)}); "
        f"{_ADDRESS}"
    )


def _offline() -> Exception:
    from huggingface_hub import errors

    return errors.OfflineModeIsEnabled("HF_HUB_OFFLINE")


def _first_line(error: Exception) -> str:
    """The first line of an exception's text, shortened."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _status(error: Exception) -> int | None:
    """The HTTP status that an exception carries."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Gives every request to the hub in this block a time limit."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    before = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    seconds, failures = constants.HF_HUB_ETAG_TIMEOUT, _Failures()

    def factory() -> Any:
        return _watched(before(), seconds, failures)

    huggingface_hub.set_client_factory(factory)
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(before)


class _Failures:
    """Counts consecutive failures."""

    def __init__(self):
        self._count = 0

    def succeed(self) -> None:
        """Resets the count."""
        self._count = 0

    def fail(self, how: str, wait: float = 0) -> None:
        """Counts a failure; raises a `_GivenUpError` when there were too many in a row."""
        self._count += 1
        if self._count > _TRIES or wait > _LONGEST_WAIT:
            raise _GivenUpError(how)


def _watched(client: Any, seconds: float, failures: _Failures) -> Any:
    """A client whose requests have a time limit, and which gives up after repeated failures."""
    build, send = client.build_request, client.send
    client.timeout = seconds

    def build_request(*args: Any, **options: Any) -> Any:
        if "timeout" in options and options["timeout"] is None:
            options["timeout"] = seconds
        return build(*args, **options)

    def watched_send(*args: Any, **options: Any) -> Any:
        try:
            response = send(*args, **options)
        except Exception as error:
            kinds = {cls.__name__ for cls in type(error).__mro__}
            if "TransportError" in kinds:
                slow = "TimeoutException" in kinds
                how = "does not answer" if slow else f"was not reached ({_first_line(error)})"
                failures.fail(f"the hub {how}")
            raise
        if response.status_code in _BUSY:
            wait = response.headers.get("Retry-After", "")
            failures.fail(
                f"the hub fails (HTTP {response.status_code})", float(wait) if wait.isdigit() else 0
            )
        else:
            failures.succeed()
        return response

    client.build_request, client.send = build_request, watched_send
    return client
