"""HTTP/2 on both sides, played by the library h2: one decision per stream, trailers, flow control, resets."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trustme

from hypeman.egress.service import Timeouts
from tests.egress.conftest import GUEST, HOST, PORTS, SECRET, Request, Wire, World, credential

H2 = ("h2", "http/1.1")


class Peer:
    """One end of an HTTP/2 connection; events are collected per stream."""

    def __init__(self, wire: Wire, *, client: bool) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8", validate_outbound_headers=False,
                                           normalize_outbound_headers=False)  # fmt: skip
        self.wire = wire
        self.http = h2.connection.H2Connection(config)
        self.http.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.lock = trio.Lock()

    async def flush(self) -> None:
        async with self.lock:
            if data := self.http.data_to_send():
                await self.wire.send(data)

    async def pump(self) -> bool:
        """Reads once; acknowledges what was received."""
        data = await self.wire.stream.receive_some(65536)
        if not data:
            return False
        for event in self.http.receive_data(data):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await self.flush()
        return True

    async def ask(self, *fields: tuple[str, str], body: bytes | None = None, method: str = "GET", path: str = "/",
                  authority: str = HOST, scheme: str = "https", end: bool = True) -> int:  # fmt: skip
        stream = self.http.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", scheme), (":authority", authority), (":path", path)]
        self.http.send_headers(stream, [*pseudo, *fields], end_stream=body is None and end)
        if body is not None:
            self.http.send_data(stream, body, end_stream=end)
        await self.flush()
        return stream

    async def upload(self, stream: int, size: int) -> None:
        """A body, in pieces as large as the windows allow."""
        left = size
        while left:
            room = min(left, self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size)
            if room <= 0:
                await self.pump()
                continue
            self.http.send_data(stream, b"x" * room)
            left -= room
            await self.flush()
        self.http.end_stream(stream)
        await self.flush()

    def of(self, stream: int, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and event.stream_id == stream]

    async def answer(self, stream: int) -> tuple[int, dict[str, str], bytes]:
        while not (self.of(stream, h2.events.StreamEnded) or self.of(stream, h2.events.StreamReset)):
            if not await self.pump():
                raise EOFError
        head = self.of(stream, h2.events.ResponseReceived)
        fields = dict(head[0].headers) if head else {}
        data = b"".join(event.data for event in self.of(stream, h2.events.DataReceived))
        return int(fields.get(":status", 0)), fields, data


async def client(world: World, name: str = HOST, over: Wire | None = None) -> Peer:
    wire = await world.tls(name, alpn=H2, over=over)
    assert wire.stream.selected_alpn_protocol() == "h2"  # type: ignore[attr-defined]
    peer = Peer(wire, client=True)
    await peer.flush()
    return peer


class GrpcLike:
    """An origin that speaks HTTP/2 only: echoes bodies, ends with trailers, as gRPC does."""

    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[dict[str, str]] = []
        self.trailers: list[dict[str, str]] = []
        self.resets = 0
        self.port = 0
        self.read_slowly = False
        self.served = 1 << 30
        """Streams of a connection; the next it refuses by GOAWAY, or closes the connection over it if not `polite`."""
        self.polite = True
        self.at_once = 100

    async def serve(self, stream: trio.SSLStream[Any]) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == "h2"
            await self.talk(stream)

    async def talk(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        try:
            peer = Peer(Wire(stream), client=False)
            peer.http.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self.at_once})
            await peer.flush()
            bodies: dict[int, bytes] = {}
            while True:
                data = await stream.receive_some(65536)
                if not data:
                    return
                for event in peer.http.receive_data(data):
                    if getattr(event, "stream_id", 0) > self.served * 2:
                        if self.polite:
                            peer.http.close_connection(last_stream_id=self.served * 2 - 1)
                            await peer.flush()
                        return
                    await self._on(peer, event, bodies)
                await peer.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h2.exceptions.ProtocolError):
            return

    async def _on(self, peer: Peer, event: h2.events.Event, bodies: dict[int, bytes]) -> None:
        if isinstance(event, h2.events.RequestReceived):
            assert event.headers is not None
            head: dict[Any, Any] = dict(event.headers)
            self.heads.append(head)
            bodies[event.stream_id] = b""
            if head[":path"] == "/reset":
                peer.http.reset_stream(event.stream_id, 8)
            if head[":path"] == "/hints":
                for _ in range(1000):
                    peer.http.send_headers(event.stream_id, [(":status", "103")])
        elif isinstance(event, h2.events.DataReceived):
            bodies[event.stream_id] += event.data
            if not self.read_slowly and event.flow_controlled_length:
                peer.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            self.trailers.append(dict(event.headers))  # type: ignore[arg-type]
        elif isinstance(event, h2.events.StreamReset):
            self.resets += 1
        elif isinstance(event, h2.events.StreamEnded):
            body = bodies.pop(event.stream_id)
            peer.http.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
            if len(body) <= 16384:
                peer.http.send_data(event.stream_id, body)
            else:
                peer.http.send_data(event.stream_id, b"%d" % len(body))
            peer.http.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)


@pytest.fixture
async def grpc(world: World, origin_ca: trustme.CA) -> AsyncGenerator[GrpcLike]:
    """The origin of HOST speaks HTTP/2."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    origin_ca.issue_cert(HOST).configure_cert(context)
    context.set_alpn_protocols(["h2"])
    origin = GrpcLike()
    listeners = await world.nursery.start(
        partial(trio.serve_ssl_over_tcp, origin.serve, 0, context, host="127.0.0.1", handler_nursery=world.nursery)
    )
    origin.port = listeners[0].transport_listener.socket.getsockname()[1]
    PORTS.append(origin.port)
    await world.allow()
    yield origin


