"""What the connection's own task answers: plain requests, those of declared operations that neither stream nor upload,
and WebSockets.

    bytes → head (one look at its end, its request line, its header block) → operation and path parameters
          → authenticate → authorize → decode → handler → one send

Quart and Hypercorn spawn six tasks for a request and parse its head three times; for a look-up in memory that was
nine tenths of its cost. What is plain is decided narrowly: HTTP/1.1, head and body whole in one read, the body's length
given, none of the headers with which a client asks for more than a response. A WebSocket (websocket.py) must not ask
for extensions of the protocol. Everything else, also what is malformed or unknown, goes to Hypercorn and Quart unread,
on the same connection. Both share ``exchange.py``, and one suite runs through both (tests/server).

- The handler's first step runs at once. Only if it blocks, a second task watches: it cancels the handler when the
  client disconnects (log and metrics: 499) or the time limit ends (504).
- A request behind a plain one in the same read is next; one behind a request of Hypercorn's is Hypercorn's.
- A connection's keep-alive limit is a number that is moved, not a task: ``Server`` looks at the numbers (serve.py).
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from math import inf
from types import coroutine
from typing import Any, NamedTuple, TypeVar

import h11
import msgspec
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

from hypeman.actor import set_actor
from hypeman.server import errors
from hypeman.server.api import EventStream, Operation, UploadStream, WebSocketRoute
from hypeman.server.connection import Connection
from hypeman.server.decode import decode_body, decode_query, decode_segment
from hypeman.server.exchange import (
    DISCONNECTED,
    Reply,
    ServerSettings,
    actor_of,
    failed,
    failure_from,
    log_request,
    measured,
    named_in,
    reply_to,
    request_id,
)
from hypeman.server.heads import END, Headers, Upgrade, plain_headers, upgrade_headers
from hypeman.server.services import Services
from hypeman.server.websocket import WebSocket, accept_key
from hypeman.tokens import LOCAL, Scope, Verifier, check_scope

_Result = TypeVar("_Result")

_MAX_KNOWN = 1000
_MAX_KNOWN_LENGTH = 256
"""Bytes of a request target that is worth remembering."""
_CLOSE = "connection: close\r\n"
_VERSION = b" HTTP/1.1"
_REQUEST = re.compile(rb"([A-Z]+) (/[\w.~%:@!$&'()*+,;=/-]*(?:\?[\w.~%:@!$&'()*+,;=/?\[\]-]*)?)")


class Found(NamedTuple):
    """What a method and a request target mean."""

    operation: Operation
    decoder: msgspec.json.Decoder[Any] | None
    """For the body."""
    segments: Mapping[str, str]
    """Path parameters as the client wrote them."""
    query: bytes
    limit: float
    """Seconds."""


class FoundSocket(NamedTuple):
    """The WebSocket that a request target means."""

    route: WebSocketRoute
    segments: Mapping[str, str]


class PlainRoutes:
    """Those of ``operations`` that neither stream nor upload, found by request line, and ``sockets``; and what their
    answers need."""

    def __init__(
        self,
        operations: Iterable[Operation],
        sockets: Iterable[WebSocketRoute],
        services: Services,
        settings: ServerSettings,
        verifier: Verifier,
    ) -> None:
        self.services = services
        self.verifier = verifier
        self._limit = settings.request_timeout
        self._known: dict[bytes, Found | None] = {}
        self._templates: dict[tuple[str, int], list[_Template]] = {}
        self._sockets = [(tuple(route.path.split("/")[1:]), route) for route in sockets]
        self._fixed: dict[str, set[str]] = {}
        """Methods of paths without parameters; the others are not those of an operation whose parameter matches."""
        for operation in operations:
            parts = tuple(operation.path.split("/")[1:])
            if "{" not in operation.path:
                self._fixed.setdefault(operation.path, set()).add(operation.method)
            streams = operation.answer is EventStream or operation.body is UploadStream
            if not streams and not operation.takes_context and all(parts):
                decoder = None if operation.body is None else msgspec.json.Decoder(operation.body)
                of_this_length = self._templates.setdefault((operation.method, len(parts)), [])
                of_this_length.append(_Template(parts, operation, decoder))
        for templates in self._templates.values():  # a fixed segment goes before a parameter, from the left
            templates.sort(key=lambda each: [part.startswith("{") for part in each.parts])

    def find(self, line: bytes) -> Found | None:
        """The operation that ``line`` names, a request line without its version; None if Quart must decide."""
        try:
            return self._known[line]
        except KeyError:
            found = self._search(line)
        if len(line) <= _MAX_KNOWN_LENGTH:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[line] = found
        return found

    def _search(self, line: bytes) -> Found | None:
        match = _REQUEST.fullmatch(line)
        if match is None:
            return None
        path, _, query = match[2].partition(b"?")
        parts = path.decode("ascii").split("/")[1:]
        method = match[1].decode("ascii")
        if not all(parts) or method not in self._fixed.get(path.decode("ascii"), {method}):
            return None
        for template in self._templates.get((method, len(parts)), ()):
            if (segments := _segments(template.parts, parts)) is not None:
                limit = inf if template.operation.unlimited else self._limit
                return Found(template.operation, template.decoder, segments, query, limit)
        return None

    def find_socket(self, line: bytes) -> FoundSocket | None:
        """The WebSocket that ``line`` names; None if Quart must decide."""
        match = _REQUEST.fullmatch(line)
        if match is None or match[1] != b"GET":
            return None
        parts = match[2].partition(b"?")[0].decode("ascii").split("/")[1:]
        for template, route in self._sockets:
            if all(parts) and (segments := _segments(template, parts)) is not None:
                return FoundSocket(route, segments)
        return None


def _segments(template: Sequence[str], parts: Sequence[str]) -> dict[str, str] | None:
    """The path parameters if ``parts`` of a path are those of ``template``."""
    if len(template) != len(parts) or not all(
        name == part or name.startswith("{") for name, part in zip(template, parts, strict=True)
    ):
        return None
    return {name[1:-1]: part for name, part in zip(template, parts, strict=True) if name.startswith("{")}


class _Template(NamedTuple):
    parts: tuple[str, ...]
    operation: Operation
    decoder: msgspec.json.Decoder[Any] | None


class PlainConnection(TCPServer):
    """Hypercorn's connection, which answers plain requests itself."""

    def __init__(
        self,
        app: AppWrapper,
        config: HypercornConfig,
        context: WorkerContext,
        connection: Connection,
        state: ConnectionState,
        routes: PlainRoutes | None,
    ) -> None:
        super().__init__(app, config, context, state, connection.stream)  # type: ignore[arg-type]
        self.idle_task = _KeepAlive(connection, context, config.keep_alive_timeout)  # type: ignore[assignment]
        self._connection = connection
        self._routes = routes
        self._keep_alive = config.keep_alive_timeout
        self._hypercorn: ProtocolWrapper | None = None
        """Its protocol, once it was given anything."""
        self._answered = 0
        """Requests before that."""
        self._unread = b""
        """Received and neither answered nor given to Hypercorn."""
        self._ours = True
        """Hypercorn has been given nothing since it was last idle."""
        self._block = b""
        self._headers: Headers | None = None
        """What is in ``_block``: a client sends the same headers with each request."""
        self._work = trio.CancelScope()
        """Around everything; cancelled to cancel a handler, then replaced."""
        self._watching: trio.CancelScope | None = None
        self._timed_out = False
        self._request_id = ""
        self._subject: str | None = None
        """Of the caller, once authenticated."""
        self._names = ""
        """The object that the request names in its body or query."""

    async def run(self) -> None:
        """Hypercorn's, but for its protocol, which is made when it gets its first bytes."""
        try:
            async with TaskGroup() as self._task_group:
                await self.idle_task.restart(self._task_group, self._idle_timeout)
                await self._read_data()
        except OSError:
            pass
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        """Hypercorn's, but for a send that begins while the other task closes the connection, since the client did."""
        try:
            await super().protocol_send(event)
        except trio.BusyResourceError:
            await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        late: Reply | None = None
        while True:
            self._timed_out = False
            with trio.CancelScope() as self._work:
                try:
                    if late is None or await self._send(late):
                        await self._read_requests()
                except (trio.ClosedResourceError, trio.BrokenResourceError):
                    pass
                break
            if not self._timed_out:
                break
            late = failed(errors.TIMED_OUT)
        if self._hypercorn is not None:
            await self._hypercorn.handle(Closed())

    async def _give(self, data: bytes) -> None:
        """Let Hypercorn handle ``data``; none is the end of the stream."""
        if self._hypercorn is None:
            self.protocol = self._hypercorn = self._make_protocol()
        self._ours = False
        await self._hypercorn.handle(RawData(data))

    def _make_protocol(self) -> ProtocolWrapper:
        """What Hypercorn makes for each connection. Raises BrokenResourceError."""
        here = self.stream.socket
        try:
            client = parse_socket_addr(here.family, here.getpeername())
            server = parse_socket_addr(here.family, here.getsockname())
        except OSError:  # the client has disconnected
            raise trio.BrokenResourceError from None
        wrapper = ProtocolWrapper(
            self.app,
            self.config,
            self.context,
            self._task_group,
            ConnectionState(self.state),
            False,
            client,
            server,
            self.protocol_send,
        )
        assert isinstance(wrapper.protocol, H11Protocol)
        wrapper.protocol.keep_alive_requests = self._answered
        return wrapper

    async def _read_requests(self) -> None:
        """Until the connection ends. Raises ClosedResourceError, BrokenResourceError."""
        while True:
            if self._unread and self._is_ours():
                if not await self._answer():
                    return
                if (asked := self._next_socket()) is not None:
                    await self._carry(*asked)
                    return
            data, self._unread = self._unread, b""
            if data:
                await self._give(data)
            if not (data := await self._receive()):
                if self._hypercorn is not None:
                    await self._give(data)
                return
            self._unread = data

    async def _receive(self) -> bytes:
        """Received bytes; none at the end of the stream. Raises ClosedResourceError, BrokenResourceError."""
        while (number := self.stream.socket.fileno()) >= 0:
            await trio.lowlevel.wait_readable(number)
            try:
                return os.read(number, MAX_RECV)
            except BlockingIOError:
                continue
            except OSError:
                raise trio.BrokenResourceError from None
        raise trio.ClosedResourceError

    def _is_ours(self) -> bool:
        """Whether Hypercorn has nothing under way."""
        if not self._ours and self._routes is not None and self._hypercorn is not None:
            protocol = self._hypercorn.protocol
            self._ours = (
                isinstance(protocol, H11Protocol)
                and isinstance(connection := protocol.connection, h11.Connection)
                and connection.our_state is h11.IDLE
                and connection.their_state is h11.IDLE
                and not connection.trailing_data[0]
            )
        return self._ours

    async def _answer(self) -> bool:
        """Answer the plain requests at the beginning of what was received. False: the connection must end."""
        behind_another = False
        while (request := self._next()) is not None:
            if behind_another:
                self._connection.idle_until = inf
                await trio.lowlevel.checkpoint()  # others first: a read may hold a thousand requests
            behind_another = True
            if not await self._send(await self._exchange(*request)):
                return False
            if not self._unread:
                break
        return True

    def _next(self) -> tuple[Found, Headers, bytes] | None:
        """Take the next request and its body off what was received; None if it is not plain or not complete."""
        data, routes = self._unread, self._routes
        line, end = data.find(b"\r\n"), data.find(END)
        if routes is None or end < 0 or not data.endswith(_VERSION, 0, line):
            return None
        block = data[line + 2 : end + 2]
        if block != self._block:
            self._block, self._headers = block, plain_headers(block)
        headers = self._headers
        if headers is None or (found := routes.find(data[: line - len(_VERSION)])) is None:
            return None
        body = end + len(END)
        if len(data) < body + headers.length:
            return None
        self._unread = data[body + headers.length :]
        return found, headers, data[body : body + headers.length]

    def _next_socket(self) -> tuple[FoundSocket, Upgrade, bytes] | None:
        """The WebSocket that is asked for next, and what came behind its head; None if it is not one of ours."""
        data, routes = self._unread, self._routes
        line, end = data.find(b"\r\n"), data.find(END)
        if routes is None or end < 0 or not data.endswith(_VERSION, 0, line):
            return None
        upgrade = upgrade_headers(data[line + 2 : end + 2])
        if upgrade is None or (found := routes.find_socket(data[: line - len(_VERSION)])) is None:
            return None
        return found, upgrade, data[end + len(END) :]

    async def _exchange(self, found: Found, headers: Headers, body: bytes) -> Reply:
        started = time.perf_counter()
        self._request_id, self._subject, self._names = request_id(headers.request_id), None, ""
        status = DISCONNECTED
        try:
            reply = await self._reply(found, headers, body)
            status = reply.status
            return reply
        except trio.Cancelled:
            if self._timed_out:
                status = errors.TIMED_OUT.status
            raise
        finally:
            operation = found.operation
            log_request(
                operation.method,
                operation.path,
                status,
                time.perf_counter() - started,
                self._request_id,
                found.segments,
                self._subject,
                self._connection,
                self._names,
            )

    async def _reply(self, found: Found, headers: Headers, body: bytes) -> Reply:
        operation, routes = found.operation, self._routes
        assert routes is not None
        try:
            if operation.scopes:
                self._admit(headers.authorization, *operation.scopes)
            with measured(operation, headers.traceparent):
                arguments: dict[str, Any] = {name: decode_segment(value) for name, value in found.segments.items()}
                if operation.query is not None:
                    arguments["query"] = decode_query(found.query, operation.query)
                if found.decoder is not None and (body or operation.body_required):
                    arguments["body"] = decode_body(body, found.decoder)
                self._names = named_in(arguments)
                handler: Any = operation.handler(routes.services, **arguments)
                answer = await _begin(handler, lambda: self._watch(found.limit))
            return reply_to(operation, answer)
        except Exception as error:
            return failed(failure_from(error))
        finally:
            self._stop_watching()
            if self._work.cancel_called:  # after the answer, but before anybody knew
                await trio.lowlevel.checkpoint_if_cancelled()

    def _admit(self, authorization: str | None, *scopes: Scope) -> None:
        """Authenticate and authorize the caller. Raises Unauthorized, Forbidden."""
        assert self._routes is not None
        caller = LOCAL if self._connection.trusted else self._routes.verifier.caller(authorization)
        self._subject = caller.subject
        set_actor(actor_of(caller, self._connection, self._request_id))
        check_scope(caller, *scopes)

    async def _carry(self, found: FoundSocket, upgrade: Upgrade, unread: bytes) -> None:
        """A whole WebSocket."""
        started, status = time.perf_counter(), 101
        route, self._unread, self._connection.idle_until = found.route, b"", inf
        self._request_id, self._subject = request_id(upgrade.request_id), None
        response = (
            f"HTTP/1.1 101 \r\nsec-websocket-accept: {accept_key(upgrade.key)}\r\nupgrade: WebSocket\r\n"
            f"connection: Upgrade\r\n{_common_headers(self.config)}\r\n"
        )
        socket = WebSocket(self.stream.socket.fileno(), response.encode("latin1"), unread, self._stop_watching)
        try:
            with socket.scope:
                failure = await self._reply_on(socket, found, upgrade)
                if failure is not None and not socket.accepted:
                    status = failure.status
                    await self._send(failure)
            await socket.aclose()
        finally:
            log_request(
                "WS",
                route.path,
                status,
                time.perf_counter() - started,
                self._request_id,
                found.segments,
                self._subject,
                self._connection,
            )

    async def _reply_on(self, socket: WebSocket, found: FoundSocket, upgrade: Upgrade) -> Reply | None:
        """Let the handler use ``socket``; returns how it failed."""
        assert self._routes is not None
        try:
            self._admit(upgrade.authorization, found.route.scope)
            segments = [decode_segment(value) for value in found.segments.values()]
            handler: Any = found.route.handler(self._routes.services, socket, *segments)
            await _begin(handler, lambda: None if socket.accepted else self._watch(inf))
        except Exception as error:
            return failed(failure_from(error))
        finally:
            self._stop_watching()
        return None

    def _watch(self, limit: float) -> None:
        """Watch for the end of a handler that blocks."""
        self._connection.idle_until = inf
        self._watching = scope = trio.CancelScope()
        self._task_group.spawn(self._cancel_if_it_must_end, scope, limit)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _cancel_if_it_must_end(self, watching: trio.CancelScope, limit: float) -> None:
        if watching.cancel_called:  # the answer was quicker, and the socket is read for the next request already
            return
        with watching:
            with trio.move_on_after(limit):
                await self._wait_disconnect()
                self._work.cancel()
                return
            self._timed_out = True
            self._work.cancel()

    async def _wait_disconnect(self) -> None:
        """Return once the client has disconnected. Behind unread bytes that is not seen here, but by ``Server``."""
        number = self.stream.socket.fileno()
        await trio.lowlevel.wait_readable(number)
        hang_up = select.poll()
        hang_up.register(number, select.POLLRDHUP)
        if not hang_up.poll(0):  # the client's next request
            await trio.sleep_forever()

    def _count_answer(self) -> bool:
        """Count a plain answer; whether it is the last of this connection."""
        if self._hypercorn is None:
            self._answered = count = self._answered + 1
        else:
            protocol = self._hypercorn.protocol
            assert isinstance(protocol, H11Protocol)
            protocol.keep_alive_requests = count = protocol.keep_alive_requests + 1
        return count >= self.config.keep_alive_max_requests

    async def _send(self, reply: Reply) -> bool:
        """Send ``reply``. False: the connection must end. Raises ClosedResourceError, BrokenResourceError."""
        last = self._count_answer()
        head = self._head(reply, last)
        try:
            sent = os.writev(self.stream.socket.fileno(), (head, reply.content))
        except BlockingIOError:
            sent = 0
        except OSError:
            raise trio.BrokenResourceError from None
        if sent < len(head) + len(reply.content):
            self._connection.idle_until = inf
            rest = memoryview(head)[sent:] if sent < len(head) else b""
            if rest:
                await self.stream.send_all(rest)
            await self.stream.send_all(memoryview(reply.content)[max(0, sent - len(head)) :])
        if last or self.context.terminated.is_set():
            return False
        self._connection.idle_until = trio.current_time() + self._keep_alive
        return True

    def _head(self, reply: Reply, last: bool) -> bytes:
        """As Quart, Hypercorn and h11 write it between them."""
        more = "".join([f"{name.lower()}: {value}\r\n" for name, value in reply.headers.items()])
        if reply.media_type:
            more += f"content-type: {reply.media_type}\r\ncontent-length: {len(reply.content)}\r\n"
        return (
            f"HTTP/1.1 {reply.status} \r\n{more}x-request-id: {self._request_id}\r\n"
            f"{_common_headers(self.config)}{_CLOSE if last else ''}\r\n"
        ).encode("latin1")


