"""Plain requests over HTTP/2: as through Quart, and what a connection of many streams owes its client."""

from __future__ import annotations

import random
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio

from hypeman.server.app import ApiApp
from hypeman.server.routes import OPERATIONS
from hypeman.tokens import Scope, mint
from tests.fakes.services import FakeWorld
from tests.server.test_plain import SECRET, Gate, logged, not_quart, serving

Fields = list[tuple[str, str]]


class Client:
    """One connection with prior knowledge; several streams at a time."""

    def __init__(self, stream: trio.abc.Stream, window: int = 65535) -> None:
        self._stream = stream
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="latin1"))
        self._connection.initiate_connection()
        self._connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._responses: dict[int, tuple[Fields, bytes]] = {}
        self._ended: list[int] = []

    async def send(self, method: str, path: str, *fields: tuple[str, str]) -> int:
        number = self._connection.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "x"), *fields]
        self._connection.send_headers(number, head, end_stream=True)
        await self._flush()
        return number

    async def reset(self, number: int) -> None:
        self._connection.reset_stream(number)
        await self._flush()

    async def response(self, number: int) -> tuple[Fields, bytes]:
        while number not in self._ended:
            data = await self._stream.receive_some()
            assert data, "the server closed the connection"
            for event in self._connection.receive_data(bytes(data)):
                self._take(event)
            await self._flush()
        return self._responses[number]

    async def ask(self, method: str, path: str, *fields: tuple[str, str]) -> tuple[Fields, bytes]:
        return await self.response(await self.send(method, path, *fields))

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            fields: Any = event.headers
            self._responses[event.stream_id] = list(fields), b""
        elif isinstance(event, h2.events.DataReceived):
            head, data = self._responses[event.stream_id]
            self._responses[event.stream_id] = head, data + event.data
            self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._ended.append(event.stream_id)
        else:
            assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated), event

    async def _flush(self) -> None:
        await self._stream.send_all(self._connection.data_to_send())


@pytest.fixture
def token() -> tuple[str, str]:
    return ("authorization", f"Bearer {mint(SECRET, subject='x')}")


async def test_responses_both_ways(app: ApiApp, world: FakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    """The same headers, bodies and log lines, but for date, id and duration."""
    caplog.set_level("INFO")
    world.instances.add("web", tags={"team": "x"})
    rng = random.Random(6)
    tokens = [mint(SECRET, subject="all"), mint(SECRET, subject="few", scopes=[str(Scope.INSTANCE_READ)]), "x.y.z"]
    paths = [
        operation.path for operation in OPERATIONS if operation.method == "GET" and operation.path != "/events"
    ] + ["/nowhere", "/health/"]
    async with serving(app, app.plain) as (_, connect, _), serving(app, None) as (_, connect_quart, _):
        plain, quart = await connect(), await connect_quart()
        async with plain, quart:
            clients = Client(plain), Client(quart)
            for _ in range(400):
                path = rng.choice(paths) + rng.choice(["", "", "?state=Flying"])
                while "{" in path:
                    begin, end = path.index("{"), path.index("}")
                    path = path[:begin] + rng.choice(["web", "nobody", "a%2Fb", "%zz"]) + path[end + 1 :]
                fields = [("authorization", f"Bearer {rng.choice(tokens)}")] * rng.choice([0, 1, 1, 1])
                fields += [("x-request-id", "given")] * rng.choice([0, 1]) + [("te", "trailers")] * rng.choice(
                    [0, 0, 1]
                )
                method = rng.choice(["GET", "GET", "GET", "HEAD", "DELETE", "PUT"])
                if method == "DELETE" and "team" not in path:
                    path = path.replace("web", "nobody")  # so that the world stays as it is
                seen = []
                for client in clients:
                    caplog.clear()
                    with trio.fail_after(20):
                        head, body = await client.ask(method, path, *fields)
                    varying = {"date"} | ({"x-request-id"} if ("x-request-id", "given") not in fields else set())
                    seen.append(([one for one in head if one[0] not in varying], body, logged(caplog)))
                assert seen[0] == seen[1], (method, path, fields)


async def test_quart_is_not_asked(app: ApiApp, world: FakeWorld, token: tuple[str, str]) -> None:
    world.instances.add("web")
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        client = Client(stream)
        for fields, wanted in (([token], "200"), ([token, ("cookie", "a=b")], "418"), ([], "401")):
            head, _ = await client.ask("GET", "/instances/web", *fields)
            assert head[0] == (":status", wanted)


async def test_others_are_answered_while_one_blocks(app: ApiApp, world: FakeWorld, token: tuple[str, str]) -> None:
    gate = Gate(world)
    world.instances.add("web")
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        client = Client(stream)
        with trio.fail_after(10):
            first = await client.send("GET", "/instances/web", token)
            await gate.entered.wait()
            assert (await client.ask("GET", "/health"))[0][0] == (":status", "200")
            gate.may_go_on.set()
            assert (await client.response(first))[0][0] == (":status", "200")


@pytest.mark.parametrize("reset", [True, False])
async def test_a_client_that_gives_up_cancels_its_handler(
    app: ApiApp, world: FakeWorld, token: tuple[str, str], caplog: pytest.LogCaptureFixture, reset: bool
) -> None:
    caplog.set_level("INFO")
    gate = Gate(world)
    world.instances.add("web")
    async with serving(not_quart, app.plain) as (server, connect, _):
        async with await connect() as stream:
            client = Client(stream)
            number = await client.send("GET", "/instances/web", token)
            with trio.fail_after(10):
                await gate.entered.wait()
                if reset:
                    await client.reset(number)
                    await gate.cancelled.wait()
                    assert (await client.ask("GET", "/health"))[0][0] == (":status", "200")
        with trio.fail_after(10):
            await gate.cancelled.wait()
            while server._open:
                await trio.sleep(0.01)
    assert [fields["status"] for _, fields in logged(caplog)] == ([499, 200] if reset else [499])


async def test_a_time_limit(
    autojump_clock: trio.testing.MockClock, app: ApiApp, world: FakeWorld, token: tuple[str, str]
) -> None:
    gate = Gate(world)
    world.instances.add("web")
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        head, _ = await Client(stream).ask("GET", "/instances/web", token)
        assert head[0] == (":status", "504")
    assert gate.cancelled.is_set()


@pytest.mark.parametrize("window", [10, 65535])
async def test_a_response_that_is_larger_than_the_window(
    app: ApiApp, world: FakeWorld, token: tuple[str, str], window: int
) -> None:
    world.instances.encoded = b'"' + b"x" * (10_000 if window == 10 else 3_000_000) + b'"'
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        client = Client(stream, window)
        with trio.fail_after(20):
            assert (await client.ask("GET", "/instances", token))[1] == world.instances.encoded
            assert (await client.ask("GET", "/health"))[0][0] == (":status", "200")


async def test_an_upgrade_from_http_1(app: ApiApp) -> None:
    async with serving(app, app.plain) as (_, connect, _), await connect() as stream:
        await stream.send_all(
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        )
        with trio.fail_after(10):
            answer = b""
            while b'"status":"ok"' not in answer:
                answer += await stream.receive_some()
        assert answer.startswith(b"HTTP/1.1 101 ")