async def through(world: World, grpc: GrpcLike) -> Peer:
    wire = await world.tcp()
    status, _, _ = await world.ask(
        wire, f"CONNECT {HOST}:{grpc.port} HTTP/1.1\r\nHost: {HOST}:{grpc.port}\r\n\r\n".encode(), head_only=True
    )
    assert status == 200
    return await client(world, over=wire)


async def test_http2_to_http1(world: World) -> None:
    """A host without HTTP/2 gets HTTP/1; the head is rewritten by the same rules."""
    peer = await client(world)
    stream = await peer.ask(("authorization", "Bearer mock-API_KEY"), ("cookie", "a"), ("x-mine", "1"), path="/p?q")
    status, fields, body = await peer.answer(stream)
    assert (status, fields["content-length"], body) == (200, "10", b"GET /p?q 0")
    request = world.origin.requests[0]
    assert request.all("authorization") == [f"Bearer {SECRET}"]
    assert [name for name, _ in request.fields] == ["host", "x-mine", "via", "authorization"]


@pytest.mark.parametrize(("rules", "status"), [(7, 200), (16, 431)])
async def test_fields_of_rules_beyond_the_bound(world: World, rules: int, status: int) -> None:
    """A head that the fields of rules make too large is refused in both versions of HTTP; nothing is sent of it."""
    made: dict[str, Any] = {f"KEY{n}": credential(HOST, header=f"X-Key-{n}", template="${value}") for n in range(rules)}
    await world.allow(secret="s" * 8192, **made)
    peer = await client(world)
    found, fields, _ = await peer.answer(await peer.ask())
    assert (found, fields.get("x-hypeman-egress")) == (status, None if status == 200 else "head_too_large")
    assert (await world.get())[0] == status
    assert [len(request.all("x-key-0")[0]) for request in world.origin.requests] == [8192, 8192] * (status == 200)


@pytest.mark.parametrize("size", [0, 5, 20_000, 1_000_000])
async def test_bodies_to_http1(world: World, size: int) -> None:
    """With a length and without; window is granted as the host takes the bytes."""
    peer = await client(world)
    for fields in ((("content-length", str(size)),), ()):
        stream = await peer.ask(*fields, method="POST", path="/up", end=False)
        await peer.upload(stream, size)
        assert (await peer.answer(stream))[2] == f"POST /up {size}".encode()


async def test_many_streams(world: World) -> None:
    peer = await client(world)
    streams = [await peer.ask(path=f"/{n}") for n in range(60)]
    for n, stream in enumerate(streams):
        assert (await peer.answer(stream))[2] == f"GET /{n} 0".encode()
    again = [await peer.ask(path=f"/again/{n}") for n in range(60)]
    for stream in again:
        assert (await peer.answer(stream))[0] == 200
    assert all(request.all("authorization") == [f"Bearer {SECRET}"] for request in world.origin.requests)


