"""Maps every failure to a status and the error body of the contract (§1.4).

There are two styles of ``code``, for compatibility with clients: failures before a handler runs have
the status text (``Bad Request``, ``Not Found``); refusals by a capability have a specific code
(``invalid_state``). Anything that is not a HypemanError is a bug: the caller logs it with its
traceback, and the response contains no internal details.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

import msgspec
from msgspec import UNSET, Struct, UnsetType

from hypeman.errors import HypemanError, InvalidRequest, RateLimited
from hypeman.text import without_host_paths


class ErrorDetail(Struct, frozen=True):
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET


class ErrorBody(Struct, frozen=True):
    """Why a request failed."""

    code: str
    message: str
    details: tuple[ErrorDetail, ...] | UnsetType = UNSET
    inner_error: ErrorDetail | UnsetType = UNSET


class Failure(Struct, frozen=True):
    """A failure, ready to be sent."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = {}

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)


class SchemaViolation(InvalidRequest):
    """Body, query or path violate the contract; the message names the location."""

    default_code = "Bad Request"


class BodyTooLarge(HypemanError):
    """A JSON body above the size limit."""

    status = 413
    default_code = "Request Entity Too Large"


class BodyTooSlow(HypemanError):
    """A JSON body that does not arrive in time."""

    status = 408
    default_code = "Request Timeout"


class TooManyBodies(HypemanError):
    """The memory for JSON bodies is used up by requests in progress."""

    status = 503
    default_code = "Service Unavailable"


class UpgradeRequired(HypemanError):
    """A plain request to a path that is a WebSocket."""

    status = 426
    retryable = False
    default_code = "Upgrade Required"


UNEXPECTED = Failure(500, ErrorBody("internal_error", "an internal error; see the server's log"))

TIMED_OUT = Failure(
    504,
    ErrorBody(
        "Gateway Timeout",
        "the request timed out but its work continues; check the resource's state before retrying",
    ),
    {"X-Should-Retry": "false"},  # an automatic retry of a create would conflict with the first attempt
)


def failure_of(error: HypemanError) -> Failure:
    headers: dict[str, str] = {}
    if isinstance(error, RateLimited) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if not error.retryable:
        headers["X-Should-Retry"] = "false"
    if error.status == 426:
        headers["Upgrade"] = "websocket"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Failure(error.status, ErrorBody(error.code, shown_message(error)), headers)


def shown_message(error: HypemanError) -> str:
    """What a client sees. The log has the full message. Client errors (4xx) only name the client's own paths."""
    return error.message if error.status < 500 else without_host_paths(error.message)


def status_failure(status: int, message: str, headers: dict[str, str] | None = None) -> Failure:
    """A failure without details beyond its status: ``code`` is the status text."""
    return Failure(status, ErrorBody(HTTPStatus(status).phrase, message), headers or {})


def told_error(error: BaseException) -> HypemanError | None:
    """The HypemanError in ``error``, also if nurseries have wrapped it in groups; None for a bug.

    A group that also holds anything else is a bug: the other failure must not be hidden.
    """
    leaves = list(_leaves(error))
    if len(leaves) == 1 and isinstance(leaves[0], HypemanError):
        return leaves[0]
    return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
