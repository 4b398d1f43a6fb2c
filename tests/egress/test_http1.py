"""HTTP/1 carried faithfully: framing of every kind, interim responses, upgrades, streams, ends that come early."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel

from tests.egress.conftest import HOST, SECRET, Origin, Request, Wire, World, credential, read_body, read_response

H = f"Host: {HOST}\r\n"


def says(data: bytes, *, close: bool = False, origin: Origin, path: str) -> None:
    """The origin answers `path` with these very bytes."""

    async def answer(request: Request, wire: Wire) -> bool:
        await read_body(request, wire)
        await wire.send(data)
        if close:
            await wire.stream.aclose()
        return not close

    origin.answers[path] = answer


async def test_head_and_empty_responses(world: World) -> None:
    """No body where there is none, though there is a Content-Length, and the connection goes on."""
    wire = await world.tls()
    status, fields, _ = await world.ask(wire, f"HEAD / HTTP/1.1\r\n{H}\r\n".encode(), head_only=True)
    assert (status, fields["content-length"]) == (200, "1234")
    says(b"HTTP/1.1 204 No Content\r\nX: 1\r\n\r\n", origin=world.origin, path="/204")
    says(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", origin=world.origin, path="/304")
    assert (await world.ask(wire, f"GET /204 HTTP/1.1\r\n{H}\r\n".encode()))[:2] == (
        204,
        {"x": "1", "via": "1.1 hypeman"},
    )
    assert (await world.ask(wire, f"GET /304 HTTP/1.1\r\n{H}\r\n".encode()))[0] == 304
    assert (await world.ask(wire, f"GET /z HTTP/1.1\r\n{H}\r\n".encode()))[2] == b"GET /z 0"
    assert world.origin.connections == 1


async def test_pipelined_requests(world: World) -> None:
    """Answered one after the other, in order."""
    wire = await world.tls()
    await wire.send(b"".join(f"GET /{n} HTTP/1.1\r\n{H}\r\n".encode() for n in range(20)))
    for n in range(20):
        assert (await read_response(wire))[2] == f"GET /{n} 0".encode()


@pytest.mark.parametrize("size", [0, 1, 100, 16384, 70000])
async def test_bodies_up(world: World, size: int) -> None:
    body = bytes(n % 251 for n in range(size))
    wire = await world.tls()
    for _ in range(2):
        head = f"POST /up HTTP/1.1\r\n{H}Content-Length: {size}\r\n\r\n".encode()
        assert (await world.ask(wire, head + body))[2] == f"POST /up {size}".encode()
    assert [request.body for request in world.origin.requests] == [body, body]
    assert world.origin.requests[0].all("content-length") == [str(size)]


async def test_chunked_up_with_every_cut(world: World) -> None:
    """Chunks are decoded and made anew: extensions are gone, trailers that say nothing forbidden arrive (where no
    credential is added)."""
    await world.allow(API_KEY=credential("elsewhere.test"))
    await world.egress.set_policy("inst-a", "127.0.1.1", {}, {}, unmatched=1)  # type: ignore[arg-type]
    body = b"5;a=b\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
    wire = await world.tls()
    for cut in range(len(body)):
        head = f"POST /up HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n".encode()
        await wire.send(head + body[:cut])
        assert (await world.ask(wire, body[cut:]))[2] == b"POST /up 11"
    assert {request.body for request in world.origin.requests} == {b"hello world"}
    assert {request.trailers for request in world.origin.requests} == {b"X-Sum: 1\r\n"}


async def test_chunked_down_with_every_cut(world: World) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 2\r\n\r\n"
    cut = 0

    async def answer(request: Request, wire: Wire) -> None:
        await wire.send(data[:cut])
        await trio.lowlevel.checkpoint()
        await wire.send(data[cut:])

    world.origin.answers["/c"] = answer
    wire = await world.tls()
    for cut in range(1, len(data)):  # noqa: B007
        status, fields, body = await world.ask(wire, f"GET /c HTTP/1.1\r\n{H}\r\n".encode())
        assert (status, body, fields["(trailers)"]) == (200, b"hello!", "X-Sum: 2\r\n")
    assert world.origin.connections == 1


async def test_response_ended_by_closing(world: World) -> None:
    """Becomes chunked for a client of HTTP/1.1; for one of 1.0 the connection ends."""
    says(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True, origin=world.origin, path="/close")
    wire = await world.tls()
    for _ in range(2):
        status, fields, body = await world.ask(wire, f"GET /close HTTP/1.1\r\n{H}\r\n".encode())
        assert (status, fields["transfer-encoding"], body) == (200, "chunked", b"all of it")
    status, fields, body = await world.ask(wire, f"GET /close HTTP/1.0\r\n{H}\r\n".encode())
    assert (fields.get("transfer-encoding"), fields["connection"], body) == (None, "close", b"all of it")


async def test_http_1_0(world: World) -> None:
    """Accepted, with and without Host, kept open only if asked; chunks are joined for it."""
    wire = await world.tls()
    status, fields, _ = await world.ask(wire, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (status, fields["connection"]) == (200, "keep-alive")
    assert world.origin.requests[0].version == "HTTP/1.1"
    says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", origin=world.origin, path="/c")
    status, _, body = await world.ask(wire, f"GET /c HTTP/1.0\r\n{H}\r\n".encode())
    assert (status, body) == (200, b"ab")
    assert await wire.rest() == b""


async def test_interim_responses(world: World) -> None:
    """All 1xx reach the client (not one of HTTP/1.0), before the final response."""
    says(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
         b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", origin=world.origin, path="/i")  # fmt: skip
    wire = await world.tls()
    assert (await world.ask(wire, f"GET /i HTTP/1.1\r\n{H}\r\n".encode()))[:2] == (
        103,
        {"link": "</a>", "via": "1.1 hypeman"},
    )
    assert (await read_response(wire))[0] == 102
    assert (await read_response(wire))[::2] == (200, b"ok")
    status, _, body = await world.ask(wire, f"GET /i HTTP/1.0\r\n{H}\r\n".encode())
    assert (status, body) == (200, b"ok")


async def test_continue(world: World) -> None:
    """The expectation goes up, the 100 comes down, then the body goes up."""

    async def answer(request: Request, wire: Wire) -> None:
        assert request.all("expect") == ["100-continue"]
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await read_body(request, wire)
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!")

    world.origin.answers["/e"] = answer
    wire = await world.tls()
    head = f"POST /e HTTP/1.1\r\n{H}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    assert (await world.ask(wire, head.encode()))[0] == 100
    assert (await world.ask(wire, b"body"))[::2] == (200, b"!")
    assert world.origin.requests[0].body == b"body"


async def test_refused_before_the_upload(world: World) -> None:
    """403 on the head alone: the client never has to send its body, and the host hears nothing."""
    await world.allow(API_KEY=credential("elsewhere.test"))
    await world.egress.set_policy("inst-a", "127.0.1.1", {}, {}, unmatched=2)  # type: ignore[arg-type]
    wire = await world.tls()
    head = f"POST /e HTTP/1.1\r\n{H}Expect: 100-continue\r\nContent-Length: 4000000000\r\n\r\n"
    status, fields, body = await world.ask(wire, head.encode())
    assert (status, fields["x-hypeman-egress"], fields["connection"]) == (403, "host_denied", "close")
    assert b'"code":"host_denied"' in body
    assert world.origin.connections == 0


async def test_early_response(world: World) -> None:
    """A host that answers and closes before the upload is complete: the client gets the answer."""

    async def answer(request: Request, wire: Wire) -> bool:
        await wire.exactly(10)
        await wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        return False

    world.origin.answers["/early"] = answer
    wire = await world.tls()
    await wire.send(f"POST /early HTTP/1.1\r\n{H}Content-Length: 1000000\r\n\r\n".encode() + b"x" * 10)
    assert (await read_response(wire))[::2] == (413, b"big")


async def test_half_closed_client(world: World) -> None:
    """A client may end its side after the request and still reads the whole answer (plain HTTP)."""
    wire = await world.tcp()
    await wire.send(f"GET http://plain.test:{world.plain.port}/h HTTP/1.1\r\n"
                    f"Host: plain.test:{world.plain.port}\r\n\r\n".encode())  # fmt: skip
    await wire.stream.send_eof()  # type: ignore[attr-defined]
    assert (await read_response(wire))[2] == b"GET /h 0"
    assert await wire.rest() == b""


async def test_websocket(world: World) -> None:
    """101 through, the credential in the handshake, then bytes both ways and the end of each side."""

    async def answer(request: Request, wire: Wire) -> bool:
        assert request.all("upgrade") == ["websocket"]
        assert request.all("connection") == ["upgrade"]
        assert request.all("authorization") == [f"Bearer {SECRET}"]
        await wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        b"Sec-WebSocket-Accept: x\r\n\r\nhello")  # fmt: skip
        while True:
            data = await wire.stream.receive_some(65536)
            if not data:
                return False
            await wire.send(bytes(data.upper()))

    world.origin.answers["/ws"] = answer
    wire = await world.tls()
    head = f"GET /ws HTTP/1.1\r\n{H}Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n"
    status, fields, _ = await world.ask(wire, head.encode() + b"early")
    assert (status, fields["upgrade"], fields["sec-websocket-accept"]) == (101, "websocket", "x")
    assert await wire.exactly(10) == b"helloEARLY"
    blob = b"ab" * 200_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.send, blob)
        assert await wire.exactly(len(blob)) == blob.upper()


async def test_upgrade_not_taken(world: World) -> None:
    wire = await world.tls()
    head = f"GET /no HTTP/1.1\r\n{H}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert (await world.ask(wire, head.encode()))[0] == 200
    assert (await world.ask(wire, f"GET /next HTTP/1.1\r\n{H}\r\n".encode()))[2] == b"GET /next 0"


async def test_events_are_not_held_back(world: World) -> None:
    """Each event arrives before the next is sent: the host waits until the client has seen it."""
    seen = trio.open_memory_channel[None](0)

    async def answer(request: Request, wire: Wire) -> bool:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for n in range(50):
            await wire.send(b"data: %d\n\n" % n)
            await seen[1].receive()
        return False

    world.origin.answers["/sse"] = answer
    wire = await world.tls()
    await wire.send(f"GET /sse HTTP/1.1\r\n{H}\r\n".encode())
    await wire.until(b"\r\n\r\n")
    for n in range(50):
        size = int(await wire.until(b"\r\n"), 16)
        assert await wire.exactly(size) == b"data: %d\n\n" % n
        await wire.exactly(2)
        await seen[0].send(None)


BAD_RESPONSES = {
    "garbage": b"hello\r\n\r\n",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 1\n\nx",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "unasked 101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "fold": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    "endless 1xx": b"HTTP/1.1 102 Processing\r\n\r\n" * 100,
}


@pytest.mark.parametrize("name", BAD_RESPONSES)
async def test_bad_response(world: World, name: str) -> None:
    says(BAD_RESPONSES[name], origin=world.origin, path="/bad")
    wire = await world.tls()
    await wire.send(f"GET /bad HTTP/1.1\r\n{H}\r\n".encode())
    while (found := await read_response(wire))[0] < 200:
        pass
    assert (found[0], found[1]["x-hypeman-egress"]) == (502, "upstream_response")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    ],
)
async def test_cut_off_response_looks_cut_off(world: World, data: bytes) -> None:
    """Never completed by us: the client must notice."""
    says(data, close=True, origin=world.origin, path="/cut")
    wire = await world.tls()
    await wire.send(f"GET /cut HTTP/1.1\r\n{H}\r\n".encode())
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        await read_response(wire)


async def test_end_of_tcp_is_not_the_end_of_a_response(world: World) -> None:
    """A response without a length ends with TLS's close_notify; without that, anyone could have cut it."""

    async def answer(request: Request, wire: Wire) -> bool:
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\npart of it")
        await trio.aclose_forcefully(wire.stream)
        return False

    world.origin.answers["/cut"] = answer
    wire = await world.tls()
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        await world.ask(wire, f"GET /cut HTTP/1.1\r\n{H}\r\n".encode())


