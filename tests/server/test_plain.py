"""Plain requests: the same bytes as through Quart, and the connection's own duties."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import trio
import trio.testing

from hypeman.devices.types import AvailableDevice
from hypeman.instances.model.types import InstanceState
from hypeman.server.app import ApiApp
from hypeman.server.heads import plain_headers
from hypeman.server.plain import PlainConnection
from hypeman.server.plain_routes import PlainRoutes
from hypeman.server.routes import OPERATIONS
from hypeman.server.serve import Server, bind_tcp
from hypeman.telemetry import metrics
from hypeman.telemetry.logs import setup_logs
from hypeman.tokens import Scope, mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"
HEAD = "GET /instances/web HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"


@asynccontextmanager
async def serving(app: Any, plain: PlainRoutes | None) -> AsyncIterator[tuple[Server, Callable[[], Any], trio.Event]]:
    """A server, what connects to it, and what ends it."""
    sockets = bind_tcp("127.0.0.1", 0)
    address = sockets[0].getsockname()
    shutdown = trio.Event()
    server = Server(app, plain=plain, grace=2.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, sockets, shutdown)
        yield server, partial(trio.open_tcp_stream, *address), shutdown
        nursery.cancel_scope.cancel()


async def not_quart(scope: Any, receive: Any, send: Any) -> None:
    """In place of the application."""
    await send({"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Reader:
    """Raw responses off a connection."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._data = b""

    async def _more(self) -> None:
        received = await self._stream.receive_some()
        if not received:
            raise EOFError
        self._data += received

    async def head(self) -> bytes:
        while (end := self._data.find(b"\r\n\r\n") + 4) < 4:
            await self._more()
        return self._take(end)

    async def body(self, head: bytes) -> bytes:
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, head
        while len(self._data) < int(length[1]):
            await self._more()
        return self._take(int(length[1]))

    def _take(self, count: int) -> bytes:
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    async def response(self) -> bytes:
        head = await self.head()
        return head + await self.body(head)


async def status(reader: Reader) -> int:
    return int((await reader.response()).split()[1])


# ── The same bytes ───────────────────────────────────────────────────────────────────────────────


