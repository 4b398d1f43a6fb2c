"""What an intermediary must not let happen between a guest and a host: bodies taken for requests, tunnels to other
ports, names that are one to a host, forged reasons, resets without end, alerts that get lost."""

from __future__ import annotations

import ssl
import struct
from functools import partial

import h2.exceptions
import pytest
import trio
import trustme

from tests.egress.conftest import GUEST, HOST, PORTS, SECRET, Request, Wire, World, credential, read_response
from tests.egress.test_connect import RESET, connect
from tests.egress.test_http1 import says
from tests.egress.test_http2 import client

H = f"Host: {HOST}\r\n"
SMUGGLED = b"POST /notes HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\n\r\n"


# A body that a host leaves unread must not become its next request, with our credential as the content.


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "REPORT"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("version", [1, 2])
async def test_body_that_the_method_does_not_define(world: World, method: str, framing: str, version: int) -> None:
    """The host answers the head and takes the body for the next request; ours goes elsewhere."""

    async def ignore_the_body(request: Request, wire: Wire) -> None:
        if request.all("transfer-encoding"):
            await wire.until(b"\r\n")  # a host that knows of chunks as little as of the body
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    world.origin.answers["/unread"] = ignore_the_body
    if version == 1:
        wire = await world.tls()
        body = SMUGGLED if framing == "length" else b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        said = f"Content-Length: {len(body)}" if framing == "length" else "Transfer-Encoding: chunked"
        head = f"{method} /unread HTTP/1.1\r\n{H}{said}\r\n\r\n".encode()
        assert (await world.ask(wire, head + body, head_only=True))[0] == 200
    else:
        peer = await client(world)
        fields = (("content-length", str(len(SMUGGLED))),) if framing == "length" else ()
        stream = await peer.ask(*fields, method=method, path="/unread", body=SMUGGLED)
        assert (await peer.answer(stream))[0] == 200
    assert (await world.get("/second"))[0] == 200
    first, second = (next(r for r in world.origin.requests if r.target == path) for path in ("/unread", "/second"))
    assert first.connection != second.connection
    assert first.all("connection") == ["close"]
    assert second.all("authorization") == [f"Bearer {SECRET}"]
    assert not [r for r in world.origin.requests if r.target == "/notes" and r.body]