async def test_closed_without_an_answer(world: World) -> None:
    says(b"", close=True, origin=world.origin, path="/gone")
    status, fields, _ = await world.get("/gone")
    assert (status, fields["x-hypeman-egress"]) == (502, "upstream_closed")


async def test_kept_connection_that_died(world: World) -> None:
    """A request on a kept connection that the host closes just then is repeated on a new one, once, if it may be."""
    dropped = 0

    async def answer(request: Request, wire: Wire) -> bool | None:
        nonlocal dropped
        if request.connection == 1:
            dropped += 1
            return False
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return None

    world.origin.answers["/again"] = answer
    wire = await world.tls()
    await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    assert (await world.ask(wire, f"GET /again HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
    assert (dropped, world.origin.connections) == (1, 2)


async def test_post_is_not_repeated(world: World) -> None:
    async def answer(request: Request, wire: Wire) -> bool:
        return False

    world.origin.answers["/again"] = answer
    wire = await world.tls()
    await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    assert (await world.ask(wire, f"POST /again HTTP/1.1\r\n{H}Content-Length: 0\r\n\r\n".encode()))[0] == 502
    assert len(world.origin.requests) == 2


async def test_alt_svc_is_taken_out(world: World) -> None:
    """It would send the client to QUIC, which has no way out."""
    says(b'HTTP/1.1 200 OK\r\nAlt-Svc: h3=":443"\r\nContent-Length: 0\r\n\r\n', origin=world.origin, path="/a")
    assert "alt-svc" not in (await world.get("/a"))[1]


async def test_large_both_ways(world: World) -> None:
    """64 MB each way, checked at the end; what waits in the proxy stays small (see test_slow.py)."""
    size = 64 << 20
    piece = bytes(range(256)) * 256

    async def answer(request: Request, wire: Wire) -> None:
        got = 0
        while got < size:
            got += len(wire.data)
            wire.data = b""
            if got < size:
                await wire.more()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(piece)):
            await wire.send(piece)

    world.origin.answers["/big"] = answer
    wire = await world.tls()
    await wire.send(f"PUT /big HTTP/1.1\r\n{H}Content-Length: {size}\r\n\r\n".encode())
    for _ in range(size // len(piece)):
        await wire.send(piece)
    await wire.until(b"\r\n\r\n")
    got = len(wire.data)
    wire.data = b""
    while got < size:
        assert await wire.more()
        got += len(wire.data)
        wire.data = b""
    assert got == size
    counters = (await world.egress.statistics()).counters
    assert (await world.get("/after"))[0] == 200
    assert counters["audit_lost"] == 0
