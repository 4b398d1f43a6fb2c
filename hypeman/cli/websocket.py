"""A WebSocket on a plain socket: wsproto implements the protocol, the caller decides when to read."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import ProtocolError

from hypeman.cli.client import ApiError, Client, Unreachable

T = TypeVar("T")

_READ = 64 * 1024
_BOOT_SECONDS = 60
"""For an instance that still boots."""
_BOOTING = ("Created", "Initializing", "Running")
"""States, after a refusal, of an instance that boots or has just booted."""


class WebSocket:
    """The client side. ``messages`` holds received messages; ``closed`` means that no more will arrive."""

    def __init__(self, client: Client, path: str) -> None:
        """Raises ApiError if the server refuses, Unreachable if there is none."""
        self.socket: socket.socket = client.dial()
        self.messages: deque[str | bytes] = deque()
        self.closed = False
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._partial: list[Any] = []
        self._path = path
        self._accepted = False
        self._refused: tuple[int, bytes] | None = None
        self._refusal = (0, bytearray())
        headers = [(name.encode(), value.encode()) for name, value in client.headers().items()]
        request = Request(host=client.host, target=client.prefix + path, extra_headers=headers)
        self.socket.sendall(self._connection.send(request))
        try:
            self._wait_accepted()
        except BaseException:
            self.close()
            raise

    def _wait_accepted(self) -> None:
        while not self._accepted:
            self.receive_some()
            if self._refused is not None:
                raise ApiError("GET", self._path, *self._refused)
            if self.closed and not self._accepted:
                raise Unreachable("the server closed the connection before the stream began")

    def encode(self, message: str | bytes) -> bytes:
        """The bytes to send for ``message``."""
        event = TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message)
        return self._connection.send(event)

    def send(self, message: str | bytes) -> None:
        """Send at once; blocks while the other side does not read."""
        try:
            self.socket.sendall(self.encode(message))
        except OSError as error:
            raise Unreachable(f"the connection failed: {error.strerror or error}") from None

    def receive(self) -> str | bytes | None:
        """The next message; None if the other side has closed."""
        while not self.messages and not self.closed:
            self.receive_some()
        return self.messages.popleft() if self.messages else None

    def receive_some(self) -> None:
        """One read from the socket, which may yield no message or several. Raises Unreachable."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            raise Unreachable(f"the connection failed: {error.strerror or error}") from None
        try:
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                self._take(event)
        except ProtocolError as error:
            raise Unreachable(f"the server does not speak WebSocket: {error}") from None
        if not data:
            self.closed = True

    def close(self) -> None:
        self.socket.close()

    def _take(self, event: Any) -> None:
        match event:
            case AcceptConnection():
                self._accepted = True
            case RejectConnection():
                self._refusal = (event.status_code, bytearray())
                self._refused = None if event.has_body else (event.status_code, b"")
            case RejectData():
                status, body = self._refusal
                body.extend(event.data)
                self._refused = (status, bytes(body)) if event.body_finished else None
            case Message():
                self._partial.append(event.data if isinstance(event.data, str) else bytes(event.data))
                if event.message_finished:
                    self.messages.append(self._partial[0][:0].join(self._partial))
                    self._partial = []
            case Ping():
                self.socket.sendall(self._connection.send(event.response()))
            case CloseConnection():
                self.closed = True


def open_stream(client: Client, instance: str, what: str) -> WebSocket:
    """The stream ``what`` of the instance at the path ``instance``, once that has booted. Raises ApiError."""
    return after_boot(client, instance, lambda: WebSocket(client, f"{instance}/{what}"))


def after_boot(client: Client, instance: str, ask: Callable[[], T]) -> T:
    """The result of ``ask``. If it is refused since the instance at the path ``instance`` still boots, as after
    `run -d`, wait for that and ask again."""
    try:
        return ask()
    except ApiError as error:
        if error.code != "invalid_state" or client.get(instance)["state"] not in _BOOTING:
            raise
    query = {"state": "Running", "timeout": f"{_BOOT_SECONDS}s"}
    client.call("GET", f"{instance}/wait", query=query, timeout=_BOOT_SECONDS + 10)
    return ask()