async def test_answer_before_the_body_was_read(world: World) -> None:
    """A host that answers an upload at its first bytes and reads no more: its connection serves nobody else."""

    async def hasty(request: Request, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    world.origin.answers["/hasty"] = hasty
    wire = await world.tls()
    await wire.send(f"POST /hasty HTTP/1.1\r\n{H}Content-Length: {len(SMUGGLED)}\r\n\r\n".encode())
    assert (await read_response(wire))[0] == 200
    await wire.send(SMUGGLED)
    assert (await world.ask(wire, f"GET /second HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
    assert not [r for r in world.origin.requests if r.target == "/notes" and r.body]
    hasty_on = next(r.connection for r in world.origin.requests if r.target == "/hasty")
    assert next(r.connection for r in world.origin.requests if r.target == "/second") != hasty_on


async def test_connections_of_read_bodies_are_kept(world: World) -> None:
    wire = await world.tls()
    for method in ("POST", "PUT", "PATCH"):
        assert (await world.ask(wire, f"{method} / HTTP/1.1\r\n{H}Content-Length: 2\r\n\r\nab".encode()))[0] == 200
    assert world.origin.connections == 1


# Mode all: the proxy is the only way out by TCP.


async def closed(world: World, *, ports: tuple[int, ...] = ()) -> None:
    PORTS[:] = [world.origin.port, *ports]
    await world.egress.set_policy("inst-a", GUEST, {"K": credential(HOST)}, {"REAL_KEY": SECRET}, web_only=True)


async def test_ports_in_mode_all(world: World) -> None:
    """CONNECT to the port of HTTPS and absolute form to 80; a rule opens its own ports to its own hosts."""
    await closed(world)
    _, status, fields = await connect(world, "other.test:25")
    assert (status, fields["x-hypeman-egress"]) == (403, "port_denied")
    _, status, fields = await connect(world, f"{HOST}:{world.plain.port}")
    assert (status, fields["x-hypeman-egress"]) == (403, "port_denied")
    target = f"{HOST}:{world.plain.port}"
    for name in ("other.test", HOST):
        status, fields, _ = await world.ask(
            await world.tcp(),
            f"GET http://{name}:{world.plain.port}/ HTTP/1.1\r\nHost: {name}:{world.plain.port}\r\n\r\n".encode(),
        )
        assert (status, fields["x-hypeman-egress"]) == (403, "port_denied")
    assert world.plain.connections == 0
    await closed(world, ports=(world.plain.port,))
    status, _, _ = await world.ask(
        await world.tcp(), f"GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
    )
    assert status == 200
    assert (await connect(world, f"{HOST}:{world.origin.port}"))[1] == 200
    assert (await connect(world, f"other.test:{world.origin.port}"))[1] == 200  # HTTPS, to whatever host


async def test_ports_without_mode_all(world: World) -> None:
    """There other TCP is open anyway, so the proxy carries it as well."""
    assert (await connect(world, f"other.test:{world.origin.port}"))[1] == 200
    target = f"other.test:{world.plain.port}"
    status, _, _ = await world.ask(
        await world.tcp(), f"GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
    )
    assert status == 200


async def test_credential_is_for_its_ports_only(world: World) -> None:
    """The same host at another port is another service: passed through, nothing added."""
    PORTS[:] = [world.origin.port + 1]
    await world.allow()
    world.guest_trust.check_hostname = False
    world.guest_trust.verify_mode = ssl.CERT_NONE
    assert (await world.get())[0] == 200
    assert world.origin.requests[0].all("authorization") == []


async def test_hello_without_a_name_is_no_tunnel(world: World) -> None:
    """Neither behind CONNECT nor to an address."""
    await closed(world)
    wire, status, _ = await connect(world, f"other.test:{world.origin.port}")
    assert status == 200
    world.guest_trust.check_hostname = False
    world.guest_trust.verify_mode = ssl.CERT_NONE
    with pytest.raises((*RESET, ssl.SSLError)):
        await world.tls(None, over=wire)
    assert (await world.egress.statistics()).denied["no_server_name"] == 1
    _, status, fields = await connect(world, f"127.0.0.1:{world.origin.port}")
    assert (status, fields["x-hypeman-egress"]) == (403, "address_literal")
    assert world.origin.requests == []


HELLO = b"\x16\x03\x01"


async def test_host_must_answer_in_tls(world: World) -> None:
    """A ClientHello opens no way for other protocols: a mail server gets the hello and not one byte of mail."""
    heard = b""
    greeted = trio.Event()

    async def mail(stream: trio.SocketStream) -> None:
        nonlocal heard
        await stream.send_all(b"220 mail.test ESMTP\r\n")
        greeted.set()
        try:
            async for data in stream:
                heard += data
        except trio.BrokenResourceError:
            pass

    listeners = await world.nursery.start(
        partial(trio.serve_tcp, mail, 0, host="127.0.0.1", handler_nursery=world.nursery)
    )
    port = listeners[0].socket.getsockname()[1]
    wire, status, _ = await connect(world, f"mail.test:{port}")
    assert status == 200
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    talk = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="mail.test")
    with pytest.raises(ssl.SSLWantReadError):
        talk.do_handshake()
    await wire.send(outgoing.read() + b"EHLO guest\r\nMAIL FROM:<a@b>\r\n")
    await greeted.wait()
    with pytest.raises(RESET):
        assert b"220" not in await wire.rest()
        raise EOFError
    assert heard.startswith(HELLO) or heard == b""
    assert b"EHLO" not in heard
    assert (await world.egress.statistics()).counters["passed_through"] == 0


# What a host may say, and what it must not.


@pytest.mark.parametrize("status", [600, 799, 999])
@pytest.mark.parametrize("version", [1, 2])
async def test_status_without_a_class(world: World, status: int, version: int) -> None:
    """RFC 9110 15: treated as a 5xx, so carried like one."""
    says(b"HTTP/1.1 %d Odd\r\nContent-Length: 2\r\n\r\nhi" % status, origin=world.origin, path="/odd")
    if version == 1:
        assert (await world.get("/odd"))[::2] == (status, b"hi")
    else:
        peer = await client(world)
        assert (await peer.answer(await peer.ask(path="/odd")))[::2] == (status, b"hi")


async def test_hosts_do_not_give_our_reasons(world: World) -> None:
    says(b"HTTP/1.1 403 No\r\nX-Hypeman-Egress: host_denied\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"0\r\nX-Hypeman-Egress: rate_limited\r\n\r\n", origin=world.origin, path="/forged")  # fmt: skip
    status, fields, _ = await world.get("/forged")
    assert (status, fields.get("x-hypeman-egress"), fields.get("(trailers)")) == (403, None, None)
    peer = await client(world)
    assert "x-hypeman-egress" not in (await peer.answer(await peer.ask(path="/forged")))[1]


# One name to CGI and its like.


@pytest.mark.parametrize("version", [1, 2])
async def test_names_that_are_one_variable(world: World, version: int) -> None:
    """X_Api-Key and X-Api-Key are both HTTP_X_API_KEY to many hosts: the guest's goes with the other spelling."""
    await world.allow(K=credential(HOST, header="X-Api-Key", template="${value}"))
    if version == 1:
        await world.get(fields="X_Api_Key: mine\r\nx-api_key: mine\r\nX_Api: other\r\n")
    else:
        peer = await client(world)
        await peer.answer(await peer.ask(("x_api_key", "mine"), ("x-api_key", "mine"), ("x_api", "other")))
    fields = world.origin.requests[0].fields
    assert [value for name, value in fields if name.replace("_", "-") == "x-api-key"] == [SECRET]
    assert "x_api" in [name for name, _ in fields]


# HTTP/2 in front of HTTP/1.


async def test_cookie_crumbs_are_joined(world: World) -> None:
    await world.egress.set_policy("inst-a", GUEST, {}, {}, 1)  # type: ignore[arg-type]
    peer = await client(world)
    fields = (("cookie", "a=1"), ("x-mine", "1"), ("cookie", "b=2"), ("cookie", "c=3"))
    assert (await peer.answer(await peer.ask(*fields)))[0] == 200
    assert world.origin.requests[0].all("cookie") == ["a=1; b=2; c=3"]


@pytest.mark.parametrize("path", ["/a#b", "/a b", "/\u00e9", "/\x7f", "*"])
async def test_paths_as_strict_as_in_http1(world: World, path: str) -> None:
    peer = await client(world)
    status, fields, _ = await peer.answer(await peer.ask(path=path))
    assert status in (0, 400)
    assert fields.get("x-hypeman-egress", "bad_request") == "bad_request"
    assert world.origin.requests == []


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


PROVOKED = {
    "window update of zero": lambda stream: frame(8, 0, stream, struct.pack(">I", 0)),
    "window overflow": lambda stream: frame(8, 0, stream, struct.pack(">I", 2**31 - 1)) * 2,
    "priority of a wrong size": lambda stream: frame(2, 0, stream, b"1234"),
    "depends on itself": lambda stream: frame(2, 0, stream, struct.pack(">IB", stream, 1)),
    "data after the end": lambda stream: frame(0, 0, stream, b"x"),
    "reset by the client": lambda stream: frame(3, 0, stream, struct.pack(">I", 8)),
}


@pytest.mark.parametrize("how", PROVOKED)
async def test_provoked_resets_are_the_guests(world: World, how: str) -> None:
    """However streams are made to end early, of thousands at once most never reach the host."""

    async def never(request: Request, wire: Wire) -> None:
        await wire.more()

    world.origin.answers["/never"] = never
    peer = await client(world)
    asked = 0
    try:
        while asked < 5000:
            stream = await peer.ask(path="/never")
            asked += 1
            await peer.wire.send(PROVOKED[how](stream))
            peer.http.streams.pop(stream, None)
            if asked % 50 == 0:
                with trio.move_on_after(0.02):
                    await peer.wire.stream.receive_some(65536)
    except (trio.BrokenResourceError, trio.ClosedResourceError, h2.exceptions.ProtocolError, ssl.SSLError):
        pass
    assert asked < 5000 or len(world.origin.requests) < 2500
    assert (await world.get())[0] == 200


# What RFC 9110 and 9112 ask of an intermediary.


async def test_via(world: World) -> None:
    """Added behind what is there, with the version that was received."""
    says(b"HTTP/1.1 200 OK\r\nVia: 1.1 cdn\r\nContent-Length: 0\r\n\r\n", origin=world.origin, path="/v")
    wire = await world.tls()
    await wire.send(f"GET /v HTTP/1.0\r\n{H}Via: 1.1 before\r\nConnection: keep-alive\r\n\r\n".encode())
    head = await wire.until(b"\r\n\r\n")
    assert [line for line in head.split(b"\r\n") if line.startswith(b"Via")] == [b"Via: 1.1 cdn", b"Via: 1.1 hypeman"]
    assert world.origin.requests[0].all("via") == ["1.1 before", "1.0 hypeman"]
    peer = await client(world)
    assert (await peer.answer(await peer.ask()))[1]["via"] == "1.1 hypeman"
    assert world.origin.requests[1].all("via") == ["2 hypeman"]


@pytest.mark.parametrize("version", [1, 2])
async def test_max_forwards(world: World, version: int) -> None:
    """Counts for OPTIONS and TRACE: one less for the next, and none is left for a next at 0."""

    async def ask(value: str, method: str = "OPTIONS") -> tuple[int, dict[str, str], bytes]:
        if version == 2:
            peer = await client(world)
            return await peer.answer(await peer.ask(("max-forwards", value), method=method))
        wire = await world.tls()
        return await world.ask(wire, f"{method} / HTTP/1.1\r\n{H}Max-Forwards: {value}\r\n\r\n".encode())

    assert (await ask("0"))[::2] == (200, b"")
    assert (await ask("0", "TRACE"))[0] == 405
    assert (await ask("x"))[0] == 400
    assert world.origin.requests == []
    assert (await ask("7"))[0] == 200
    assert (await ask("7", "GET"))[0] == 200
    assert [request.all("max-forwards") for request in world.origin.requests] == [["6"], ["7"]]


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [("GET", "", "/"), ("GET", "?q", "/?q"), ("GET", "/p?q", "/p?q"), ("OPTIONS", "", "*"), ("OPTIONS", "/", "/")],
)
async def test_absolute_form(world: World, method: str, path: str, wanted: str) -> None:
    """Its host counts and Host is ignored (RFC 9112 3.2.2); an empty path is / or, for OPTIONS, * (3.2.4)."""
    target = f"http://plain.test:{world.plain.port}{path}"
    wire = await world.tcp()
    status, _, _ = await world.ask(wire, f"{method} {target} HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n".encode())
    assert status == 200
    request = world.plain.requests[0]
    assert (request.target, request.all("host")) == (wanted, [f"plain.test:{world.plain.port}"])
    assert world.asked == ["plain.test"]


# Alerts say what was wrong.


async def test_alert_of_a_refused_certificate(world: World) -> None:
    """A host whose certificate we refuse reads why, instead of a reset."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert(HOST).configure_cert(context)
    said: list[str] = []

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            await stream.do_handshake()
            await stream.receive_some(1)
        except trio.BrokenResourceError as error:
            said.append(str(error.__cause__))

    listeners = await world.nursery.start(
        partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1", handler_nursery=world.nursery)
    )
    port = listeners[0].transport_listener.socket.getsockname()[1]
    PORTS.append(port)
    await world.allow()
    wire, _, _ = await connect(world, f"{HOST}:{port}")
    status, fields, _ = await world.ask(await world.tls(over=wire), f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    assert (status, fields["x-hypeman-egress"]) == (502, "upstream_certificate")
    while not said:
        await trio.sleep(0.01)
    assert "alert unknown ca" in said[0].lower()


async def test_alert_in_the_middle(world: World) -> None:
    """A record that cannot be opened is answered with an alert on either side."""
    wire = await world.tls()
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
    raw = wire.stream.transport_stream  # type: ignore[attr-defined]
    await raw.send_all(b"\x17\x03\x03\x00\x40" + bytes(64))
    with pytest.raises(trio.BrokenResourceError) as caught:
        await wire.stream.receive_some(1)
    assert "bad record mac" in str(caught.value.__cause__).lower()
