"""The HTTP application: every Operation becomes a Quart-Trio route, and every failure a response.

Stages of a request:

    match the path → authenticate (token, or the socket's permissions) → authorize → decode Struct
    → handler (calls a service) → encode Struct → one log line, one metrics count

The order is the contract's (§1.1). There is no logic here on instances, images or other resources.
A client that disconnects cancels its handler; the services' work continues in their own tasks.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import trio
from quart import Response, has_request_context, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import WebsocketMismatch

from hypeman.actor import set_actor
from hypeman.server import errors, exchange
from hypeman.server.api import Context, EventStream, Operation, UploadStream, WebSocketRoute
from hypeman.server.connection import Connection
from hypeman.server.decode import decode_body, decode_query, decode_segment
from hypeman.server.errors import BodyTooLarge, BodyTooSlow, TooManyBodies, UpgradeRequired, status_failure
from hypeman.server.exchange import (
    DISCONNECTED,
    TRACEPARENT,
    Reply,
    ServerSettings,
    actor_of,
    failed,
    failure_from,
    log_request,
    measured,
    named_in,
    reply_to,
)
from hypeman.server.idempotency import HEADER, Calls
from hypeman.server.plain_routes import PlainRoutes, routes_of
from hypeman.server.quart_parts import ApiRequest, HttpConnection, WebsocketConnection
from hypeman.server.registry import RegistryRoutes
from hypeman.server.routes import OPERATIONS
from hypeman.server.services import Services
from hypeman.server.sessions import SAFE_METHODS, Sessions, check_local_browser, check_origin, cookie_name
from hypeman.server.streams import WEBSOCKETS
from hypeman.server.ui import UiRoutes
from hypeman.tokens import LOCAL, NOBODY, Caller, Scope, Verifier, check_scope

MAX_JSON_BODY = 2 * 2**20
"""Bytes. The largest realistic request, a create with a long environment, has about 100 KB."""

MAX_JSON_BODIES = 32 * 2**20
"""Total bytes of all JSON bodies being received."""
BODY_SECONDS = 10.0
"""Time limit for receiving a JSON body. Uploads have no such limit: they are not held in memory."""


_METHODS = frozenset(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])


def build_app(
    services: Services,
    settings: ServerSettings,
    calls: Calls | None = None,
    sessions: Sessions | None = None,
    ui: Path | None = None,
) -> ApiApp:
    """Build the application; ``serve.py`` serves it on sockets. Without ``calls``, ``Idempotency-Key`` is ignored.

    Without ``sessions`` there is no web UI. ``ui`` is the folder of its files, None if it was not built.
    """
    app = ApiApp(services, settings, calls, sessions)
    app.add_operations(OPERATIONS)
    for socket in WEBSOCKETS:
        app.add_websocket_route(socket)
    app.add_registry()
    if sessions is not None:
        app.add_ui(sessions, ui)
    return app


@dataclass
class _HeldBodies:
    """JSON bodies being received."""

    bytes: int = 0


class ApiApp(QuartTrio):
    request_class = ApiRequest
    asgi_http_class = HttpConnection
    asgi_websocket_class = WebsocketConnection

    def __init__(
        self,
        services: Services,
        settings: ServerSettings,
        calls: Calls | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        super().__init__("hypeman", static_folder=None)
        self.services = services
        self.settings = settings
        self.calls = calls
        self._sessions = sessions
        self._verifier = Verifier(settings.jwt_secret)
        self.held_bodies = _HeldBodies()
        self.config["MAX_CONTENT_LENGTH"] = None  # streams are unlimited; JSON bodies are checked where they are read
        self.config["BODY_TIMEOUT"] = None  # the time limit of the whole request covers it
        self.config["RESPONSE_TIMEOUT"] = None
        self.url_map.merge_slashes = False
        self.register_error_handler(HTTPException, _answer_http_exception)

    @cached_property
    def plain(self) -> PlainRoutes:
        """What a ``Server`` of this application can answer without it."""
        return routes_of(self.services, self.settings)

    def add_operations(self, operations: Sequence[Operation]) -> None:
        for path, allowed, others in shadowed(operations):
            self.add_url_rule(path, f"405 {path}", _refusal(allowed), methods=others, provide_automatic_options=False)
        for operation in operations:
            self.add_url_rule(
                _rule(operation.path),
                f"{operation.method} {operation.path}",
                _view(self, operation),
                methods=[operation.method],
                provide_automatic_options=False,
            )

    def add_websocket_route(self, route: WebSocketRoute) -> None:
        async def session(**segments: str) -> Response | None:
            failure = None
            try:
                self._admit(websocket, route.scope, cookie=True)
                await route.handler(self.services, websocket, *(decode_segment(value) for value in segments.values()))
            except Exception as error:
                failure = failure_from(error)
            return None if failure is None else _response(failed(failure))

        async def plain(**_: str) -> Response:
            self._admit(request, route.scope)
            raise UpgradeRequired(f"{request.path} is a WebSocket")

        self.add_websocket(_rule(route.path), f"WS {route.path}", session)
        self.add_url_rule(
            _rule(route.path), f"GET {route.path}", _caught(plain), methods=["GET"], provide_automatic_options=False
        )

    def add_registry(self) -> None:
        def admit(asked: Any, authorization: str | None) -> Caller:
            return self._authenticate(asked, authorization)

        routes = RegistryRoutes(self.services.registry, admit, self.settings.jwt_secret)
        for path, view, methods in (
            ("/v2/", routes.probe, ["GET", "HEAD"]),
            ("/v2/token", routes.token, ["GET"]),
            ("/v2/<path:rest>", routes.any, ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE"]),
        ):
            self.add_url_rule(path, f"registry {path}", view, methods=methods, provide_automatic_options=False)

    def add_ui(self, sessions: Sessions, folder: Path | None) -> None:
        async def read_body() -> bytes:
            return await _read_json_body(self.held_bodies)

        routes = UiRoutes(
            folder, sessions, self._verifier, url=self.settings.url, admit=self._admit, read_body=read_body
        )
        for path, view, method in (
            ("/", routes.root, "GET"),
            ("/ui/", routes.page, "GET"),
            ("/ui/<path:rest>", routes.file, "GET"),
            ("/ui/session", routes.show, "GET"),
            ("/ui/session", routes.login, "POST"),
            ("/ui/session", routes.logout, "DELETE"),
            ("/ui/links", routes.link, "POST"),
        ):
            methods = ["GET", "HEAD"] if method == "GET" else [method]
            self.add_url_rule(
                path, f"ui {method} {path}", _caught(view), methods=methods, provide_automatic_options=False
            )

    async def handle_request(self, request: Any) -> Any:
        """Handle one request, with its log line and metrics count."""
        started = time.perf_counter()
        status = DISCONNECTED
        try:
            response = await super().handle_request(request)
            status = response.status_code
            response.headers["X-Request-Id"] = _request_id(request)
            return response
        finally:
            _tell(request, request.method, status, time.perf_counter() - started)

    async def handle_websocket(self, websocket: Any) -> Any:
        started = time.perf_counter()
        status = 101
        try:
            response = await super().handle_websocket(websocket)
            if response is not None:
                status = response.status_code
                response.headers["X-Request-Id"] = _request_id(websocket)
            return response
        finally:
            _tell(websocket, "WS", status, time.perf_counter() - started)

    async def handle_exception(self, error: Exception) -> Response:
        """Handle an exception that neither a route nor an HTTP exception handler caught: a bug."""
        return _response(failed(failure_from(error)))

    def _admit(self, asked: Any, *scopes: Scope, cookie: bool = False) -> Caller:
        """The caller, if it has one of ``scopes``. ``cookie``: a session of the web UI will do as well.

        Raises Unauthorized, Forbidden, WrongOrigin.
        """
        caller = self._authenticate(asked, cookie=cookie)
        check_scope(caller, *scopes)
        return caller

    def _authenticate(self, asked: Any, authorization: str | None = None, *, cookie: bool = False) -> Caller:
        """The caller: from here on it is the actor of what the request changes. ``authorization``: instead of the
        header. Raises Unauthorized, WrongOrigin."""
        here = _connection(asked)
        safe = asked.scope["type"] == "http" and asked.method in SAFE_METHODS  # a WebSocket's GET is not
        given = authorization or asked.headers.get("Authorization")
        if here is not None and here.trusted:
            check_local_browser(asked.headers.get, safe=safe)
            caller = LOCAL
        elif given is None and cookie and self._sessions is not None and (value := _session_cookie(asked)):
            check_origin(asked.headers.get, safe=safe)
            caller = self._sessions.caller(value, asked.headers.get("Host", ""))
        else:
            caller = self._verifier.caller(given)
        actor = asked.scope["hypeman.actor"] = actor_of(caller, here, _request_id(asked))
        set_actor(actor)
        return caller


def shadowed(operations: Sequence[Operation]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Paths without parameters that another operation's parameter would match, with the methods that they take, and
    those that are refused: ``DELETE /devices/available`` deletes no device of that name."""
    methods: dict[str, set[str]] = {}
    for operation in operations:
        methods.setdefault(operation.path, set()).add(operation.method)
    for path, own in methods.items():
        parts = path.split("/")
        others = [other.split("/") for other in methods if other != path]
        if "{" not in path and any(
            len(other) == len(parts) and all(a == b or b.startswith("{") for a, b in zip(parts, other, strict=True))
            for other in others
        ):
            yield path, sorted(own | {"HEAD"} if "GET" in own else own), sorted(_METHODS - own)


