"""Connections to ports of a guest, over one WebSocket.

Two protocols, chosen by the client:

- ``v4.channel.k8s.io``: the ports are in the query; each has a data and an error channel (2·n and 2·n+1), whose first
  message from the server is the port.
- ``SPDY/3.1+portforward.k8s.io``: the messages carry a SPDY connection (``spdy.py``). The client opens an error and a
  data stream for each connection, which name its port (kubectl).

A guest is reached by its address, as the server's own ingresses reach it. A connection that cannot be opened is
reported on its error channel.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import trio

from hypeman.kube.kubelet import spdy

V4 = "v4.channel.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
CONNECT_SECONDS = 30.0
MAX_STREAMS = 512
_READ = 32 * 1024

Dial = Callable[[int], Awaitable[trio.SocketStream]]
"""Connects with a port of the guest. Raises OSError."""


class Messages(Protocol):
    """A WebSocket that was accepted; binary messages only."""

    async def receive(self) -> bytes | None:
        """None once the client is gone."""

    async def send(self, data: bytes) -> None: ...


def choose(offered: list[str]) -> str:
    """The protocol of those that a client offers; empty if there is none."""
    return next((each for each in (TUNNEL, V4) if each in offered), "")


async def dial_port(address: str, port: int) -> trio.SocketStream:
    """Raises OSError, also if it takes longer than ``CONNECT_SECONDS``."""
    try:
        with trio.fail_after(CONNECT_SECONDS):
            return await trio.open_tcp_stream(address, port)
    except trio.TooSlowError:
        raise OSError(f"no answer in {CONNECT_SECONDS:g} s") from None


async def forward_channels(messages: Messages, ports: tuple[int, ...], dial: Dial) -> None:
    """``v4.channel.k8s.io``, until the client is gone."""
    connections: list[trio.SocketStream | None] = []
    async with trio.open_nursery() as nursery:
        for number, port in enumerate(ports):
            for channel in (2 * number, 2 * number + 1):
                await messages.send(bytes([channel]) + struct.pack("<H", port))
            try:
                stream = await dial(port)
            except OSError as error:
                connections.append(None)
                await messages.send(bytes([2 * number + 1]) + _message(port, error))
                continue
            connections.append(stream)
            nursery.start_soon(_copy_out, stream, messages, 2 * number)
        try:
            while (data := await messages.receive()) is not None:
                number, odd = divmod(data[0] if data else 1, 2)
                stream_of = connections[number] if not odd and number < len(connections) else None
                if stream_of is not None and len(data) > 1:
                    await _send(stream_of, data[1:])
        finally:
            nursery.cancel_scope.cancel()
            for connection in connections:
                if connection is not None:
                    await trio.aclose_forcefully(connection)


async def _copy_out(stream: trio.SocketStream, messages: Messages, channel: int) -> None:
    while data := await _receive(stream):
        await messages.send(bytes([channel]) + data)


@dataclass(eq=False)
class _Stream:
    """A data stream of the client."""

    given: trio.MemorySendChannel[bytes]
    """What the client sends."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Around its connection with the guest."""


class Tunnel:
    """``SPDY/3.1+portforward.k8s.io`` on one WebSocket."""

    def __init__(self, messages: Messages, dial: Dial) -> None:
        self._messages = messages
        self._dial = dial
        self._framer = spdy.Framer()
        self._errors: dict[str, int] = {}
        """Error streams whose data stream has not been opened yet, by request."""
        self._open_streams: dict[int, _Stream] = {}
        self._newest = 0
        """Numbers of streams grow (§2.3.2); one that comes again is refused."""
        self._sending = trio.Lock()

    async def run(self) -> None:
        """Until the client is gone. Raises spdy.Malformed."""
        async with trio.open_nursery() as nursery:
            while (data := await self._messages.receive()) is not None:
                for frame in self._framer.feed(data):
                    await self._take(frame, nursery)
            nursery.cancel_scope.cancel()

    async def _take(self, frame: spdy.Frame, nursery: trio.Nursery) -> None:
        match frame:
            case spdy.SynStream():
                await self._open(frame, nursery)
            case spdy.Data(stream=number):
                if (opened := self._open_streams.get(number)) is not None:
                    await self._give(opened.given, frame)
            case spdy.Reset(stream=number):
                if (opened := self._open_streams.get(number)) is not None:
                    opened.scope.cancel()
            case spdy.Ping():
                await self._send(self._framer.render_ping(frame.id))

    async def _give(self, channel: trio.MemorySendChannel[bytes], frame: spdy.Data) -> None:
        try:
            if frame.data:
                await channel.send(frame.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the guest has closed, and its end was sent; or the client had
        if frame.fin:
            channel.close()

    async def _open(self, frame: spdy.SynStream, nursery: trio.Nursery) -> None:
        kind, request = frame.headers.get("streamtype", ""), frame.headers.get("requestid", "")
        port = frame.headers.get("port", "")
        valid = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
        valid = valid and frame.stream > self._newest
        if kind not in ("data", "error") or not valid or len(self._open_streams) + len(self._errors) >= MAX_STREAMS:
            await self._send(self._framer.render_reset(frame.stream, spdy.REFUSED))
            return
        self._newest = frame.stream
        await self._send(self._framer.render_reply(frame.stream))
        if kind == "error":
            self._errors[request] = frame.stream
            return
        given, receive = trio.open_memory_channel[bytes](1)
        opened = self._open_streams[frame.stream] = _Stream(given)
        nursery.start_soon(self._connect, frame.stream, opened, self._errors.pop(request, 0), int(port), receive)

    async def _connect(
        self, number: int, opened: _Stream, errors: int, port: int, given: trio.MemoryReceiveChannel[bytes]
    ) -> None:
        """One connection with the guest, from its first to its last byte; ``errors`` is its error stream, or 0."""
        problem = b""
        with opened.scope, given:
            try:
                stream = await self._dial(port)
            except OSError as error:
                problem = _message(port, error)
            else:
                async with stream, trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy_in, stream, given)
                    while data := await _receive(stream):
                        await self._send(self._framer.render_data(number, data))
                    nursery.cancel_scope.cancel()
        del self._open_streams[number]
        await self._send(self._framer.render_data(number, b"", fin=True))
        if errors:
            await self._send(self._framer.render_data(errors, problem, fin=True))

    @staticmethod
    async def _copy_in(stream: trio.SocketStream, given: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in given:
            await _send(stream, data)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_eof()

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await self._messages.send(data)


async def _receive(stream: trio.SocketStream) -> bytes:
    """Nothing at the end, however it comes."""
    try:
        return bytes(await stream.receive_some(_READ))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return b""


async def _send(stream: trio.SocketStream, data: bytes) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # its end is seen by the reader
        await stream.send_all(data)


def _message(port: int, error: OSError) -> bytes:
    return f"port {port} of the guest: {error.strerror or error}".encode()
