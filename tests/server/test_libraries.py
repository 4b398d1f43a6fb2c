"""What the server uses of Hypercorn, Quart and Quart-Trio beyond their public interfaces.

When one of these fails after an upgrade, its name says which internal changed; the module in its docstring uses it.
The bounds in pyproject.toml keep an untested version from being installed.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
import trio.lowlevel
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from quart.wrappers.response import DataBody
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (TCPServer.__init__, ["app", "config", "context", "state", "stream"]),  # plain.py: PlainConnection
        (TCPServer._read_data, []),
        (
            ProtocolWrapper.__init__,  # plain.py: PlainConnection._make_protocol
            ["app", "config", "context", "task_group", "state", "ssl", "client", "server", "send", "alpn_protocol"],
        ),
        (TrioSingleTask.restart, ["task_group", "action"]),  # plain.py: _KeepAlive stands in for it
        (TrioSingleTask.stop, []),
        (TaskGroup.spawn, ["func", "args"]),
        (ASGIWrapper.__init__, ["app"]),  # serve.py: Server
        (TrioBody.__init__, ["expected_content_length", "max_content_length"]),  # quart_parts.py: BoundedBody
        (TrioASGIHTTPConnection.__call__, ["receive", "send"]),  # quart_parts.py: HttpConnection
        (TrioASGIHTTPConnection.handle_messages, ["nursery", "request", "receive"]),
        (TrioASGIHTTPConnection._send_response, ["send", "response"]),
        (TrioASGIWebsocketConnection.handle_messages, ["nursery", "receive"]),
        (TrioASGIWebsocketConnection.__call__, ["receive", "send"]),  # quart_parts.py: WebsocketConnection
        (QuartTrio.handle_request, ["request"]),  # app.py: ApiApp
        (QuartTrio.handle_websocket, ["websocket"]),
        (QuartTrio.handle_exception, ["error"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[1:] == parameters


@pytest.mark.parametrize("name", ["request_class", "asgi_http_class", "asgi_websocket_class"])
def test_quart_takes_our_classes(name: str) -> None:
    """app.py sets these class attributes; Quart would ignore one that was renamed."""
    assert hasattr(QuartTrio, name)


def test_a_request_makes_its_body_from_body_class() -> None:
    """quart_parts.py: ApiRequest sets it to BoundedBody."""
    assert hasattr(TrioRequest, "body_class")
    assert re.search(r"\bself\.body_class\(", inspect.getsource(TrioRequest.__init__))


async def test_a_body_keeps_unread_bytes_in_data() -> None:
    """quart_parts.py: BoundedBody holds back a sender by the length of ``_data``, which reading empties."""
    body = TrioBody(None, None)
    body.append(b"abc")
    assert len(body._data) == 3
    body.set_complete()
    with trio.fail_after(5):
        assert [bytes(chunk) async for chunk in body] == [b"abc"]
    assert len(body._data) == 0


def test_a_whole_answer_is_in_data() -> None:
    """quart_parts.py: HttpConnection sends a DataBody as one event."""
    assert DataBody(b"abc").data == b"abc"


async def test_a_worker_ends_by_its_terminated_event() -> None:
    """serve.py: Server._finish ends idle connections."""
    context = WorkerContext(None)
    with trio.fail_after(5):
        await context.terminated.set()
        await context.terminated.wait()


def test_a_connection_reads_and_times_through_what_is_replaced() -> None:
    """plain.py: PlainConnection has its own ``run``, ``_read_data`` and ``idle_task``; nothing else reads or times."""
    source = inspect.getsource(TCPServer)
    assert source.count("self.stream.receive_some(") == 1
    assert "self.stream.receive_some(" in inspect.getsource(TCPServer._read_data)
    assert len(re.findall(r"self\.idle_task\.(?:restart|stop)\(", source)) == 3
    run = inspect.getsource(TCPServer.run)
    assert re.findall(r"self\.(\w+)\(", run) == ["_read_data", "_close"], "what PlainConnection.run does as well"


async def test_what_says_that_hypercorn_has_nothing_under_way() -> None:
    """plain.py: PlainConnection._is_ours looks at h11's states and at what h11 has not parsed."""

    async def nothing(*_: Any) -> None: ...

    context, tasks = WorkerContext(None), TaskGroup()
    state = ConnectionState(LifespanState({}))
    protocol = H11Protocol(ASGIWrapper(nothing), Config(), context, tasks, state, False, None, None, nothing)
    assert isinstance(protocol.connection, h11.Connection)
    assert (protocol.connection.our_state, protocol.connection.their_state) == (h11.IDLE, h11.IDLE)
    assert protocol.keep_alive_requests == 0
    with trio.fail_after(5):
        await protocol.handle(RawData(b"GET / HTTP/1.1"))
    assert protocol.connection.trailing_data[0] == b"GET / HTTP/1.1"


async def test_the_connections_state_reaches_the_application() -> None:
    """serve.py: a request finds its Connection, and with it whether it is trusted, in ``scope["state"]``."""
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listeners[0], trio.open_nursery() as nursery:
        client = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
        state = ConnectionState(LifespanState({"connection": "ours"}))
        with trio.fail_after(5):
            server = await listeners[0].accept()
            nursery.start_soon(
                TCPServer(ASGIWrapper(app), Config(), WorkerContext(None), state, server).run  # type: ignore[arg-type]
            )
            async with client:
                await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while await client.receive_some():
                    pass
        nursery.cancel_scope.cancel()
    assert [state["connection"] for state in seen] == ["ours"]


@pytest.mark.parametrize("library", ["hypercorn", "quart", "quart-trio"])
def test_its_version_is_bounded_above(library: str) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [bound] = [dependency for dependency in dependencies if re.match(rf"{library}\b(?!-)", dependency)]
    upper = re.search(r"<(\d+)\.(\d+)$", bound)
    assert upper is not None, f"{bound} has no upper bound"
    installed = tuple(int(part) for part in version(library).split(".")[:2])
    assert installed < (int(upper[1]), int(upper[2]))
