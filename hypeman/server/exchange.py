"""What a request to an Operation means, carried by Quart (app.py) or by the connection itself (plain.py).

Both carriers decode, authorize, answer, fail, log and count through this module, so that a client cannot tell them
apart. Nothing here reads or writes a connection.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from hypeman.actor import Actor
from hypeman.errors import HypemanError
from hypeman.server import errors
from hypeman.server.api import Operation, Page
from hypeman.server.connection import Connection
from hypeman.server.errors import Failure, failure_of, told_error
from hypeman.telemetry import metrics, traces
from hypeman.telemetry.logs import blank_text, log_fields
from hypeman.tokens import Caller

_log = logging.getLogger("hypeman.http")
_encode = msgspec.json.Encoder().encode

JSON = "application/json"
TRACEPARENT = "traceparent"
"""Header of W3C Trace Context: the caller's trace, which an operation continues."""
DISCONNECTED = 499
"""Status in log and metrics of a request whose client disconnected before the response."""
_MAX_REQUEST_ID = 64
_NAMING = ("name", "pci_address", "target")
_MAX_NAME = 256
"""Characters of a name in the log."""


@dataclass(frozen=True)
class ServerSettings:
    """The parts of the configuration that the application needs."""

    jwt_secret: str
    request_timeout: float = 60.0
    url: str = ""
    """Of the server over TCP, as seen on this host; empty if it does not listen there."""


class Reply(Struct, frozen=True):
    """A response that is whole in memory."""

    status: int
    content: bytes
    media_type: str = JSON
    """Empty: no content, and no header that describes any."""
    headers: dict[str, str] = {}


def reply_to(operation: Operation, answer: Any) -> Reply:
    """The response of an operation whose handler returned ``answer``; not for event streams."""
    if operation.or_list is not None:
        return Reply(operation.status, _encode(answer))
    if isinstance(answer, Page):
        return Reply(operation.status, answer.content, answer.media_type, operation.headers)
    if operation.answer is None:
        return Reply(operation.status, b"", "", operation.headers)
    content = answer if isinstance(answer, bytes) else _encode(answer)
    headers = operation.headers
    if operation.location:
        headers = {**headers, "Location": operation.location.format_map(msgspec.structs.asdict(answer))}
    return Reply(operation.status, content, JSON, headers)


def failed(failure: Failure) -> Reply:
    return Reply(failure.status, failure.encode(), JSON, failure.headers)


def failure_from(error: Exception) -> Failure:
    """The failure to report for ``error``. Logs what the client does not see."""
    reported = error if isinstance(error, HypemanError) else told_error(error)
    if reported is None:
        _log.error("unexpected failure", exc_info=error)
        return errors.UNEXPECTED
    if reported.status >= 500 and reported.status != 501:
        _log.error("%s: %s", reported.code, reported.message, exc_info=reported)
    return failure_of(reported)


@contextmanager
def measured(operation: Operation, traceparent: str = "") -> Iterator[None]:
    """Trace an operation that may change something, and observe the duration of an instance's verb, as seen by the
    caller."""
    if operation.method == "GET":
        yield
        return
    started, status = time.perf_counter(), "error"
    about = {"http.request.method": operation.method, "http.route": operation.path}
    try:
        with traces.operation(f"{operation.method} {operation.path}", parent=traceparent, about=about):
            yield
        status = "success"
    finally:
        if operation.measure is not None:
            metrics.instance_seconds[operation.measure].labels(status).observe(time.perf_counter() - started)


def request_id(given: str) -> str:
    """``given`` by the client if it is well-formed, else a new one of 16 characters."""
    if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return os.urandom(8).hex()


def named_in(arguments: Mapping[str, Any]) -> str:
    """For the log: the object that a request names in its body or query, such as the instance to be made."""
    for part in ("body", "query"):
        for field in _NAMING:
            if isinstance(name := getattr(arguments.get(part), field, None), str) and name:
                return name[:_MAX_NAME]
    return ""


def actor_of(caller: Caller, connection: Connection | None, request_id: str) -> Actor:
    """Who causes what the request changes."""
    address, uid = connection.peer if connection is not None else (UNSET, UNSET)
    return Actor(caller.subject, address, uid, request_id)


def log_request(
    method: str,
    route: str,
    status: int,
    seconds: float,
    request_id: str,
    segments: Mapping[str, str],
    subject: str | None,
    connection: Connection | None,
    names: str = "",
) -> None:
    """The log line and the metrics of one request; ``route`` is the operation's path template, never the requested
    path, to bound the number of series. ``segments`` are the path parameters as the client wrote them, ``names`` is
    from ``named_in``; ``subject`` is None without authentication, ``connection`` in tests without sockets."""
    metrics.count_request(method, route, status, seconds)
    if not method.isalpha():
        method = blank_text(method)  # a client's invention
    ours: dict[str, Any] = {"method": method, "route": route, "status": status, "ms": round(seconds * 1000, 2)}
    theirs = {"request_id": request_id}
    if subject is not None:
        theirs["subject"] = subject
    if connection is not None:
        address, uid = connection.peer
        if address is not UNSET:
            ours["address"] = address
        if uid is not UNSET:
            ours["uid"] = uid
    for name, value in segments.items():
        theirs[f"path_{name}"] = value
    if names:
        theirs["names"] = names
    log_fields(_log, "request", ours, theirs)
