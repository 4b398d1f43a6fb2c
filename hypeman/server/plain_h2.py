"""Plain requests over HTTP/2: those without a body, each answered by one task of its own.

Hypercorn reads and writes the frames; its stream, its queue to the application and Quart's two tasks are left out. A
client that resets the stream or disconnects cancels the handler, as over HTTP/1.1 (plain.py).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import h2.events
import h2.exceptions
import trio
from hypercorn.protocol.events import Body, EndBody, Event, Response, StreamClosed
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from priority.priority import DuplicateStreamError, MissingStreamError

from hypeman.server import errors
from hypeman.server.connection import Connection
from hypeman.server.exchange import DISCONNECTED, Reply, failed
from hypeman.server.heads import h2_headers
from hypeman.server.plain_call import PlainCall
from hypeman.server.plain_routes import PlainRoutes

_CLOSED = (h2.exceptions.ProtocolError, MissingStreamError, KeyError)
"""What h2 and Hypercorn raise for a stream that its client has closed meanwhile."""


class _PlainStream:
    """Stands among Hypercorn's streams for a request that this module answers."""

    idle = False

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    async def handle(self, event: Event) -> None:
        if isinstance(event, StreamClosed):
            self.scope.cancel()


class PlainH2(H2Protocol):
    """Hypercorn's, which answers plain requests itself."""

    plain: tuple[PlainRoutes, Connection] | None
    """None: it answers none."""

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        if (call := self._plain_call(request)) is None:
            await super()._create_stream(request)
            return
        stream = _PlainStream()
        self.streams[request.stream_id] = stream  # type: ignore[assignment]
        self.task_group.spawn(self._answer, request.stream_id, stream, *call)
        self.keep_alive_requests += 1
        await self.context.mark_request()

    def _plain_call(self, request: h2.events.RequestReceived) -> tuple[PlainCall, float] | None:
        """The request if it is plain, and its time limit in seconds."""
        if self.plain is None or request.stream_ended is None or request.headers is None:
            return None
        routes, connection = self.plain
        pseudo: dict[Any, Any] = {name: value for name, value in request.headers if name.startswith(b":")}
        line = pseudo.get(b":method", b"") + b" " + pseudo.get(b":path", b"")
        headers = h2_headers(request.headers)
        if headers is None or (found := routes.find(line)) is None:
            return None
        return PlainCall(routes, connection, found, headers, b""), found.limit

    async def _answer(self, number: int, stream: _PlainStream, call: PlainCall, limit: float) -> None:
        status = DISCONNECTED
        with stream.scope:
            try:
                reply = failed(errors.TIMED_OUT)
                with trio.move_on_after(limit):
                    reply = await call.reply(lambda handler: handler)
                status = reply.status
            finally:
                call.log(status)
            with suppress(*_CLOSED):
                await self._send_reply(number, reply, call.request_id)
        await self.stream_send(StreamClosed(stream_id=number))

    async def _send_reply(self, number: int, reply: Reply, request_id: str) -> None:
        """At once if the client takes all of it, else as Hypercorn does, by turns with other streams."""
        headers = [(name.lower().encode("latin1"), value.encode("latin1")) for name, value in reply.headers.items()]
        if reply.media_type:
            headers.append((b"content-type", reply.media_type.encode("latin1")))
            headers.append((b"content-length", b"%d" % len(reply.content)))
        headers.append((b"x-request-id", request_id.encode("latin1")))
        room = min(self.connection.local_flow_control_window(number), self.connection.max_outbound_frame_size)
        if len(reply.content) <= room:
            head = [(b":status", b"%d" % reply.status), *headers, *self.config.response_headers("h2")]
            self.connection.send_headers(number, head, end_stream=not reply.content)
            if reply.content:
                self.connection.send_data(number, reply.content, end_stream=True)
            await self._flush()
            return
        self.stream_buffers[number] = StreamBuffer(self.context.event_class)
        with suppress(DuplicateStreamError):  # from a PRIORITY frame
            self.priority.insert_stream(number)
            self.priority.block(number)
        await self.stream_send(Response(stream_id=number, headers=headers, status_code=reply.status))
        await self.stream_send(Body(stream_id=number, data=reply.content))
        await self.stream_send(EndBody(stream_id=number))
