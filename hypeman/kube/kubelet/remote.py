"""exec on this host's server: its WebSocket, as a client of Trio. wsproto implements the protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
import trio
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

from hypeman.kube.local import LocalServer, LocalUnreachable, refusal
from hypeman.urls import segment

OPEN_SECONDS = 30.0
_READ = 64 * 1024
_MAX_REFUSAL = 64 * 1024


class Exec:
    """A program in a guest: ``receive`` and ``send`` may run at the same time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._events: deque[Any] = deque()
        self._sending = trio.Lock()

    async def open(self, host: str, target: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises LocalRefused, LocalUnreachable."""
        await self._send_event(Request(host=host, target=target, extra_headers=headers))
        event = await self._next()
        if isinstance(event, RejectConnection):
            raise refusal("GET", target, event.status_code, await self._refusal_body() if event.has_body else b"")
        if not isinstance(event, AcceptConnection):
            raise LocalUnreachable("the server did not open the stream")

    async def send(self, data: str | bytes) -> None:
        """A string is text; empty bytes are the end of standard input. Raises LocalUnreachable."""
        event: Message[Any] = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
        await self._send_event(event)

    async def receive(self) -> str | bytes | None:
        """The next message; None once the server has closed. Raises LocalUnreachable."""
        parts: list[Any] = []
        while True:
            event = await self._next()
            if isinstance(event, CloseConnection):
                return None
            if isinstance(event, Ping):
                await self._send_event(event.response())
            if isinstance(event, Message):
                parts.append(event.data if isinstance(event.data, str) else bytes(event.data))
                if event.message_finished:
                    return parts[0][:0].join(parts)  # type: ignore[no-any-return]

    async def _refusal_body(self) -> bytes:
        body = b""
        while isinstance(event := await self._next(), RejectData) and len(body) < _MAX_REFUSAL:
            body += bytes(event.data)
            if event.body_finished:
                break
        return body

    async def _next(self) -> Any:
        try:
            while not self._events:
                data = await self._stream.receive_some(_READ)
                if not data:
                    raise LocalUnreachable("the server closed the stream")
                self._connection.receive_data(bytes(data))
                self._events.extend(self._connection.events())
        except (ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LocalUnreachable(f"the connection failed: {error}") from None
        return self._events.popleft()

    async def _send_event(self, event: Any) -> None:
        try:
            async with self._sending:
                await self._stream.send_all(self._connection.send(event))
        except (ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LocalUnreachable(f"the connection failed: {error}") from None


@asynccontextmanager
async def open_exec(local: LocalServer, instance_id: str, request: dict[str, Any]) -> AsyncIterator[Exec]:
    """A program in the guest of an instance. Raises LocalRefused, LocalUnreachable."""
    async with AsyncExitStack() as stack:
        try:
            with trio.fail_after(OPEN_SECONDS):
                stream = await _connect(local)
                stack.push_async_callback(trio.aclose_forcefully, stream)  # which ends a program that still runs
                program = Exec(stream)
                headers = [(name.encode(), value.encode()) for name, value in local.headers.items()]
                url = urlsplit(local.base_url)
                await program.open(url.netloc, f"{url.path}/instances/{segment(instance_id)}/exec", headers)
                await program.send(msgspec.json.encode(request).decode())
        except trio.TooSlowError:
            raise LocalUnreachable(f"exec: no answer in {OPEN_SECONDS:g} s") from None
        except OSError as error:
            raise LocalUnreachable(f"exec: {error}") from None
        yield program


async def _connect(local: LocalServer) -> trio.abc.Stream:
    if local.socket is not None:
        return await trio.open_unix_socket(local.socket)
    url = urlsplit(local.base_url)
    host = url.hostname or ""
    if url.scheme == "https":
        return await trio.open_ssl_over_tcp_stream(host, url.port or 443, https_compatible=True)
    return await trio.open_tcp_stream(host, url.port or 80)
