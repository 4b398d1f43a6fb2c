"""One exchange with a client of the kubelet's API, over ASGI: a response, a stream of bytes, or a WebSocket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.kube.api import ApiError
from hypeman.kube.local import LocalError, LocalRefused
from hypeman.server.connection import Connection
from hypeman.text import one_line

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

TEXT = "text/plain; charset=utf-8"


class Socket:
    """An accepted WebSocket."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send

    async def receive(self) -> bytes | None:
        """The next message; None once the client is gone."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            return None
        data = message.get("bytes")
        return data if data is not None else (message.get("text") or "").encode()

    async def send(self, data: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": data})

    async def close(self) -> None:
        await self._send({"type": "websocket.close", "code": 1000})


class Answer:
    """To one request; at most one of its methods begins it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._begun = False
        self._websocket = scope["type"] == "websocket"

    def header(self, name: bytes) -> str:
        """Lower case; empty if there is none."""
        found = next((value for key, value in self._scope["headers"] if key.lower() == name), b"")
        return str(found.decode("latin-1"))

    @property
    def connection(self) -> Connection | None:
        connection = (self._scope.get("state") or {}).get("connection")
        return connection if isinstance(connection, Connection) else None

    async def respond(self, body: bytes, media_type: str) -> None:
        await self._begin(200, media_type, len(body))
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, produce: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]]) -> None:
        """What ``produce`` writes, until it returns or the client is gone. Nothing is sent before the first byte, so a
        failure before it is an ordinary refusal."""

        async def write(data: bytes) -> None:
            if not self._begun:
                await self._begin(200, TEXT)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            self._never_ends()
            await produce(write)
            nursery.cancel_scope.cancel()
        if not self._begun:
            await self._begin(200, TEXT)
        await self._send({"type": "http.response.body", "body": b""})

    def offered(self) -> list[str]:
        """Protocols of a WebSocket. Raises InvalidRequest if the request is for none."""
        if not self._websocket:
            raise InvalidRequest(
                "this needs a WebSocket, which the API server uses to nodes that declare ExtendWebSocketsToKubelet: "
                "Kubernetes 1.36 or newer, and kubectl of the same age"
            )
        return list(self._scope["subprotocols"])

    async def accept(self, protocol: str) -> Socket:
        await self._receive()  # websocket.connect
        self._begun = True
        self._never_ends()
        await self._send({"type": "websocket.accept", "subprotocol": protocol})
        return Socket(self._receive, self._send)

    async def refuse(self, error: HypemanError) -> None:
        """Of no effect once the answer has begun: what was sent is all that there is."""
        if self._begun:
            return
        body = f"{one_line(error.message)}\n".encode()
        await self._begin(status_of(error), TEXT, len(body))
        kind = "websocket.http.response.body" if self._websocket else "http.response.body"
        await self._send({"type": kind, "body": body})

    async def _begin(self, status: int, media_type: str, length: int | None = None) -> None:
        self._begun = True
        headers = [(b"content-type", media_type.encode())]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        kind = "websocket.http.response.start" if self._websocket else "http.response.start"
        await self._send({"type": kind, "status": status, "headers": headers})

    def _never_ends(self) -> None:
        """Such an answer is not waited for when the program ends."""
        if (connection := self.connection) is not None:
            connection.streaming = True

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


def status_of(error: HypemanError) -> int:
    """The server's own refusal keeps its status; that a server does not answer is not the caller's fault."""
    if isinstance(error, LocalRefused):
        return error.http
    if isinstance(error, LocalError | ApiError):
        return 503
    return error.status