def methods_of(path: str, operations: Sequence[Operation]) -> list[str]:
    """The methods of the operations whose path, segment by segment, matches ``path`` best: the fixed one goes before a
    parameter. Empty if none does."""
    parts = path.split("/")
    best: dict[tuple[bool, ...], set[str]] = {}
    for operation in operations:
        template = operation.path.split("/")
        if len(template) == len(parts) and all(
            a == b or a.startswith("{") for a, b in zip(template, parts, strict=True)
        ):
            best.setdefault(tuple(part.startswith("{") for part in template), set()).add(operation.method)
    methods = best[min(best)] if best else set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _refusal(allowed: list[str]) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise MethodNotAllowed(valid_methods=allowed)

    return refuse


def _rule(path: str) -> str:
    """``/devices/{id}`` in Quart's syntax. Image names may also contain unencoded slashes."""
    for greedy in ("name", "rest"):
        path = path.replace(f"{{{greedy}}}", f"<path:{greedy}>")
    return path.replace("{", "<").replace("}", ">")


def _view(app: ApiApp, operation: Operation) -> Callable[..., Awaitable[Response]]:
    """The function that Quart calls for ``operation``."""
    decoder = None
    if operation.body not in (None, UploadStream):
        decoder = msgspec.json.Decoder(operation.body)
    limit = float("inf") if operation.unlimited else app.settings.request_timeout

    async def arguments(segments: dict[str, str], caller: Caller) -> tuple[dict[str, Any], bytes]:
        """The handler's arguments, and the body if it is JSON."""
        data = b""
        found: dict[str, Any] = {name: decode_segment(value) for name, value in segments.items()}
        if operation.query is not None:
            found["query"] = decode_query(request.query_string, operation.query)
        if operation.body is UploadStream:
            found["body"] = request.body
        elif decoder is not None:
            data = await _read_json_body(app.held_bodies)
            if data or operation.body_required:
                found["body"] = decode_body(data, decoder)
        if operation.takes_context:
            found["context"] = Context(caller, request.headers.get)
        request.scope["hypeman.names"] = named_in(found)  # type: ignore[typeddict-unknown-key]  # ours
        return found, data

    async def keyed(caller: Caller, key: str, segments: dict[str, str], calls: Calls) -> Reply:
        """The response to a call with an ``Idempotency-Key``."""
        given, data = await arguments(segments, caller)

        traceparent = request.headers.get(TRACEPARENT, "")

        async def work() -> Reply:
            try:
                with measured(operation, traceparent):
                    return reply_to(operation, await operation.handler(app.services, **given))
            except Exception as error:
                return failed(failure_from(error))

        asked = b"\0".join([request.method.encode(), request.path.encode(), request.query_string, data])
        detached = operation.body is not UploadStream
        return await calls.once(caller.subject, key, asked, operation, work, detached=detached)

    async def view(**segments: str) -> Response:
        failure = errors.TIMED_OUT
        with trio.move_on_after(limit):
            try:
                caller = app._admit(request, *operation.scopes, cookie=True) if operation.scopes else NOBODY
                key = request.headers.get(HEADER) if operation.method == "POST" else None
                if key is not None and app.calls is not None:
                    return _response(await keyed(caller, key, segments, app.calls))
                with measured(operation, request.headers.get(TRACEPARENT, "")):
                    given, _ = await arguments(segments, caller)
                    answer = await operation.handler(app.services, **given)
                if isinstance(answer, EventStream):
                    return _event_stream(operation, answer)
                return _response(reply_to(operation, answer))
            except Exception as error:
                failure = failure_from(error)
        return _response(failed(failure))

    return view


