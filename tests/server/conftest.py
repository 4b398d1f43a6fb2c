"""The application on fake capabilities, asked through Quart without a port and through a real connection.

A connection answers some requests itself (plain.py) and must not be distinguishable from Quart: what uses ``client``,
``ask`` or ``served`` runs both ways.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h11
import msgspec
import pytest
import trio
from werkzeug.datastructures import Headers

from hypeman.server.app import ApiApp, build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp, bind_unix
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    logs = tmp_path / "logs"
    logs.mkdir()
    return FakeWorld(logs)


@pytest.fixture
def app(world: FakeWorld) -> ApiApp:
    return build_app(world.services, ServerSettings(jwt_secret=SECRET))


@pytest.fixture
def headers() -> dict[str, str]:
    """Of a caller with all scopes."""
    return {"Authorization": f"Bearer {mint(SECRET, subject='tester')}"}


Ask = Callable[..., Any]


@pytest.fixture(params=["quart", "connection"])
async def client(request: pytest.FixtureRequest, app: ApiApp, nursery: trio.Nursery) -> Ask:
    """``await client("GET", "/instances", json=..., data=..., headers=...)``: the response."""
    if request.param == "quart":
        return lambda method, path, **options: app.test_client().open(path, method=method, **options)
    server = Server(app, plain=app.plain)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    await nursery.start(server.run, [listening], trio.Event())
    return SocketClient(listening.getsockname()).ask


@pytest.fixture
def ask(client: Ask, headers: dict[str, str]) -> Ask:
    """``client`` with a token."""

    async def request(method: str, path: str, **options: Any) -> Any:
        given = {**headers, **options.pop("headers", {})}
        return await client(method, path, headers=given, **options)

    return request


class SocketClient:
    """Sends what Quart's test client sends, and answers as its responses do."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    async def ask(
        self, method: str, path: str, *, json: Any = ..., data: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        given = {"Host": "localhost", **(headers or {})}
        if json is not ...:
            data = msgspec.json.encode(json)
            given["Content-Type"] = "application/json"
        if (data or json is not ...) and given.get("Content-Length") != "":
            given["Content-Length"] = str(len(data))
        elif given.pop("Content-Length", None) == "":  # a body of unknown length
            given["Transfer-Encoding"] = "chunked"
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        async with await trio.open_tcp_stream(*self._address) as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)

            nursery.start_soon(send)
            return await read_answer(stream)


class Answer:
    """One response, complete."""

    def __init__(self, status_code: int, headers: Headers, body: bytes) -> None:
        self.status_code = status_code
        self.headers = headers
        self.content_type = headers.get("Content-Type", "")
        self._body = body

    async def get_data(self, as_text: bool = False) -> Any:
        return self._body.decode() if as_text else self._body

    async def get_json(self) -> Any:
        return msgspec.json.decode(self._body)


async def read_answer(stream: trio.abc.ReceiveStream) -> Answer:
    """The next response on ``stream``: one with a length, one in chunks, or an event stream."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    head, body = None, b""
    while not isinstance(event := parser.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            parser.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
    assert head is not None
    headers = Headers([(name.decode(), value.decode()) for name, value in head.headers])
    return Answer(head.status_code, headers, body)


class Served:
    """The application on real sockets."""

    def __init__(self, port: int, socket_path: str, shutdown: trio.Event) -> None:
        self.port = port
        self.socket_path = socket_path
        self.shutdown = shutdown
        self.ended = trio.Event()


@pytest.fixture(params=["plain", "quart"])
async def served(request: pytest.FixtureRequest, app: ApiApp, tmp_path: Path) -> AsyncIterator[Served]:
    tcp = bind_tcp("127.0.0.1", 0)
    path = str(tmp_path / "hypeman.sock")
    served = Served(tcp[0].getsockname()[1], path, trio.Event())

    async def run(task_status: trio.TaskStatus[None]) -> None:
        server = Server(app, plain=app.plain if request.param == "plain" else None, grace=2.0)
        await server.run(tcp, served.shutdown, trusted=[bind_unix(path, mode=0o600)], task_status=task_status)
        served.ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run))
        yield served
        nursery.cancel_scope.cancel()
