"""One plain request, however it came: over HTTP/1.1 (plain.py) or HTTP/2 (plain_h2.py)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from hypeman.actor import set_actor
from hypeman.server import exchange
from hypeman.server.connection import Connection
from hypeman.server.decode import decode_body, decode_query, decode_segment
from hypeman.server.exchange import Reply, actor_of, failed, failure_from, log_request, measured, named_in, reply_to
from hypeman.server.heads import Headers
from hypeman.server.plain_routes import Found, PlainRoutes
from hypeman.tokens import LOCAL, Caller, check_scope


class PlainCall:
    """Await ``reply``, then call ``log``."""

    def __init__(
        self, routes: PlainRoutes, connection: Connection, found: Found, headers: Headers, body: bytes
    ) -> None:
        self.request_id = exchange.request_id(headers.request_id)
        self._routes = routes
        self._connection = connection
        self._found = found
        self._headers = headers
        self._body = body
        self._started = time.perf_counter()
        self._subject: str | None = None
        """Of the caller, once authenticated."""
        self._names = ""
        """The object that the request names in its body or query."""

    async def reply(self, carry: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]) -> Reply:
        """The response. ``carry`` awaits the handler, and ends it when the client disconnects or the time is up."""
        found, operation = self._found, self._found.operation
        try:
            if operation.scopes:
                caller = authenticate(self._routes, self._connection, self._headers.authorization, self.request_id)
                self._subject = caller.subject
                check_scope(caller, *operation.scopes)
            with measured(operation, self._headers.traceparent):
                arguments: dict[str, Any] = {name: decode_segment(value) for name, value in found.segments.items()}
                if operation.query is not None:
                    arguments["query"] = decode_query(found.query, operation.query)
                if found.decoder is not None and (self._body or operation.body_required):
                    arguments["body"] = decode_body(self._body, found.decoder)
                self._names = named_in(arguments)
                handler: Any = operation.handler(self._routes.services, **arguments)
                answer = await carry(handler)
            return reply_to(operation, answer)
        except Exception as error:
            return failed(failure_from(error))

    def log(self, status: int) -> None:
        """The log line and the metrics."""
        operation = self._found.operation
        log_request(
            operation.method,
            operation.path,
            status,
            time.perf_counter() - self._started,
            self.request_id,
            self._found.segments,
            self._subject,
            self._connection,
            self._names,
        )


def authenticate(routes: PlainRoutes, connection: Connection, authorization: str | None, request_id: str) -> Caller:
    """The caller, from here on the actor of what the request changes. Raises Unauthorized."""
    caller = LOCAL if connection.trusted else routes.verifier.caller(authorization)
    set_actor(actor_of(caller, connection, request_id))
    return caller
