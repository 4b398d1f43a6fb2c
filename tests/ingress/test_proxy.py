"""The data plane on loopback: real sockets to clients and to programs that play the guest."""

from __future__ import annotations

import hashlib
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from websockets.sync.client import connect as connect_websocket
from websockets.sync.server import Server, ServerConnection
from websockets.sync.server import serve as serve_websocket

from hypeman.egress.front import Place
from hypeman.egress.records import Served
from hypeman.egress.service import Bounds, Egress, Limits, Settings, Timeouts
from hypeman.ingress.routing import Route, compile_routes
from tests.egress.conftest import engine_process

SECRET = "0123456789abcdef0123456789abcdef"
Guest = Callable[[trio.SocketStream], Awaitable[None]]
NO_LIMITS = Limits()
QUICK = Timeouts(head=1, idle_down=5, half=5, place=1, dial=5, answer=1, stream=5)


class World:
    """An engine with the sites a (a guest), down, gone, locked (a with a header) and any (a pattern)."""

    def __init__(self, port: int, guest_port: int, egress: Egress, log: list[Served], asked: list[str]) -> None:
        self.port = port
        self.guest_port = guest_port
        self.egress = egress
        self.log = log
        self.asked = asked

    async def logged(self, count: int = 1) -> Served:
        """The last request, once ``count`` are done."""
        with trio.fail_after(60):
            while len(self.log) < count:
                await trio.sleep(0.01)
        return self.log[-1]

    async def counted(self, name: str) -> int:
        return (await self.egress.statistics()).counters[name]

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, data: bytes, method: bytes = b"GET") -> tuple[h11.Response, bytes]:
        async with await self.connect() as stream:
            await stream.send_all(data)
            return await response_of(stream, method)

    async def get(self, host: str, *headers: str, path: str = "/") -> tuple[h11.Response, bytes]:
        lines = "".join(f"{line}\r\n" for line in (f"Host: {host}", *headers))
        return await self.ask(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())


async def response_of(stream: trio.abc.ReceiveStream, method: bytes = b"GET") -> tuple[h11.Response, bytes]:
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    http.send(h11.EndOfMessage())
    response, body = None, b""
    with trio.fail_after(60):
        while True:
            event = http.next_event()
            match event:
                case h11.NEED_DATA:
                    http.receive_data(bytes(await stream.receive_some(65536)))
                case h11.Response():
                    response = event
                case h11.Data():
                    body += event.data
                case h11.EndOfMessage():
                    assert response is not None
                    return response, body


@asynccontextmanager
async def world(
    guest: Guest, timeouts: Timeouts = QUICK, limits: Limits = NO_LIMITS, loops: int = 1
) -> AsyncIterator[World]:
    log: list[Served] = []
    asked: list[str] = []
    places = {"a": Place("127.0.0.1", exists=True), "down": Place("", exists=True)}

    def place_of(instance: str) -> Place:
        asked.append(instance)
        return places.get(instance, Place("", exists=False))

    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hmi")))
        listener, guests, closed = (stack.enter_context(socket.socket()) for _ in range(3))
        for each in (listener, guests, closed):
            each.bind(("127.0.0.1", 0))
            each.setblocking(False)
        listener.listen()
        guests.listen()
        port, guest_port = listener.getsockname()[1], guests.getsockname()[1]
        stack.enter_context(trio.fail_after(120))
        nursery = await stack.enter_async_context(trio.open_nursery())
        settings = Settings(address="127.0.0.1", port=0, loops=loops, timeouts=timeouts, limits=limits)
        egress = Egress(settings, directory / "egress", command=engine_process)
        egress.front.use(place_of, log.append)
        await nursery.start(partial(egress.run, grace=0))

        async def route(hostname: str, instance: str, target: int = guest_port, **more: Any) -> None:
            await egress.front.put(hostname, compile_routes([Route(hostname, 80, instance, target, **more)]))

        await route("a.test", "a")
        await route("down.test", "down")
        await route("gone.test", "gone")
        await route("refuses.test", "a", closed.getsockname()[1])
        await route("{any}.any.test", "{any}")
        await route("locked.test", "a", auth_header="X-Key", auth_value=SECRET)
        await egress.front.listen(80, [listener])
        nursery.start_soon(trio.serve_listeners, guest, [trio.SocketListener(trio.socket.from_stdlib_socket(guests))])
        yield World(port, guest_port, egress, log, asked)
        nursery.cancel_scope.cancel()