_second = (0, "")
"""The last second for which the common headers were made, and the headers."""


def _common_headers(config: HypercornConfig) -> str:
    """What Hypercorn adds to each response: the date."""
    global _second
    now = int(time.time())
    second, text = _second
    if now != second:
        lines = [f"{name.decode()}: {value.decode()}\r\n" for name, value in config.response_headers("h11")]
        text = "".join(lines)
        _second = (now, text)
    return text


class _KeepAlive:
    """In place of Hypercorn's task for each time that a connection is idle: moves the deadline."""

    def __init__(self, connection: Connection, context: WorkerContext, seconds: float) -> None:
        self._connection = connection
        self._context = context
        self._seconds = seconds

    async def restart(self, task_group: Any, action: Any) -> None:
        if self._context.terminated.is_set():
            self._connection.close_idle()
        else:
            self._connection.idle_until = trio.current_time() + self._seconds

    async def stop(self) -> None:
        self._connection.idle_until = inf


@coroutine
def _begin(work: Coroutine[Any, Any, _Result], when_it_blocks: Callable[[], None]) -> Generator[Any, Any, _Result]:
    """Await ``work``; call ``when_it_blocks`` if its first step is not its last."""
    try:
        trap = work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    when_it_blocks()
    while True:
        try:
            try:
                sent = yield trap
            except BaseException as error:
                trap = work.throw(error)
            else:
                trap = work.send(sent)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
