"""A registry for tests: serves images, and misbehaves at the point a test chooses."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from tests.images.layout import ImageFiles, sha256


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Response:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Send only so many bytes of the body, and then:"""
    then: str = "close"
    """``close``, ``reset`` or ``stall``."""


Rule = Callable[[Request], Response | None]


class FaultyRegistry:
    """Answers every request by the first rule that applies, else as a registry should."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.rules: list[Rule] = []
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.host = ""

    def serve(self, repository: str, image: ImageFiles, tag: str = "latest") -> None:
        kind = image.manifest_document["mediaType"]
        for selector in (tag, image.digest):
            self.manifests[f"{repository}/{selector}"] = (image.manifest, str(kind))
        self.blobs.update(image.blobs)

    def serve_manifest(self, repository: str, document: object, media_type: str, tag: str = "latest") -> bytes:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        for selector in (tag, sha256(data)):
            self.manifests[f"{repository}/{selector}"] = (data, media_type)
        return data

    def blob_requests(self) -> list[Request]:
        return [request for request in self.requests if "/blobs/" in request.path]

    async def run(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.host = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        await trio.serve_listeners(self._connection, listeners, task_status=task_status)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            request = await _receive(stream)
            if request is None:
                return
            self.requests.append(request)
            answers = (rule(request) for rule in self.rules)
            await self._send(stream, next((answer for answer in answers if answer), None) or self._proper(request))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def _proper(self, request: Request) -> Response:
        if match := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", request.path):
            found = self.manifests.get(f"{match[1]}/{match[2]}")
            return Response(200, {"Content-Type": found[1]}, found[0]) if found else Response(404)
        if match := re.fullmatch(r"/v2/(.+)/blobs/([^/]+)", request.path):
            return serve_bytes(request, self.blobs.get(match[2]))
        return Response(404)

    async def _send(self, stream: trio.SocketStream, response: Response) -> None:
        headers = {"Content-Length": str(len(response.body)), "Connection": "close", **response.headers}
        head = f"HTTP/1.1 {response.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        body = response.body if response.cut is None else response.body[: response.cut]
        await stream.send_all(head.encode() + body)
        if response.cut is None:
            return
        if response.then == "stall":
            await trio.sleep_forever()
        if response.then == "reset":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def serve_bytes(request: Request, data: bytes | None) -> Response:
    if data is None:
        return Response(404)
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "")):
        start = int(match[1])
        return Response(206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
    return Response(200, {"Content-Type": "application/octet-stream"}, data)


async def _receive(stream: trio.SocketStream) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = await stream.receive_some(65536)
        if not chunk:
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += await stream.receive_some(65536)
    return Request(method, path, headers, body)
