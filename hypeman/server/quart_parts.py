"""Quart-Trio with changes that the server needs.

- The path is matched in its percent-encoded form: an image reference is one segment with its
  slashes encoded, and is decoded once, by the route.
- Buffering of a request body is bounded: a sender faster than the handler gets backpressure, so that
  an archive of 100 GB costs no more memory than one of 100 KB.
- The end of a response is not treated as a disconnect: that would cancel Hypercorn while it closes a
  connection that should be closed, which then stays open.
- A small response is two ASGI events instead of three.
"""

from __future__ import annotations

from typing import Any, cast

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart.wrappers import Request
from quart.wrappers.response import DataBody
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody

HIGH_WATER = 4 * 2**20
"""Bytes of a body that may be buffered; above the limit of a JSON body, which is read whole."""


class BoundedBody(TrioBody):
    """A body whose sender blocks while HIGH_WATER bytes are unread."""

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self._was_read = trio.Event()

    async def wait_room(self) -> None:
        while len(self._data) >= HIGH_WATER:
            self._was_read = trio.Event()
            await self._was_read.wait()

    async def __anext__(self) -> bytes:
        data = await super().__anext__()
        self._was_read.set()
        return data


class ApiRequest(TrioRequest):
    body_class = BoundedBody


class HttpConnection(TrioASGIHTTPConnection):
    _answered = False
    """The last event of the response was sent."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        _keep_raw_path(self.scope)
        await super().__call__(receive, send)

    async def handle_messages(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        body = cast(BoundedBody, request.body)
        while True:
            message = await receive()
            if message["type"] == "http.request":
                body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body.set_complete()
                await body.wait_room()
            elif message["type"] == "http.disconnect":
                break
        if not self._answered:
            nursery.cancel_scope.cancel()

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        headers = [(name.lower().encode("latin1"), value.encode("latin1")) for name, value in response.headers.items()]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        last = b""
        if isinstance(response.response, DataBody):
            last = response.response.data
        else:
            async with response.response as body:
                async for chunk in body:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._answered = True
        await send({"type": "http.response.body", "body": last, "more_body": False})


class WebsocketConnection(TrioASGIWebsocketConnection):
    async def handle_messages(self, nursery: trio.Nursery, receive: ASGIReceiveCallable) -> None:  # type: ignore[override]
        """Without Quart's signal for each message, which has no receiver."""
        while True:
            event = await receive()
            if event["type"] == "websocket.receive":
                await self.send_channel.send(event.get("bytes") or event["text"])  # type: ignore[arg-type]
            elif event["type"] == "websocket.disconnect":
                break
        nursery.cancel_scope.cancel()

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        _keep_raw_path(self.scope)
        await super().__call__(receive, send)


def _keep_raw_path(scope: Any) -> None:
    raw = scope.get("raw_path")
    if raw:
        scope["path"] = raw.decode("latin1")
