"""HTTP/1.1 on one connection, towards a client or a guest: h11 with limits on every wait."""

from __future__ import annotations

import contextlib
import socket
import struct

import h11
import trio
from msgspec import Struct

from hypeman.ingress.tls import TlsStream

_CHUNK = 1 << 16
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 1 << 20


class Limits(Struct, frozen=True):
    """Seconds, bytes and numbers."""

    connections: int = 4096
    each: int = 2048
    """Connections of one client address (of IPv6: one /64)."""
    head_bytes: int = 64 << 10
    head: float = 30.0
    """For a client to send a head."""
    handshake: float = 15.0
    """For a client to complete a TLS handshake."""
    idle: float = 75.0
    """Between requests on one connection."""
    body: float = 60.0
    """For each piece of a body that a client sends or takes."""
    lookup: float = 5.0
    connect: float = 20.0
    """To a guest, which may have to be woken from standby."""
    answer: float = 120.0
    """For a guest to begin its response."""
    quiet: float = 3600.0
    """Between two pieces of a response that has begun, and in a connection that has changed its protocol."""


class Failed(Exception):
    """The connection is of no more use."""


class TimedOut(Failed):
    """The peer was silent."""


class Malformed(Failed):
    """What came is not HTTP; ``status`` for the response."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


Stream = trio.SocketStream | TlsStream


class Side:
    """One end of the exchange."""

    def __init__(self, stream: Stream, role: type[h11.CLIENT] | type[h11.SERVER], limits: Limits) -> None:
        self.stream = stream
        self.http = h11.Connection(role, max_incomplete_event_size=limits.head_bytes)
        self._head_bytes = limits.head_bytes
        self.has_begun = False
        """Something came from the peer since the last request."""
        self.is_cut = False
        """A message was sent in part."""

    async def send(self, event: h11.Event, seconds: float) -> None:
        """Raises Failed."""
        try:
            data = self.http.send(event)
        except h11.LocalProtocolError as error:
            raise Failed(str(error)) from None
        if data:
            await self.send_raw(data, seconds)

    async def send_raw(self, data: bytes, seconds: float) -> None:
        self.is_cut = True
        try:
            with trio.fail_after(seconds):
                await self.stream.send_all(data)
        except trio.TooSlowError:
            raise TimedOut("it does not read") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Failed(str(error)) from None
        self.is_cut = False

    async def receive_raw(self, seconds: float) -> bytes:
        try:
            with trio.fail_after(seconds):
                data = bytes(await self.stream.receive_some(_CHUNK))
        except trio.TooSlowError:
            raise TimedOut("it is silent") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Failed(str(error)) from None
        self.has_begun = self.has_begun or bool(data)
        return data

    async def next_event(self, seconds: float) -> h11.Event | type[h11.PAUSED]:
        """Waits at most ``seconds`` for each piece. Raises Failed."""
        while True:
            try:
                event = self.http.next_event()
            except h11.RemoteProtocolError as error:
                raise Malformed(str(error), error.error_status_hint) from None
            if event is not h11.NEED_DATA:
                if isinstance(event, h11.Request | h11.Response | h11.InformationalResponse):
                    self._check_length(event)
                return event  # type: ignore[return-value]
            self.http.receive_data(await self.receive_raw(seconds))

    def _check_length(self, head: h11.Request | h11.Response | h11.InformationalResponse) -> None:
        """h11 bounds heads that are not complete yet, and complete ones only roughly."""
        if sum(len(name) + len(value) + 4 for name, value in head.headers) > self._head_bytes:
            raise Malformed("the head is too long", 431)

    def discard_received(self) -> None:
        """Skip what is here already of the body, so that a connection can be kept whose request is complete."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while self.http.their_state is h11.SEND_BODY and isinstance(self.http.next_event(), h11.Data):
                pass

    def leftover(self) -> bytes:
        """What came after the last message."""
        return bytes(self.http.trailing_data[0])

    def is_reusable(self) -> bool:
        return not self.is_cut and self.http.our_state is h11.DONE and self.http.their_state is h11.DONE

    def is_quiet(self) -> bool:
        """Whether the peer has neither sent something nor closed the connection. Without waiting; plain TCP only."""
        assert isinstance(self.stream, trio.SocketStream)
        inner = socket.socket(fileno=self.stream.socket.fileno())
        try:
            inner.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            inner.detach()
        return False

    async def close(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LINGER_SECONDS):
            await self.stream.aclose()

    async def close_after_reading(self) -> None:
        """So that what was sent reaches a peer that is still sending."""
        with trio.move_on_after(_LINGER_SECONDS), contextlib.suppress(Failed, trio.BrokenResourceError):
            if isinstance(self.stream, trio.SocketStream):
                await self.stream.send_eof()
            else:
                await self.stream.send_close()
            left = _LINGER_BYTES
            while left > 0 and (data := await self.receive_raw(_LINGER_SECONDS)):
                left -= len(data)
        await self.close()

    async def reset(self) -> None:
        """Close so that the peer sees that the message is not whole."""
        stream = self.stream if isinstance(self.stream, trio.SocketStream) else self.stream.transport_stream
        with contextlib.suppress(OSError):
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.close()


async def tunnel(one: Side, other: Side, seconds: float) -> tuple[int, int]:
    """Copy bytes both ways until both have ended or one has failed; how many went from ``one``, and from ``other``."""
    counts = [0, 0]

    async def copy(number: int, source: Side, target: Side, first: bytes) -> None:
        try:
            if first:
                counts[number] += len(first)
                await target.send_raw(first, seconds)
            while data := await source.receive_raw(seconds):
                counts[number] += len(data)
                await target.send_raw(data, seconds)
            if isinstance(target.stream, trio.SocketStream):
                await target.stream.send_eof()
            else:
                nursery.cancel_scope.cancel()  # TLS has no end of one direction
        except (Failed, trio.BrokenResourceError, trio.ClosedResourceError):
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy, 0, one, other, one.leftover())
        nursery.start_soon(copy, 1, other, one, other.leftover())
    return counts[0], counts[1]
