"""Requests to the Hub that end, and errors that say how to go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# huggingface_hub 1 speaks through httpx, 2 through httpx2: the one whose errors it raises is the one in use.
_HTTP = sys.modules[HTTPError.__module__.partition(".")[0]]

REQUEST_TIMEOUT = 60.0
"""Seconds that a request to the Hub may make no progress."""

_LOG_IN = (
    "log in with `hf auth login` or pass token=... (hf-ntp: --token), one of https://huggingface.co/settings/tokens"
)
_AGAIN = "call it again later; https://status.huggingface.co tells about outages"
# Found is what the Hub answered; by status: needed, and how to fix.
_REMEDIES = {
    400: ("a request that the Hub accepts", "mend what the answer names"),
    401: ("a valid token", _LOG_IN),
    402: ("a plan that includes this", "see https://huggingface.co/settings/billing, or publish under another name"),
    403: (
        "a token with write access to this namespace",
        "use one of role 'write' (or fine-grained with write access to it), or publish under a name of your own",
    ),
    404: ("a repository that exists and that the token may see", f"check the name, then {_LOG_IN}"),
    409: ("a repository that nobody else changes at the same time", "call it again: it starts from the new state"),
    412: ("a repository that nobody else changes at the same time", "call it again: it starts from the new state"),
    429: ("fewer requests", "wait some minutes, then call it again"),
}


class HubError(OSError):
    """The Hub could not be reached or did not do as asked: what was found, what is needed, how to mend it."""


@contextmanager
def explained(doing: str, aftermath: str = "") -> Iterator[None]:
    """Raise whatever goes wrong between us and the Hub as a :class:`HubError` that says how to go on.

    Args:
        doing: What was attempted, such as "publishing org/model".
        aftermath: What holds after a failure.

    Raises:
        HubError: From the original error.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError, JSONDecodeError) as error:
        # Files that cannot be read on this machine are no matter of the Hub's.
        if isinstance(error, HubError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise HubError(f"{doing} failed: {_explanation(_root(error))}{aftermath and f' {aftermath}'}") from error


@contextmanager
def bounded_requests(seconds: float) -> Iterator[None]:
    """Let no request of huggingface_hub stall for ever: its client waits without limit unless told otherwise.

    Limits that were set elsewhere stay. Uploads by hf_xet have limits of their own.
    """

    def limit(request: Any) -> None:
        limits = request.extensions.setdefault("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            if limits.get(phase) is None:
                limits[phase] = seconds

    session = get_session()
    before = session.event_hooks
    # A hook, as several calls of huggingface_hub pass "no limit" themselves, over the client's own setting.
    session.event_hooks = {**before, "request": [*before["request"], limit]}
    try:
        yield
    finally:
        session.event_hooks = before


def _root(error: BaseException) -> BaseException:
    """Return the error of the connection that others were raised from, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (HTTPError, OfflineModeIsEnabled)):
            return cause
        cause = cause.__cause__
    return error


def _explanation(error: BaseException) -> str:
    found, needed, fix = _diagnosis(error)
    return f"{found}. Needed: {needed}. To fix: {fix}."


def _diagnosis(error: BaseException) -> tuple[str, str, str]:
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set and the local cache does not hold it all",
            "a connection",
            "unset HF_HUB_OFFLINE, or download it once with a connection",
        )
    if isinstance(error, _HTTP.TimeoutException):
        return (
            f"the connection stalled ({type(error).__name__})",
            "a Hub that answers in time",
            "check the connection and call it again, on a slow one with a larger timeout=... (hf-ntp: --timeout)",
        )
    if isinstance(error, HTTPError):
        return (
            f"no connection to the Hub, or it broke ({type(error).__name__}: {error})",
            "a network that reaches it",
            "check network, proxy and HF_ENDPOINT, then call it again",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return "no token on this machine", "a valid token", _LOG_IN
    if isinstance(error, JSONDecodeError):
        return "the answer is not that of a Hub", "a server that speaks the Hub's protocol", "check HF_ENDPOINT"
    return f"{type(error).__name__}: {error}", "a Hub that answers", "check the connection, then call it again"


def _refusal(error: HfHubHTTPError) -> tuple[str, str, str]:
    status = error.response.status_code
    found = f"the Hub answered {status}"
    if error.server_message:
        found += f" ({error.server_message.strip().rstrip('.')})"
    if isinstance(error, GatedRepoError):
        return found, "access to this gated repository", f"ask for it on the repository's page, then {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return found, "a branch, tag or commit that exists", "check the revision on the repository's page"
    if isinstance(error, RepositoryNotFoundError):
        # Also for repositories that a caller without access must not know of; the Hub answers 401 or 404.
        return (found, *_REMEDIES[404])
    if status >= 500:
        return found, "a Hub that works", _AGAIN
    return (found, *_REMEDIES.get(status, ("a request that the Hub accepts", _AGAIN)))