async def test_large_response(world: World) -> None:
    size = 8 << 20

    async def answer(request: Request, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(size // 65536):
            await wire.send(b"10000\r\n" + bytes(65536) + b"\r\n")
        await wire.send(b"0\r\nX-Sum: 7\r\n\r\n")

    world.origin.answers["/big"] = answer
    peer = await client(world)
    stream = await peer.ask(path="/big")
    _, _, body = await peer.answer(stream)
    assert len(body) == size
    assert peer.of(stream, h2.events.TrailersReceived)[0].headers == [("x-sum", "7")]


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"authority": "evil.test"}, 421, "host_mismatch"),
        ({"authority": "www.example.com"}, 421, "host_mismatch"),
        ({"authority": f"{HOST}:1"}, 421, "host_mismatch"),
        ({"authority": "a%23.b"}, 400, "bad_host"),
        ({"scheme": "http"}, 400, "bad_request"),
        ({"method": "TRACE"}, 405, "method_not_allowed"),
        ({"path": "x"}, 400, "bad_request"),
    ],
)
async def test_refused_streams(world: World, change: dict[str, str], status: int, reason: str) -> None:
    """Only the stream is refused; the connection carries the next."""
    peer = await client(world)
    stream = await peer.ask(**change)  # type: ignore[arg-type]
    found, fields, body = await peer.answer(stream)
    if found:
        assert (found, fields["x-hypeman-egress"]) == (status, reason)
        assert reason.encode() in body
    else:
        assert peer.of(stream, h2.events.StreamReset)  # refused by nghttp2 itself
    assert (await peer.answer(await peer.ask()))[0] == 200
    assert len(world.origin.requests) == 1


@pytest.mark.parametrize("extended", [False, True])
async def test_connect_is_refused(world: World, extended: bool) -> None:
    """Neither a tunnel in a stream nor one of RFC 8441, which is not offered: WebSockets come over HTTP/1."""
    peer = await client(world)
    await peer.answer(await peer.ask())
    assert not peer.http.remote_settings.enable_connect_protocol
    stream = peer.http.get_next_available_stream_id()
    fields = [(":method", "CONNECT"), (":authority", HOST)]
    if extended:
        fields += [(":protocol", "websocket"), (":scheme", "https"), (":path", "/")]
    peer.http.send_headers(stream, fields)
    await peer.flush()
    status, said, _ = await peer.answer(stream)
    if extended:
        assert peer.of(stream, h2.events.StreamReset)[0].error_code == 1  # PROTOCOL_ERROR, as of anything not offered
    else:
        assert (status, said["x-hypeman-egress"]) == (405, "method_not_allowed")
    assert (await peer.answer(await peer.ask()))[0] == 200
    assert [request.method for request in world.origin.requests] == ["GET", "GET"]


async def test_host_field_beside_authority(world: World) -> None:
    peer = await client(world)
    assert (await peer.answer(await peer.ask(("host", "evil.test"))))[0] in (0, 400)
    assert (await peer.answer(await peer.ask(("host", HOST))))[0] == 200
    assert [request.all("host") for request in world.origin.requests] == [[f"{HOST}:{world.origin.port}"]]


@pytest.mark.parametrize("field", [("connection", "close"), ("transfer-encoding", "chunked"), ("upgrade", "x")])
async def test_connection_fields(world: World, field: tuple[str, str]) -> None:
    peer = await client(world)
    status, _, _ = await peer.answer(await peer.ask(field))
    assert status in (0, 400)
    assert world.origin.requests == []