def requests(rng: random.Random, count: int) -> list[bytes]:
    """Requests of every kind that leave the world as it is; a malformed one would end the connection."""
    tokens = [
        mint(SECRET, subject="all"),
        mint(SECRET, subject="narrow", scopes=[str(Scope.INSTANCE_READ)]),
        mint("another secret, also long enough", subject="wrong"),
        "x.y.z",
    ]
    values = ["web", "vm-1", "nobody", "a%2Fb", "a%00", "%ff", "..", "%zz", "a+b", "x" * 100, "docker.io%2Fa%3Ab", "ü"]
    paths = [operation.path for operation in OPERATIONS if operation.path != "/events"]  # it has no end either
    paths += ["/nowhere", "/", "//health", "/health/", "/instances//stat"]
    queries = ["", "", "", "?", "?state=Running", "?state=Flying", "?tags[team]=x", "?tags%5Bteam%5D=x&tags=y",
               "?all=true", "?path=/etc", "?path=%2Fetc&follow_links=maybe", "?x=%ff", "?state=Running&timeout=1s",
               "?timeout=soon&state=Running", "?a=" + "&a=" * 300]  # fmt: skip
    made = []
    for _ in range(count):
        method = rng.choice(["GET"] * 12 + ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW"])
        path = re.sub(r"{\w+}", lambda _: rng.choice(values), rng.choice(paths))
        if method not in ("GET", "HEAD"):  # nothing that exists
            path = re.sub(r"web|vm-1", "nobody", path)
        if path.endswith(("/logs", "/egress/requests")) and method in ("GET", "HEAD"):
            path = re.sub(r"/(web|vm-1)/", "/nobody/", path)  # a stream has no end that this reader knows
        lines = [f"Host: {rng.choice(['x', 'localhost:80'])}"]
        if rng.random() < 0.9:
            scheme = rng.choice(["Bearer"] * 8 + ["bearer", "Basic", ""])
            lines.append(
                f"{rng.choice(['Authorization', 'authorization'])}: {scheme} {rng.choice([*tokens[:1] * 5, *tokens])}"
            )
        if rng.random() < 0.2:
            lines.append("X-Request-Id:  \t given-1 \t")
        if rng.random() < 0.2:
            lines.append(rng.choice(["Connection: keep-alive", "Accept-Encoding: gzip", "Cookie: a=b", "X-Nothing:"]))
        if rng.random() < 0.05:
            lines.append(rng.choice(["Expect: 100-continue", "Upgrade: something", "TE: trailers", "Connection: TE"]))
        body = b""
        if method in ("POST", "PUT", "PATCH"):
            bad = [b"{", b"[]", b'{"name":1}', b'{"vcpus":0}']
            body = rng.choice(bad[:2] if path == "/builders" else bad)  # a builder wants nothing, and ignores the rest
            lines.append(f"Content-Length: {len(body)}")
        elif rng.random() < 0.05:
            lines.append("Content-Length: 0")
        rng.shuffle(lines)
        head = "\r\n".join([f"{method} {path}{rng.choice(queries)} HTTP/1.1", *lines])
        made.append(head.encode("latin1") + b"\r\n\r\n" + body)
    return made


def unvaried(response: bytes) -> bytes:
    return re.sub(rb"(x-request-id|date): [^\r]*", rb"\1", response)


class Asker:
    """Sends requests over one connection, and over a new one after one that ended it."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._stream: trio.SocketStream | None = None

    async def ask(self, request: bytes) -> list[bytes]:
        """The responses (an interim one before the last) without what varies; at last b"" if the connection ended."""
        if self._stream is None:
            self._stream = await self._connect()
            self._reader = Reader(self._stream)
        await self._stream.send_all(request)
        responses: list[bytes] = []
        while not responses or responses[-1].startswith(b"HTTP/1.1 100"):
            head = await self._reader.head()
            if head.split()[1] not in (b"100", b"204") and not request.startswith(b"HEAD "):
                head += await self._reader.body(head)
            responses.append(unvaried(head))
        if b"connection: close" in responses[-1]:
            with pytest.raises(EOFError):
                await self._reader.head()
            await self.aclose()
            responses.append(b"")
        return responses

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None


@pytest.mark.slow
async def test_ten_thousand_requests_both_ways(
    app: ApiApp, world: FakeWorld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses, log lines and metrics are the same, but for date, id and duration."""
    caplog.set_level(logging.INFO)
    world.instances.add("web", tags={"team": "x"})
    world.instances.add("vm-1", InstanceState.STOPPED)
    world.devices.free.append(
        AvailableDevice(pci_address="0000:01:00.0", vendor_id="10de", device_id="2204", iommu_group=1)
    )
    counted: list[tuple[str, str, int]] = []
    monkeypatch.setattr(metrics, "count_request", lambda *labels: counted.append(labels[:3]))
    plain, ended = 0, 0
    async with serving(app, app.plain) as (_, connect, _), serving(app, None) as (_, connect_quart, _):
        askers = Asker(connect), Asker(connect_quart)
        for request in requests(random.Random(18), 10_000):
            seen = []
            for asker in askers:
                caplog.clear()
                counted.clear()
                with trio.fail_after(20):
                    responses = await asker.ask(request)
                seen.append((responses, logged(caplog), counted.copy()))
            assert seen[0] == seen[1], request
            plain += is_plain(app, request)
            ended += not seen[0][0][-1]
        for asker in askers:
            await asker.aclose()
    assert plain > 3000, "few of them were plain"
    assert ended > 10


async def test_responses_to_what_succeeds_both_ways(app: ApiApp, world: FakeWorld) -> None:
    """With a body, with headers of the operation, and without content."""
    token = f"Authorization: Bearer {mint(SECRET, subject='x')}\r\n"

    def request(method: str, path: str, body: bytes = b"") -> bytes:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{token}{length}\r\n".encode() + body

    asked = [
        request("POST", "/volumes", b'{"name":"data","size_gb":1,"id":"data"}'),
        request("GET", "/volumes/data"),
        request("DELETE", "/volumes/data"),
        request("GET", "/swagger"),
        request("GET", "/spec.yaml"),
        request("GET", "/spec.json"),
        request("GET", "/builds/x"),
    ]
    async with serving(app, app.plain) as (_, connect, _), serving(app, None) as (_, connect_quart, _):
        ours, theirs = Asker(connect), Asker(connect_quart)
        for each in asked:
            assert app.plain.find(each.partition(b" HTTP/1.1")[0]) is not None
            before = dict(world.volumes.volumes)
            response = await ours.ask(each)
            world.volumes.volumes = before
            assert response == await theirs.ask(each)
        await ours.aclose()
        await theirs.aclose()


def logged(caplog: pytest.LogCaptureFixture) -> list[Any]:
    varying = ("request_id", "ms")
    standard = vars(logging.makeLogRecord({}))
    return [
        (
            record.getMessage(),
            {key: value for key, value in vars(record).items() if key not in standard and key not in varying},
        )
        for record in caplog.records
        if record.name == "hypeman.http"
    ]


def is_plain(app: ApiApp, request: bytes) -> bool:
    line, _, block = request.partition(b"\r\n\r\n")[0].partition(b"\r\n")
    return app.plain.find(line.removesuffix(b" HTTP/1.1")) is not None and plain_headers(block + b"\r\n") is not None


@pytest.mark.parametrize("header", ["Content-Length: -3", "Content-Length: 1\r\nContent-Length: 1",
     "Transfer-Encoding: chunked", "Upgrade: h2c",
    "Expect: 100-continue", "Connection: close, x", "Connection: upgrade", "Host: twice", "A: \x01", "A : b", "A: \xe4",
    " folded", "no colon"])  # fmt: skip
def test_headers_that_are_not_plain(header: str) -> None:
    assert plain_headers(f"Host: x\r\n{header}\r\n".encode("latin1")) is None


def test_headers_are_read_as_h11_reads_them() -> None:
    """Whatever is plain is accepted by h11, with the same values."""
    rng = random.Random(7)
    pieces = ["Host: x", "host:y", "Authorization:\t Bearer a ", "authorization: b", "X-Request-Id: 1",
              "x-request-id:", "A:", "A: b c", "Connection: Keep-Alive", "connection: Close", "A\t: b", ":", "A: \x7f",
              "A: \x00", "Ä: b", "A: \t", "A:\x0b"]  # fmt: skip
    seen = 0
    for _ in range(3000):
        block = "".join(f"{rng.choice(pieces)}\r\n" for _ in range(rng.randrange(5))).encode("latin1")
        found = plain_headers(block)
        if found is None:
            continue
        seen += 1
        parser = h11.Connection(h11.SERVER)
        parser.receive_data(b"GET / HTTP/1.1\r\n" + block + b"\r\n")
        request = parser.next_event()
        assert isinstance(request, h11.Request)
        values: dict[bytes, bytes] = {}
        for name, value in request.headers:
            values.setdefault(name, value)
        assert (found.authorization or "").encode() == values.get(b"authorization", b"")
        assert found.last == ((b"connection", b"close") in [(name, value.lower()) for name, value in request.headers])
        assert found.request_id.encode() == values.get(b"x-request-id", b"")
    assert seen > 100


def test_a_fixed_segment_goes_before_a_parameter(app: ApiApp) -> None:
    for path, wanted in [
        ("/devices/available", "/devices/available"), ("/devices/x", "/devices/{id}"),
        ("/images/a/progress", "/images/{name}/progress"), ("/instances/x/stat", "/instances/{id}/stat"),
    ]:  # fmt: skip
        found = app.plain.find(b"GET " + path.encode())
        assert found is not None and found.operation.path == wanted
    for path in (
        "/images/a/b",
        "/instances/",
        "/instances/x/logs",
        "/instances/x/exec",
        "/v2/",
        "http://x/health",
        "*",
    ):
        assert app.plain.find(b"GET " + path.encode()) is None, path


def test_what_is_remembered_is_bounded(app: ApiApp) -> None:
    for number in range(5000):
        app.plain.find(b"GET /instances/%d" % number)
    app.plain.find(b"GET /instances/" + b"x" * 10_000)
    assert len(app.plain._known) <= 1000
    assert max(map(len, app.plain._known)) < 1000


# ── The connection's duties ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def head() -> bytes:
    return HEAD.format(token=mint(SECRET, subject="x")).encode()


async def test_quart_is_not_asked(app: ApiApp, world: FakeWorld, head: bytes) -> None:
    world.instances.add("web")
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        reader = Reader(stream)
        for request, wanted in ((head, 200), (head.replace(b"GET", b"HEAD"), 418), (head, 200)):
            await stream.send_all(request)
            assert await status(reader) == wanted
            await trio.testing.wait_all_tasks_blocked()  # Hypercorn ends a request after its response was sent


async def test_pipelined_requests_are_answered_in_order(app: ApiApp, world: FakeWorld, head: bytes) -> None:
    """Plain ones and others, in one packet and cut anywhere; those behind another one in a packet are Hypercorn's."""
    world.instances.add("web")
    other = head.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n{}\n")
    sent = head + head + other + head + other + other + head
    wanted = [200, 200, 418, 418, 418, 418, 418]
    async with serving(not_quart, app.plain) as (_, connect, _):
        async with await connect() as stream:
            await stream.send_all(sent)
            reader = Reader(stream)
            assert [await status(reader) for _ in wanted] == wanted
        for cut in range(1, len(head) + len(head), 17):
            async with await connect() as stream:
                reader = Reader(stream)
                await stream.send_all(sent[:cut])
                await trio.testing.wait_all_tasks_blocked()
                await stream.send_all(sent[cut:])
                # The two plain ones at the beginning are Hypercorn's, and so not_quart's, if they were cut.
                first = [418 if cut < len(head) else 200, 418 if cut != len(head) else 200]
                assert [await status(reader) for _ in wanted] == [*first, *wanted[2:]], cut


class Gate:
    """A handler that blocks; ``get`` replaces that of the instances."""

    def __init__(self, world: FakeWorld) -> None:
        self.entered = trio.Event()
        self.may_go_on = trio.Event()
        self.cancelled = trio.Event()
        self._find = world.instances.find
        world.instances.get = self.get  # type: ignore[method-assign]

    async def get(self, ref: str) -> Any:
        self.entered.set()
        try:
            await self.may_go_on.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        return self._find(ref)


@pytest.fixture
def gate(world: FakeWorld) -> Gate:
    world.instances.add("web")
    return Gate(world)


async def test_a_handler_that_blocks(app: ApiApp, gate: Gate, head: bytes) -> None:
    """Others are served meanwhile, and its client's next request waits."""
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream, await connect() as other:
        await stream.send_all(head + head.replace(b"GET", b"PUT"))
        await gate.entered.wait()
        await other.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await status(Reader(other)) == 200
        gate.may_go_on.set()
        reader = Reader(stream)
        assert [await status(reader), await status(reader)] == [200, 418]


async def test_a_handler_that_blocks_for_no_longer_than_its_watcher_takes_to_start(
    app: ApiApp, world: FakeWorld, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Trio starts tasks of one turn in random order: in some of these rounds the watcher comes after the answer."""

    async def get(ref: str) -> Any:
        await trio.lowlevel.checkpoint()
        return found

    found = world.instances.add("web")
    world.instances.get = get  # type: ignore[method-assign]
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        reader = Reader(stream)
        for _ in range(100):
            await stream.send_all(head)
            assert await status(reader) == 200
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_client_that_disconnects_cancels_its_handler(
    app: ApiApp, gate: Gate, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(not_quart, app.plain) as (server, connect, _):
        stream = await connect()
        await stream.send_all(head)
        await gate.entered.wait()
        await stream.aclose()
        with trio.fail_after(5):
            await gate.cancelled.wait()
            while server._open:
                await trio.sleep(0.01)
    assert [fields["status"] for _, fields in logged(caplog)] == [499]


async def test_a_disconnect_behind_a_request_that_is_not_read(
    app: ApiApp, gate: Gate, head: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("hypeman.server.serve.HANG_UP_SECONDS", 0.1)
    async with serving(not_quart, app.plain) as (_, connect, _):
        stream = await connect()
        await stream.send_all(head)
        await gate.entered.wait()
        await stream.send_all(head)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        with trio.fail_after(5):
            await gate.cancelled.wait()
    assert [fields["status"] for _, fields in logged(caplog)] == [499]


async def test_the_connection_goes_on_after_a_time_limit(
    autojump_clock: trio.testing.MockClock, app: ApiApp, gate: Gate, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        reader = Reader(stream)
        await stream.send_all(head + head)
        assert await status(reader) == 504
        assert gate.cancelled.is_set()
        gate.may_go_on.set()
        assert await status(reader) == 200
    assert [fields["status"] for _, fields in logged(caplog)] == [504, 200]


async def test_shutdown_waits_for_a_handler_and_closes_what_is_idle(app: ApiApp, gate: Gate, head: bytes) -> None:
    async with (
        serving(not_quart, app.plain) as (_, connect, shutdown),
        await connect() as stream,
        await connect() as idle,
    ):
        await idle.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        quiet = Reader(idle)
        assert await status(quiet) == 200
        await stream.send_all(head)
        await gate.entered.wait()
        shutdown.set()
        with trio.fail_after(5):
            with pytest.raises(EOFError):
                await quiet.response()
            gate.may_go_on.set()
            reader = Reader(stream)
            assert await status(reader) == 200
            with pytest.raises(EOFError):
                await reader.response()


@pytest.mark.parametrize("quart", [False, True])
async def test_an_idle_connection_is_closed(
    autojump_clock: trio.testing.MockClock, app: ApiApp, world: FakeWorld, head: bytes, quart: bool
) -> None:
    """After the keep-alive time since the last response, no matter which part answered."""
    world.instances.add("web")
    plain = None if quart else app.plain
    async with serving(not_quart, plain) as (_, connect, _), await connect() as stream, await connect() as silent:
        reader = Reader(stream)
        begin = trio.current_time()
        for _ in range(3):
            await stream.send_all(head)
            await reader.response()
            await trio.sleep(60)
        last = trio.current_time() - 60
        with pytest.raises(EOFError):
            await reader.response()
        assert trio.current_time() - last == pytest.approx(75, abs=1)
        with pytest.raises(EOFError):
            await Reader(silent).response()
        assert trio.current_time() - begin > 75


async def test_a_connection_ends_with_its_last_allowed_request(app: ApiApp, head: bytes) -> None:
    async with serving(not_quart, app.plain) as (server, connect, _), await connect() as stream:
        server._config.keep_alive_max_requests = 2
        reader = Reader(stream)
        await stream.send_all(head * 3)
        assert b"connection: close" not in await reader.response()
        assert b"connection: close" in await reader.response()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await reader.response()


async def test_a_large_response_to_a_slow_reader(app: ApiApp, world: FakeWorld, head: bytes) -> None:
    world.instances.encoded = b'"' + b"x" * (16 * 2**20) + b'"'
    async with serving(not_quart, app.plain) as (server, connect, _), await connect() as stream:
        reader = Reader(stream)
        await stream.send_all(head.replace(b"/web", b"") + head)
        await trio.testing.wait_all_tasks_blocked(0.1)
        [connection] = server._open.values()
        assert connection.idle_until == inf, "a connection that is being sent to is not idle"
        assert len(await reader.response()) > 16 * 2**20
        assert await status(reader) == 404


async def test_a_client_that_disconnects_before_it_reads(app: ApiApp, world: FakeWorld, head: bytes) -> None:
    world.instances.encoded = b'"' + b"x" * (16 * 2**20) + b'"'
    async with serving(not_quart, app.plain) as (server, connect, _):
        stream = await connect()
        await stream.send_all(head.replace(b"/web", b""))
        await trio.testing.wait_all_tasks_blocked(0.1)
        await stream.aclose()
        with trio.fail_after(10):
            while server._open:
                await trio.sleep(0.01)


async def test_a_bug_is_answered_and_the_connection_goes_on(
    app: ApiApp, world: FakeWorld, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    world.instances.fails = KeyError("hunter2")
    async with serving(not_quart, app.plain) as (_, connect, _), await connect() as stream:
        reader = Reader(stream)
        await stream.send_all(head)
        response = await reader.response()
        assert b" 500 " in response and b"hunter2" not in response
        world.instances.fails = None
        world.instances.add("web")
        await stream.send_all(head)
        assert await status(reader) == 200
    assert any(record.exc_info for record in caplog.records)


async def test_the_log_line_as_it_is_written(served: Any, world: FakeWorld) -> None:
    """Whichever way, over either socket: one JSON object with who, what and how it ended."""
    world.instances.add("web")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    setup_logs(stream=written)
    try:
        given = "X-Request-Id: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln\r\n"
        for stream in (
            await trio.open_unix_socket(served.socket_path),
            await trio.open_tcp_stream("127.0.0.1", served.port),
        ):
            async with stream:
                await stream.send_all(HEAD.format(token=mint(SECRET, subject="x\x9b")).encode())
                assert await status(Reader(stream)) == 200
        async with await trio.open_unix_socket(served.socket_path) as stream:
            await stream.send_all(f"GET /instances/no%20one HTTP/1.1\r\nHost: x\r\n{given}\r\n".encode())
            assert await status(Reader(stream)) == 404
        root.handlers[0].flush()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert line.pop("ms") >= 0
    local, remote, missing = lines
    assert len(local.pop("request_id")) == len(remote.pop("request_id")) == 16
    common = {"level": "info", "logger": "hypeman.http", "message": "request", "method": "GET"}
    common["route"] = "/instances/{id}"
    found = common | {"status": 200, "path_id": "web"}
    assert local == found | {"subject": "local", "uid": os.getuid()}
    assert remote == found | {"subject": "x\x9b", "address": "127.0.0.1"}
    assert missing["request_id"] == "***" and missing["status"] == 404


@pytest.mark.parametrize("waits", [False, True], ids=["before", "meanwhile"])
async def test_a_connection_that_another_task_closes_counts_as_disconnected(waits: bool) -> None:
    ours, theirs = trio.socket.socketpair()
    connection: Any = SimpleNamespace(stream=SimpleNamespace(socket=ours))
    with trio.fail_after(10), theirs:
        async with trio.open_nursery() as nursery:
            if not waits:
                ours.close()
            nursery.start_soon(PlainConnection._wait_disconnect, connection)
            await trio.testing.wait_all_tasks_blocked()
            ours.close()