def _caught(view: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """``view`` with its failures as responses."""

    async def answer(**segments: str) -> Response:
        try:
            return await view(**segments)
        except Exception as error:
            return _response(failed(failure_from(error)))

    return answer


def _session_cookie(asked: Any) -> str:
    return str(asked.cookies.get(cookie_name(asked.headers.get("Host", "")), ""))


async def _read_json_body(held: _HeldBodies) -> bytes:
    """Read a JSON body. Raises BodyTooLarge, BodyTooSlow, TooManyBodies."""
    if (request.content_length or 0) > MAX_JSON_BODY:
        raise BodyTooLarge(f"the body is larger than {MAX_JSON_BODY} bytes")
    body = bytearray()
    try:
        with trio.fail_after(BODY_SECONDS):
            async for chunk in request.body:
                body += chunk
                held.bytes += len(chunk)
                if len(body) > MAX_JSON_BODY:
                    raise BodyTooLarge(f"the body is larger than {MAX_JSON_BODY} bytes")
                if held.bytes > MAX_JSON_BODIES:
                    raise TooManyBodies("too many requests with large bodies are under way; try again")
        return bytes(body)
    except trio.TooSlowError:
        raise BodyTooSlow(f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    finally:
        held.bytes -= len(body)


def _response(reply: Reply) -> Response:
    response = Response(reply.content, reply.status, reply.headers, content_type=reply.media_type)
    if not reply.media_type:
        del response.headers["Content-Type"], response.headers["Content-Length"]
    return response


def _event_stream(operation: Operation, answer: EventStream) -> Response:
    if (here := _connection(request)) is not None:
        here.streaming = True
    return Response(answer.chunks, operation.status, operation.headers, content_type="text/event-stream")


def _connection(asked: Any) -> Connection | None:
    """The connection of the request or websocket; None in tests without sockets."""
    found = asked.scope.get("state", {}).get("connection")
    return found if isinstance(found, Connection) else None


async def _answer_http_exception(error: HTTPException) -> Response:
    """Handle unknown routes and wrong methods."""
    status = error.code or 500
    headers = {}
    if status == 404:
        message = f"there is no {request.method} {request.path}" if has_request_context() else "there is no such stream"
    elif status == 405:
        others = set(getattr(error, "valid_methods", None) or ()) - {"OPTIONS"}  # Quart's, of the paths of WebSockets
        allowed = ", ".join(methods_of(request.path, OPERATIONS) or sorted(others))
        headers["Allow"] = allowed
        message = f"{request.path} takes {allowed}"
    elif isinstance(error, WebsocketMismatch):
        message = "this path is no WebSocket"
    else:
        message = error.description or ""
    return _response(failed(status_failure(status, message, headers)))


def _request_id(asked: Any) -> str:
    """The same for the whole request."""
    found = asked.scope.get("hypeman.request_id")
    if found is None:
        found = asked.scope["hypeman.request_id"] = exchange.request_id(asked.headers.get("X-Request-Id", ""))
    return str(found)


def _tell(asked: Any, method: str, status: int, seconds: float) -> None:
    actor, segments = asked.scope.get("hypeman.actor"), asked.view_args or {}
    subject = actor.subject if actor is not None else None
    log_request(
        method,
        _template(asked),
        status,
        seconds,
        _request_id(asked),
        segments,
        subject,
        _connection(asked),
        asked.scope.get("hypeman.names", ""),
    )


def _template(connection: Any) -> str:
    """The route's path template, never the requested path, to bound the number of metric series."""
    rule = connection.url_rule
    return rule.rule.replace("<path:", "{").replace("<", "{").replace(">", "}") if rule is not None else "unknown"