def http_guest(answer: Callable[[h11.Request, bytes], tuple[list[tuple[str, str]], bytes]]) -> Guest:
    """A program that answers every request; connections are kept."""

    async def serve(stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        request, body = None, b""
        while True:
            event = http.next_event()
            match event:
                case h11.NEED_DATA:
                    http.receive_data(await stream.receive_some(65536))
                case h11.Request():
                    request, body = event, b""
                case h11.Data():
                    body += event.data
                case h11.EndOfMessage():
                    assert request is not None
                    headers, answered = answer(request, body)
                    answered = b"" if request.method == b"HEAD" else answered
                    sent = http.send(h11.Response(status_code=200, headers=headers)) or b""
                    sent += http.send(h11.Data(data=answered)) or b""
                    await stream.send_all(sent + (http.send(h11.EndOfMessage()) or b""))
                    if http.our_state is not h11.DONE:
                        return
                    http.start_next_cycle()
                case _:
                    return

    return serve


def shows_head(request: h11.Request, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
    lines = [b"%b %b" % (request.method, request.target), *(b"%b: %b" % header for header in request.headers)]
    return [("X-Guest", "yes"), ("Connection", "keep-alive, X-Hop"), ("X-Hop", "1")], b"\n".join(lines)


async def test_a_request_and_its_response() -> None:
    async with world(http_guest(shows_head)) as here:
        response, body = await here.get("A.test:80", "X-Forwarded-For: 10.9.9.9", "X-Mine: 1", path="/x?secret=1")
    assert (response.status_code, body.splitlines()) == (
        200,
        [
            b"GET /x?secret=1",
            b"host: A.test:80",
            b"x-mine: 1",
            b"x-forwarded-for: 127.0.0.1",
            b"x-forwarded-proto: http",
            b"x-forwarded-host: A.test:80",
            b'forwarded: for=127.0.0.1;host="A.test:80";proto=http',
        ],
    )
    names = {name for name, _ in response.headers}
    assert b"x-guest" in names
    assert b"x-hop" not in names
    served = await here.logged()
    assert (served.ingress, served.host, served.method, served.path) == ("a.test", "a.test", "GET", "/x")
    assert (served.instance, served.status, served.sent) == ("a", 200, len(body))


STATUSES: list[tuple[str, tuple[str, ...], int]] = [
    ("nobody.test", (), 404),
    ("down.test", (), 503),
    ("gone.test", (), 503),
    ("gone.any.test", (), 404),
    ("down.any.test", (), 503),
    ("refuses.test", (), 502),
    ("locked.test", (), 401),
    ("locked.test", ("X-Key: " + SECRET[::-1],), 401),
    ("locked.test", ("X-Key: ",), 401),
    ("locked.test", ("X-Key: " + SECRET, "X-Key: " + SECRET), 401),
    ("a.any.test", (), 200),
]


async def test_which_status_says_what_is_wrong() -> None:
    async with world(http_guest(shows_head)) as here:
        for number, (host, headers, status) in enumerate(STATUSES, 1):
            response, body = await here.get(host, *headers, "Accept: text/html")
            assert response.status_code == status, (host, headers)
            if status != 200:
                assert dict(response.headers)[b"content-type"].startswith(b"text/html")
                for reported in (b"127.0.0.1", b"instance", SECRET.encode(), host.partition(".")[0].encode() + b"."):
                    assert reported not in body
            assert (await here.logged(number)).status == status
        _, body = await here.get("nobody.test")
        assert body == b"404 Not Found: There is no site with this name on this server.\n"


async def test_a_server_that_does_not_say_where_an_instance_is() -> None:
    async with world(http_guest(shows_head)) as here:

        async def silent(*_: object) -> None:
            await trio.sleep_forever()

        here.egress.front.locate = silent  # type: ignore[method-assign, assignment]
        assert (await here.get("a.test"))[0].status_code == 503


async def test_a_place_is_asked_once_until_it_changes() -> None:
    async with world(http_guest(shows_head)) as here:
        for _ in range(3):
            assert (await here.get("a.test"))[0].status_code == 200
        assert here.asked == ["a"]
        here.egress.front.forget(["a"])
        with trio.fail_after(60):
            while here.asked == ["a"]:
                assert (await here.get("a.test"))[0].status_code == 200
        for _ in range(2):
            assert (await here.get("down.test"))[0].status_code == 503
        assert here.asked[-2:] == ["down", "down"], "that it does not run is not remembered"


async def test_the_secret_is_for_us_alone() -> None:
    async with world(http_guest(shows_head)) as here:
        response, body = await here.get("locked.test", "X-Key: " + SECRET)
        assert response.status_code == 200
        assert SECRET.encode() not in body


async def test_connections_are_kept_on_both_sides() -> None:
    seen: list[int] = []

    async def guest(stream: trio.SocketStream) -> None:
        seen.append(1)
        await http_guest(shows_head)(stream)

    async with world(guest) as here, await here.connect() as client:
        for _ in range(3):
            await client.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert (await response_of(client))[0].status_code == 200
        await client.send_all(b"GET / HTTP/1.1\r\nHost: nobody.test\r\n\r\n")
        assert (await response_of(client))[0].status_code == 404
        await client.send_all(b"HEAD / HTTP/1.1\r\nHost: a.test\r\n\r\n" * 2)  # pipelined
        for _ in range(2):
            assert (await response_of(client, b"HEAD"))[0].status_code == 200
    assert len(seen) == 1


async def test_a_kept_connection_that_the_guest_closed() -> None:
    async def once(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await stream.aclose()

    async with world(once) as here, await here.connect() as client:
        for _ in range(4):
            await client.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert (await response_of(client))[1] == b"ok"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_bodies_pass_whole(framing: str) -> None:
    data = bytes(range(256)) * 20_000

    def digest(request: h11.Request, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
        return [("X-Digest", hashlib.sha256(body).hexdigest())], body

    async with world(http_guest(digest), Timeouts()) as here, await here.connect() as client:
        if framing == "length":
            head, body = f"Content-Length: {len(data)}", data
        else:
            head = "Transfer-Encoding: chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, f"POST / HTTP/1.1\r\nHost: a.test\r\n{head}\r\n\r\n".encode() + body)
            response, answered = await response_of(client, b"POST")
        assert dict(response.headers)[b"x-digest"] == hashlib.sha256(data).hexdigest().encode()
        assert answered == data
        served = await here.logged()
        assert (served.received, served.sent) == (len(data), len(data))


async def test_nothing_is_held_back() -> None:
    """Each piece is passed on before the next one exists: server-sent events, and uploads."""
    to_guest, at_guest = trio.open_memory_channel[bytes](0)
    go_on, output = trio.open_memory_channel[bytes](0)

    async def guest(stream: trio.SocketStream) -> None:
        received = b""
        while not received.endswith(b"one\r\n"):
            received += await stream.receive_some(65536)
        await to_guest.send(b"one")
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        async for piece in output:
            await stream.send_all(piece)
        await stream.aclose()

    async with world(guest) as here, await here.connect() as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        with trio.fail_after(60):
            assert await at_guest.receive() == b"one"
            received = b""
            for piece in (b"data: 1\n\n", b"data: 2\n\n"):
                await go_on.send(piece)
                while piece not in received:
                    received += await client.receive_some(65536)


async def test_websockets() -> None:
    def repeat(session: ServerConnection) -> None:
        for message in session:
            session.send(message)

    def echo() -> None:
        with serve_websocket(repeat, "127.0.0.1", 0, compression=None) as server:
            ports.append(server.socket.getsockname()[1])
            trio.from_thread.run_sync(ready.set, trio_token=token)
            servers.append(server)
            server.serve_forever()

    ports: list[int] = []
    servers: list[Server] = []
    ready, token = trio.Event(), trio.lowlevel.current_trio_token()

    def talk(port: int) -> list[str | bytes]:
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            connect_websocket("ws://a.test/", sock=plain, compression=None) as ws,
        ):
            ws.send("hello")
            first = ws.recv(30)
            ws.send(b"x" * 1_000_000)
            return [first, ws.recv(30)]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, echo)
        await ready.wait()
        async with world(http_guest(shows_head)) as here:
            await here.egress.front.put("a.test", compile_routes([Route("a.test", 80, "a", ports[0])]))
            assert await trio.to_thread.run_sync(talk, here.port) == ["hello", b"x" * 1_000_000]
            served = await here.logged()
            assert served.status == 101
            assert served.sent > 1_000_000
        await trio.to_thread.run_sync(servers[0].shutdown)


RESPONSES = [
    (b"", 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", 502),
    (b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", 502),
    (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, 502),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", 502),
    (b"nonsense\r\n\r\n", 502),
    (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", 204),
]


async def test_guests_that_speak_no_http() -> None:
    now = b""

    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        with suppress(trio.BrokenResourceError):  # a head that is too large is not read to its end
            await stream.send_all(now)
        await stream.aclose()

    async with world(guest) as here:
        for now, status in RESPONSES:
            response, _ = await here.get("a.test")
            assert response.status_code == status, now[:80]


async def test_a_silent_guest_is_a_504() -> None:
    async def guest(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with world(guest) as here:
        assert (await here.get("a.test"))[0].status_code == 504


@pytest.mark.parametrize("framing", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
async def test_half_a_response_is_not_taken_for_a_whole_one(framing: bytes) -> None:
    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n3\r\nabc\r\n")
        await stream.aclose()

    async with world(guest) as here, await here.connect() as client:
        await client.send_all(b"GET / HTTP/1.0\r\nHost: a.test\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            while await client.receive_some(65536):
                pass


REQUESTS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n",
]


async def test_requests_that_no_guest_sees() -> None:
    async def guest(stream: trio.SocketStream) -> None:
        raise AssertionError("it was passed on")

    async with world(guest) as here:
        for sent in REQUESTS:
            response, _ = await here.ask(sent)
            assert 400 <= response.status_code < 500 or response.status_code == 501, sent[:80]


async def test_slow_clients_lose_their_connection() -> None:
    async with world(http_guest(shows_head)) as here, await here.connect() as client:
        await client.send_all(b"GET / HTTP/1.1\r\n")
        response, _ = await response_of(client)
        assert response.status_code == 408
        with trio.fail_after(60):
            assert await client.receive_some(100) == b""


async def test_too_many_connections_are_refused() -> None:
    few = Bounds(connections=4)  # one address gets half of them
    async with world(http_guest(shows_head), limits=Limits(client=few, clients=few)) as here:
        held = [await here.connect() for _ in range(2)]
        for each in held:
            await each.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert (await response_of(each))[0].status_code == 200
        async with await here.connect() as third:
            with trio.fail_after(60):
                with suppress(trio.BrokenResourceError):
                    assert await third.receive_some(1) == b""
        assert await here.counted("clients_refused") == 1
        for each in held:
            await each.aclose()
        while await here.counted("clients"):
            await trio.sleep(0.01)
        assert (await here.get("a.test"))[0].status_code == 200


async def test_a_client_that_leaves_ends_the_exchange() -> None:
    left = trio.Event()
    asked = trio.Event()

    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        asked.set()
        with suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
        left.set()

    async with world(guest, Timeouts()) as here:
        client = await here.connect()
        await client.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        with trio.fail_after(60):
            await asked.wait()
            await client.aclose()
            await left.wait()
            while await here.counted("clients"):
                await trio.sleep(0.01)
        assert (await here.logged()).status == 499


async def test_a_dropped_ingress_ends_its_exchanges() -> None:
    asked = trio.Event()

    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        asked.set()
        await trio.sleep_forever()

    async with world(guest, Timeouts()) as here, await here.connect() as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        with trio.fail_after(60):
            await asked.wait()
            await here.egress.front.drop("a.test")
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some(1)
        assert (await here.get("a.test"))[0].status_code == 404


async def test_a_guest_that_answers_before_the_upload_is_complete() -> None:
    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        await stream.aclose()

    async with world(guest) as here, await here.connect() as client:
        await client.send_all(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        response, body = await response_of(client, b"POST")
        assert (response.status_code, body) == (413, b"big")


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_a_body_left_unread_is_not_the_next_request(method: bytes) -> None:
    """The guest answers on the head alone and takes what follows for another request."""
    seen: list[list[bytes]] = []

    async def guest(stream: trio.SocketStream) -> None:
        mine: list[bytes] = []
        seen.append(mine)
        data = b""
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                data += piece
                while b"\r\n\r\n" in data:
                    head, _, data = data.partition(b"\r\n\r\n")
                    mine.append(head.partition(b"\r\n")[0])
                    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    evil = b"GET /evil HTTP/1.1\r\nHost: a.test\r\n\r\n"
    async with world(guest, Timeouts()) as here, await here.connect() as client:
        await client.send_all(method + b" /first HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n" % len(evil))
        if method == b"POST":  # it is answered before the body is there
            assert (await response_of(client))[1] == b"ok"
        await client.send_all(evil)
        if method == b"GET":
            assert (await response_of(client))[1] == b"ok"
        async with await here.connect() as other:
            await other.send_all(b"GET /next HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert (await response_of(other))[1] == b"ok"
    assert [lines[0] for lines in seen] == [method + b" /first HTTP/1.1", b"GET /next HTTP/1.1"]


async def test_an_instance_that_ends_midway() -> None:
    """No packet says so: the server does. What has begun is reset, what has not gets 503."""
    asked = trio.Semaphore(0)

    async def guest(stream: trio.SocketStream) -> None:
        head = await stream.receive_some(65536)
        if b"/begun" in head:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        elif b"/socket" in head:
            await stream.send_all(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
            )
        asked.release()
        await trio.sleep_forever()

    async with world(guest, Timeouts()) as here, AsyncExitStack() as stack:
        clients = {}
        for path, more in [
            ("/begun", ""),
            ("/waits", ""),
            ("/socket", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
        ]:
            client = clients[path] = await stack.enter_async_context(await here.connect())
            await client.send_all(f"GET {path} HTTP/1.1\r\nHost: a.test\r\n{more}\r\n".encode())
            await asked.acquire()
        begun = b""
        while not begun.endswith(b"half"):
            begun += await clients["/begun"].receive_some(65536)
        here.egress.front.forget(["other"], ended=True)
        here.egress.front.forget(["a"])  # as in standby: connections are kept
        assert await here.counted("clients") == 3
        here.egress.front.forget(["a"], ended=True)
        assert (await response_of(clients["/waits"]))[0].status_code == 503
        with pytest.raises(trio.BrokenResourceError):
            await clients["/begun"].receive_some(65536)
        while await clients["/socket"].receive_some(65536):
            pass
        await here.logged(3)
        assert {served.path: served.status for served in here.log} == {"/begun": 200, "/waits": 503, "/socket": 101}
        while await here.counted("clients") > 1:
            await trio.sleep(0.01)
