"""A WebSocket that the connection's own task carries (plain.py): no task and no queue between client and handler.

The handler reads when it asks for a message; one that is not asked for stays in the kernel, and holds back its client.
While the handler only sends, each send also looks for control frames, so that pings are answered and a client that
closes is noticed. When the client closes or disconnects, ``scope`` is cancelled, and the handler with it.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha1

import trio

from hypeman.server.frames import (
    BINARY,
    CLOSE,
    NORMAL,
    PING,
    PONG,
    TEXT,
    Control,
    Decoder,
    Received,
    Violation,
    close_answer,
    head_of,
)

MAX_MESSAGE = 2**20
"""Bytes of a message of the client."""
_READ = 2**16
_READ_MORE = 2**18
"""Bytes of the next read from a client that sends faster than it is read."""
_MAX_UNSENT = 8
"""Frames that may wait for a client which does not read; its pings are not answered then."""
_LINGER = 1.0
"""Seconds for a client that broke the protocol to read why, before the connection is closed."""
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accept_key(key: bytes) -> str:
    """The proof that a WebSocket is accepted (RFC 6455 §4.2.2)."""
    return b64encode(sha1(key + _MAGIC, usedforsecurity=False).digest()).decode("ascii")


class WebSocket:
    """Implements ``Socket`` of streams.py.

    Several tasks may send, one may receive. A send that is cancelled may be followed by others: its rest goes first.
    """

    def __init__(
        self, socket: trio.socket.SocketType, response: bytes, unread: bytes, on_accept: Callable[[], None]
    ) -> None:
        """``response`` accepts the WebSocket; ``unread`` came behind the request."""
        self.scope = trio.CancelScope()
        self.accepted = False
        self._socket = socket
        """Its number is asked for each time: once it is closed, a newer connection may have it."""
        self._response = response
        self._on_accept = on_accept
        self._decoder = Decoder(MAX_MESSAGE)
        self._unread = unread
        self._read_size = _READ
        self._messages: deque[str | bytes] = deque()
        self._unsent: deque[bytes | memoryview] = deque()
        self._sending = trio.Lock()
        self._receiving = False
        self._closed = False
        """We sent a close frame, or the peer is gone."""
        self._violated = False

    async def receive(self) -> str | bytes:
        """The next message. Does not return once the client has gone: the caller is cancelled."""
        await self._accept()
        self._receiving = True
        try:
            while not self._messages:
                await self._wait_client()
                await self._wait_socket(trio.lowlevel.wait_readable)
                self._read()
        finally:
            self._receiving = False
        return self._messages.popleft()

    async def send(self, data: str | bytes) -> None:
        """Waits while the client does not read."""
        await self._accept()
        if not self._receiving and not self._messages:
            self._read()
        await self._wait_client()
        if isinstance(data, str):
            await self._send(TEXT, data.encode())
        else:
            await self._send(BINARY, data)

    async def close(self, code: int = NORMAL) -> None:
        if self.accepted and not self._closed:
            await self._send(CLOSE, code.to_bytes(2))
            self._closed = True

    async def aclose(self) -> None:
        """After the handler has ended, which need not have closed."""
        await self.close()
        if self._violated:
            with trio.move_on_after(_LINGER):
                while self._receive_some() is not None:
                    await self._wait_socket(trio.lowlevel.wait_readable)

    async def _accept(self) -> None:
        if not self.accepted:
            self.accepted = True
            self._on_accept()
            await self._write(self._response)
            self._take(self._unread)

    async def _wait_client(self) -> None:
        """Return if the client is there."""
        if self.scope.cancel_called:
            await trio.sleep_forever()  # the scope ends this, or a shielded one inside of it

    async def _wait_socket(self, wait: Callable[[int], Awaitable[None]]) -> None:
        """Return at once if another task has closed the socket, or does so meanwhile: the next look finds that."""
        if (number := self._socket.fileno()) >= 0:
            with suppress(trio.ClosedResourceError):
                await wait(number)

    def _read(self) -> None:
        """Take what has arrived, if anything has."""
        data = self._receive_some()
        if data is None:
            self._end()
        elif data:
            self._read_size = _READ_MORE if len(data) == self._read_size else _READ
            self._take(data)

    def _receive_some(self) -> bytes | None:
        """What has arrived, which may be nothing; None if the client has disconnected."""
        try:
            return os.read(self._socket.fileno(), self._read_size) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def _take(self, data: bytes) -> None:
        try:
            for received in self._decoder.feed(data):
                self._take_one(received)
        except Violation as violation:
            self._violated = True
            self._answer(CLOSE, violation.code.to_bytes(2))
            self._end()

    def _take_one(self, received: Received) -> None:
        if not isinstance(received, Control):
            self._messages.append(received)
        elif received.kind == PING and len(self._unsent) < _MAX_UNSENT:
            self._answer(PONG, received.payload)
        elif received.kind == CLOSE:
            self._answer(CLOSE, close_answer(received.payload))
            self._end()

    def _answer(self, kind: int, payload: bytes) -> None:
        """Send at once, or before the next frame."""
        if not self._closed:
            self._unsent.append(head_of(kind, len(payload)) + payload)
            self._write_some()

    def _end(self) -> None:
        self._closed = True
        self.scope.cancel()

    async def _send(self, kind: int, payload: bytes) -> None:
        if not self._closed:
            await self._write(head_of(kind, len(payload)), payload)

    async def _write(self, *parts: bytes) -> None:
        self._unsent.extend(parts)
        if not self._write_some():
            async with self._sending:
                while not self._write_some():
                    await self._wait_socket(trio.lowlevel.wait_writable)

    def _write_some(self) -> bool:
        """Write as much as the socket takes; whether that was everything, or the peer is gone."""
        while self._unsent:
            try:
                sent = os.writev(self._socket.fileno(), self._unsent)
            except BlockingIOError:
                return False
            except OSError:
                self._unsent.clear()
                self._end()
                return True
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.popleft())
            if sent:
                self._unsent[0] = memoryview(self._unsent[0])[sent:]
        return True