async def test_interim_and_head(world: World) -> None:
    async def answer(request: Request, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")

    world.origin.answers["/i"] = answer
    peer = await client(world)
    stream = await peer.ask(path="/i")
    assert (await peer.answer(stream))[0] == 204
    assert peer.of(stream, h2.events.InformationalResponseReceived)
    status, fields, body = await peer.answer(await peer.ask(method="HEAD"))
    assert (status, fields["content-length"], body) == (200, "1234", b"")


async def test_grpc(world: World, grpc: GrpcLike) -> None:
    """HTTP/2 end to end: te and trailers pass, the credential is set, several calls share one connection."""
    peer = await through(world, grpc)
    fields = (("te", "trailers"), ("content-type", "application/grpc"))
    streams = [await peer.ask(*fields, method="POST", body=b"call %d" % n) for n in range(10)]
    for n, stream in enumerate(streams):
        status, _, body = await peer.answer(stream)
        assert (status, body) == (200, b"call %d" % n)
        assert peer.of(stream, h2.events.TrailersReceived)[0].headers == [("grpc-status", "0")]
    assert grpc.connections == 1
    assert {(head["authorization"], head["te"], head[":authority"]) for head in grpc.heads} == {
        (f"Bearer {SECRET}", "trailers", f"{HOST}:{grpc.port}")
    }


async def test_request_trailers(world: World, grpc: GrpcLike) -> None:
    """Carried where no credential is added; where one is, they could repeat its name and are dropped."""
    for credentials, wanted in (({"K": credential("elsewhere.test")}, [{"x-sum": "1"}]), ({"K": credential(HOST)}, [])):
        await world.egress.set_policy("inst-a", GUEST, credentials, {"REAL_KEY": SECRET}, 1)  # type: ignore[arg-type]
        grpc.trailers.clear()
        peer = await through(world, grpc)
        stream = await peer.ask(method="POST", body=b"x", end=False)
        peer.http.send_headers(stream, [("x-sum", "1")], end_stream=True)
        await peer.flush()
        assert (await peer.answer(stream))[::2] == (200, b"x")
        assert grpc.trailers == wanted


async def test_large_upload_to_http2(world: World, grpc: GrpcLike) -> None:
    peer = await through(world, grpc)
    stream = await peer.ask(method="POST", end=False)
    await peer.upload(stream, 3_000_000)
    assert (await peer.answer(stream))[2] == b"3000000"


async def test_long_upload_to_http1(make_world: Any) -> None:
    """The time without a byte begins anew with every byte, those of a request, too."""
    async with make_world(timeouts=Timeouts(stream=3)) as world:
        await world.allow()
        peer = await client(world)
        stream = await peer.ask(method="POST", path="/up", end=False)
        began = trio.current_time()
        size = 0
        while trio.current_time() < began + 3.5:
            peer.http.send_data(stream, b"x")
            await peer.flush()
            size += 1
            await trio.sleep(0.05)
        peer.http.end_stream(stream)
        await peer.flush()
        assert (await peer.answer(stream))[::2] == (200, f"POST /up {size}".encode())


async def test_slow_host_slows_the_client(world: World, grpc: GrpcLike) -> None:
    """A host that grants no window: the client may send a few windows' worth, not more."""
    grpc.read_slowly = True
    peer = await through(world, grpc)
    stream = await peer.ask(method="POST", end=False)
    sent = 0
    with trio.move_on_after(1.5):
        while True:
            room = min(peer.http.local_flow_control_window(stream), peer.http.max_outbound_frame_size)
            if room <= 0:
                await peer.pump()
                continue
            peer.http.send_data(stream, bytes(room))
            sent += room
            await peer.flush()
    assert 65535 <= sent <= 2_000_000


async def test_resets_both_ways(world: World, grpc: GrpcLike) -> None:
    """The host's code reaches the client; the client's cancel reaches the host."""
    peer = await through(world, grpc)
    stream = await peer.ask(path="/reset")
    status, fields, _ = await peer.answer(stream)
    assert (status, fields.get("x-hypeman-egress")) == (502, "upstream_closed")
    stream = await peer.ask(method="POST", body=b"x", end=False)
    while len(grpc.heads) < 2:
        await trio.sleep(0.01)
    peer.http.reset_stream(stream, 8)
    await peer.flush()
    while not grpc.resets:
        await trio.sleep(0.01)
    assert (await peer.answer(await peer.ask()))[0] == 200


@pytest.mark.parametrize("polite", [True, False])
async def test_host_that_closes_as_we_ask(world: World, grpc: GrpcLike, polite: bool) -> None:
    """What it cannot have seen is asked again on a new connection; what we kept no copy of, the client may repeat."""
    grpc.served, grpc.polite = 1, polite
    peer = await through(world, grpc)
    for _ in range(3):
        assert (await peer.answer(await peer.ask()))[0] == 200
    assert grpc.connections == 3
    stream = await peer.ask(method="POST", body=b"x")
    status, fields, _ = await peer.answer(stream)
    if polite:
        assert peer.of(stream, h2.events.StreamReset)[0].error_code == 7  # REFUSED_STREAM
    else:
        assert (status, fields["x-hypeman-egress"]) == (502, "upstream_closed")
    assert (await peer.answer(await peer.ask(method="POST", body=b"x")))[::2] == (200, b"x")


async def test_host_of_few_streams(world: World, grpc: GrpcLike) -> None:
    """More at once than it allows on a connection go over a second one, and wait for none of the others."""
    grpc.at_once = 2
    peer = await through(world, grpc)
    assert (await peer.answer(await peer.ask()))[0] == 200  # its settings are known
    for _ in range(2):
        await peer.ask(method="POST", body=b"x", end=False)
    assert (await peer.answer(await peer.ask()))[0] == 200
    assert grpc.connections == 2


async def test_hints_without_end(world: World, grpc: GrpcLike) -> None:
    """A host's interim responses are counted: a client that reads none of them would have us keep them all."""
    peer = await through(world, grpc)
    stream = await peer.ask(path="/hints")
    status, fields, _ = await peer.answer(stream)
    assert (status, fields["x-hypeman-egress"]) == (502, "upstream_response")
    assert len(peer.of(stream, h2.events.InformationalResponseReceived)) == 64
    assert (await peer.answer(await peer.ask()))[0] == 200


async def test_rotation_on_a_living_connection(world: World, grpc: GrpcLike) -> None:
    """The next stream carries the new value, on a new upstream connection."""
    peer = await through(world, grpc)
    await peer.answer(await peer.ask())
    await world.allow(secret="sk-new")
    await peer.answer(await peer.ask())
    assert [head["authorization"] for head in grpc.heads] == [f"Bearer {SECRET}", "Bearer sk-new"]
    assert grpc.connections == 2


@pytest.mark.parametrize("to_http2", [True, False])
async def test_rotation_under_load(world: World, grpc: GrpcLike, to_http2: bool) -> None:
    """Many streams at once on several connections; each names the newest value of when it was asked as its path."""
    both = {"A": credential(HOST), "B": credential(HOST, header="X-Key", template="${value}", env="OTHER_KEY")}
    current = answered = 0
    done = False

    async def put(number: int) -> None:
        value = f"sk-{number:06}"
        await world.egress.set_policy("inst-a", GUEST, both, {"REAL_KEY": value, "OTHER_KEY": value})

    async def load() -> None:
        nonlocal answered
        peer = await (through(world, grpc) if to_http2 else client(world))
        while not done:
            streams = [await peer.ask(path=f"/{current}") for _ in range(4)]
            for stream in streams:
                assert (await peer.answer(stream))[0] == 200
                answered += 1
            peer.events.clear()

    await put(0)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(load)
        for number in range(1, 25):
            await put(number)
            current = number
            enough = answered + 10
            while answered < enough:
                await trio.sleep(0.001)
        done = True
    sent = [(head[":path"], head["authorization"], head["x-key"]) for head in grpc.heads]
    sent += [
        (request.target, request.all("authorization")[0], request.all("x-key")[0]) for request in world.origin.requests
    ]
    assert len(sent) >= answered >= 240
    assert not [each for each in sent if each[1] != f"Bearer {each[2]}" or int(each[2][3:]) < int(each[0][1:])]


async def test_rapid_resets(world: World) -> None:
    """Thousands of streams opened and cancelled at once end the connection, not the proxy."""
    peer = await client(world)
    with pytest.raises((trio.BrokenResourceError, h2.exceptions.ProtocolError)):
        while True:
            stream = await peer.ask()
            peer.http.reset_stream(stream)
            await peer.flush()
            if stream % 100 == 1:
                with trio.move_on_after(0.02):
                    await peer.pump()
    assert (await world.get())[0] == 200


async def test_garbage(world: World) -> None:
    peer = await client(world)
    await peer.wire.send(b"\x00\x00\x05\x63\x00" + b"\xff" * 200)
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        while await peer.pump():
            pass
        raise EOFError
