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
import select
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from math import inf
from types import coroutine
from typing import Any, TypeVar

import h11
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

from hypeman.server import errors
from hypeman.server.connection import Connection
from hypeman.server.decode import decode_segment
from hypeman.server.exchange import DISCONNECTED, JSON, Reply, failed, failure_from, log_request, request_id
from hypeman.server.heads import END, Headers, Upgrade, plain_headers, upgrade_headers
from hypeman.server.plain_call import PlainCall, authenticate
from hypeman.server.plain_h2 import PlainH2
from hypeman.server.plain_routes import Found, FoundSocket, PlainRoutes
from hypeman.server.websocket import WebSocket, accept_key
from hypeman.tokens import check_scope

_Result = TypeVar("_Result")

_CLOSE = "connection: close\r\n"
_VERSION = b" HTTP/1.1"


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
        self._last = False
        """The client asked to close the connection after the response to its request."""
        self._request_id = ""
        self._subject: str | None = None
        """Of a WebSocket's client, once authenticated."""

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
        wrapper = _Protocols(
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
        wrapper.plain = None if self._routes is None else (self._routes, self._connection)
        wrapper.protocol = _Http1(
            self.app,
            self.config,
            self.context,
            self._task_group,
            wrapper.state,
            False,
            client,
            server,
            wrapper.protocol.send,
        )
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
                # Asked again: another task may have closed it since, and its number be a newer connection's.
                return os.read(self.stream.socket.fileno(), MAX_RECV)
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
            self._last = request[1].last
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
        assert self._routes is not None
        call = PlainCall(self._routes, self._connection, found, headers, body)
        self._request_id = call.request_id
        status = DISCONNECTED
        try:
            reply = await call.reply(lambda handler: _begin(handler, lambda: self._watch(found.limit)))
            self._stop_watching()
            if self._work.cancel_called:  # after the answer, but before it was noticed
                await trio.lowlevel.checkpoint_if_cancelled()
            status = reply.status
            return reply
        except trio.Cancelled:
            if self._timed_out:
                status = errors.TIMED_OUT.status
            raise
        finally:
            self._stop_watching()
            call.log(status)

    async def _carry(self, found: FoundSocket, upgrade: Upgrade, unread: bytes) -> None:
        """A whole WebSocket."""
        started, status = time.perf_counter(), 101
        route, self._unread, self._connection.idle_until = found.route, b"", inf
        self._request_id, self._subject = request_id(upgrade.request_id), None
        response = (
            f"HTTP/1.1 101 \r\nsec-websocket-accept: {accept_key(upgrade.key)}\r\nupgrade: WebSocket\r\n"
            f"connection: Upgrade\r\n{_common_headers(self.config)}\r\n"
        )
        socket = WebSocket(self.stream.socket, response.encode("latin1"), unread, self._stop_watching)
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
            caller = authenticate(self._routes, self._connection, upgrade.authorization, self._request_id)
            self._subject = caller.subject
            check_scope(caller, found.route.scope)
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
        if (number := self.stream.socket.fileno()) >= 0:
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(number)
        if (number := self.stream.socket.fileno()) < 0:  # another task has closed it
            return
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
        last = self._count_answer() or self._last
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


class _Protocols(ProtocolWrapper):
    """Hypercorn's, but for what speaks HTTP/2."""

    plain: tuple[PlainRoutes, Connection] | None

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as assumed:
            await self._switch(assumed.data)
        except H2CProtocolRequiredError as required:
            await self._switch(required.data, required.headers, required.settings)

    async def _switch(
        self, data: bytes, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        self.protocol = PlainH2(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )
        self.protocol.plain = self.plain
        await self.protocol.initiate(headers, settings)
        if data:
            await self.protocol.handle(RawData(data))


_NOT_HTTP = {
    431: "the head of the request is too large",
    501: "of the transfer codings only chunked is supported",
}


class _Http1(H11Protocol):
    """Hypercorn's, but with the error body for what is not HTTP, and it refuses two lengths for one body."""

    async def _create_stream(self, request: h11.Request) -> None:
        """Refuse what a proxy in front may read as another request (RFC 9112 §6.1)."""
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            await self._send_error_response(400)
            await self.send(Closed())
        else:
            await super()._create_stream(request)

    async def _send_error_response(self, status_code: int) -> None:
        content = errors.status_failure(
            status_code, _NOT_HTTP.get(status_code, "the request is not valid HTTP")
        ).encode()
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            *self.config.response_headers("h11"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=content))
        await self._send_h11_event(h11.EndOfMessage())


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
