"""gRPC by an ingress: HTTP/2 on the whole way, streams in both directions, trailers, and what ends a call."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
import trio

from hypeman.egress.service import Timeouts
from hypeman.ingress.routing import Route, compile_routes
from tests.egress.conftest import Wire
from tests.egress.lab_origins import make_grpc_server
from tests.egress.test_http2 import GrpcLike, Peer
from tests.ingress.test_proxy import QUICK, SECRET, Guest, World, http_guest, shows_head, world
from tests.ingress.test_tls import secure

GRPC = (("te", "trailers"), ("content-type", "application/grpc+proto"))


@asynccontextmanager
async def grpc_guest(here: World, *names: str, tls: bool = False) -> AsyncIterator[grpc.Server]:
    """The sites lead to a real server; it counts on its own threads."""
    server = make_grpc_server()
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for name in names:
        await here.egress.front.put(name, compile_routes([Route(name, 80, "a", port, tls=tls)]))
    try:
        yield server
    finally:
        await trio.to_thread.run_sync(server.stop(0).wait)


def call_all(channel: grpc.Channel) -> dict[str, Any]:
    """What the four kinds of calls bring, large messages, metadata at both ends, failures."""
    big = bytes(range(256)) * 12_000
    unary = channel.unary_unary("/lab.Echo/Unary")
    answer, call = unary.with_call(big, metadata=(("authorization", "Bearer x"),), timeout=60)
    result: dict[str, Any] = {"echoed": answer == big, "trailers": dict(call.trailing_metadata())}
    try:
        unary(b"fail", timeout=60)
    except grpc.RpcError as error:
        result["failed"] = [error.code().name, error.details()]
    result["server"] = sum(map(len, channel.unary_stream("/lab.Echo/Server")(b"300", timeout=60)))
    result["client"] = channel.stream_unary("/lab.Echo/Client")((bytes(100_000) for _ in range(50)), timeout=60)
    asked: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    both = channel.stream_stream("/lab.Echo/Both")(iter(asked.get, None), timeout=60)
    result["both"] = []
    for number in range(5):  # the next is said when the one before was answered: nothing is held back
        asked.put(b"%d" % number)
        result["both"].append(next(both))
    asked.put(None)
    result["end"] = both.code().name
    return result


CALLED = {
    "echoed": True, "trailers": {"x-credential": "1 others", "x-sum-bin": b"\x00\xff"},
    "failed": ["FAILED_PRECONDITION", "näh"], "server": sum(len(b"%d " % number) * 1000 for number in range(300)),
    "client": b"5000000", "both": [b"0", b"1", b"2", b"3", b"4"], "end": "OK",
}  # fmt: skip


async def test_all_calls_without_tls() -> None:
    """A client with prior knowledge of HTTP/2, on the same port as the others."""
    async with world(http_guest(shows_head)) as here, grpc_guest(here, "rpc.test"):
        options = (("grpc.default_authority", "rpc.test"),)
        with grpc.insecure_channel(f"127.0.0.1:{here.port}", options=options) as channel:
            assert await trio.to_thread.run_sync(call_all, channel) == CALLED
        served = await here.logged()
        assert (served.host, served.http, served.status, served.method) == ("rpc.test", 2, 200, "POST")
        assert (await here.get("a.test"))[0].status_code == 200


async def test_all_calls_over_tls(tmp_path: Path) -> None:
    async with secure(tmp_path) as here, grpc_guest(here.here, "s.test", tls=True):
        options = (("grpc.ssl_target_name_override", "s.test"), ("grpc.default_authority", "s.test"))
        credentials = grpc.ssl_channel_credentials(here.ca.root().encode())
        with grpc.secure_channel(f"127.0.0.1:{here.here.port}", credentials, options=options) as channel:
            assert await trio.to_thread.run_sync(call_all, channel) == CALLED


def failing_call(here: World, name: str) -> grpc.StatusCode:
    options = (("grpc.default_authority", name), ("grpc.enable_retries", 0))
    with (
        grpc.insecure_channel(f"127.0.0.1:{here.port}", options=options) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/lab.Echo/Unary")(b"x", timeout=60)
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_errors_that_clients_receive() -> None:
    """By the status of HTTP, which every client of gRPC translates: unavailable may be tried again."""
    async with world(http_guest(shows_head)) as here:
        for name, code in [
            ("down.test", grpc.StatusCode.UNAVAILABLE),
            ("refuses.test", grpc.StatusCode.UNAVAILABLE),
            ("nobody.test", grpc.StatusCode.UNIMPLEMENTED),
            ("locked.test", grpc.StatusCode.UNAUTHENTICATED),
        ]:
            assert await trio.to_thread.run_sync(failing_call, here, name) is code, name


@asynccontextmanager
async def peers(guest: Guest, timeouts: Timeouts = QUICK) -> AsyncIterator[tuple[World, Peer]]:
    """A client of our own, which can do what others do not."""
    async with world(guest, timeouts) as here, await here.connect() as stream:
        peer = Peer(Wire(stream), client=True)
        await peer.flush()
        yield here, peer


async def test_head_and_trailers() -> None:
    """What the guest gets, and that a client cannot claim in a trailer what it cannot in a header."""
    origin = GrpcLike()
    async with peers(origin.talk) as (here, peer):
        fields = (
            *GRPC,
            ("x-key", SECRET),
            ("x-forwarded-for", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
            ("x-mine", "1"),
        )
        stream = await peer.ask(*fields, method="POST", path="/p?q", authority="locked.test", scheme="http", end=False)
        peer.http.send_data(stream, b"12345")
        trailers = [("x-forwarded-proto", "https"), ("x-key", "y"), ("x_key", "y"), ("checksum", "c")]
        peer.http.send_headers(stream, trailers, end_stream=True)
        await peer.flush()
        status, _, body = await peer.answer(stream)
        assert (status, body) == (200, b"12345")
        assert peer.of(stream, h2.events.TrailersReceived)[0].headers == [("grpc-status", "0")]
        assert origin.heads == [{
            ":method": "POST", ":scheme": "http", ":authority": "locked.test", ":path": "/p?q", "te": "trailers",
            "content-type": "application/grpc+proto", "x-mine": "1", "x-forwarded-for": "127.0.0.1",
            "x-forwarded-proto": "http", "x-forwarded-host": "locked.test",
            "forwarded": 'for=127.0.0.1;host="locked.test";proto=http',
        }]  # fmt: skip
        assert origin.trailers == [{"checksum": "c"}]
        assert (await here.logged()).received == 5


@pytest.mark.parametrize("kind", ["application/grpc-web", "application/grpc-web+proto", "text/plain"])
async def test_other_types_go_by_http1(kind: str) -> None:
    async with peers(http_guest(shows_head)) as (_, peer):
        stream = await peer.ask(("content-type", kind), body=b"x", method="POST", authority="a.test", scheme="http")
        status, _, body = await peer.answer(stream)
        assert (status, body.splitlines()[0]) == (200, b"POST /")


async def test_many_streams_share_one_connection() -> None:
    origin = GrpcLike()
    async with peers(origin.talk) as (_, peer):
        streams = [await peer.ask(*GRPC, body=b"%d" % n, method="POST", authority="a.test", scheme="http")
                   for n in range(60)]  # fmt: skip
        for n, stream in enumerate(streams):
            assert (await peer.answer(stream))[2] == b"%d" % n
    assert origin.connections == 1


async def test_a_client_that_cancels_ends_the_call() -> None:
    origin = GrpcLike()
    async with peers(origin.talk) as (here, peer):
        stream = await peer.ask(*GRPC, method="POST", authority="a.test", scheme="http", end=False)
        with trio.fail_after(60):
            while not origin.heads:
                await trio.sleep(0.01)
            peer.http.reset_stream(stream, 8)
            await peer.flush()
            while not origin.resets:
                await trio.sleep(0.01)
        assert (await here.logged()).status == 499


async def test_a_guest_that_resets_a_call() -> None:
    async with peers(GrpcLike().talk) as (here, peer):
        stream = await peer.ask(*GRPC, body=b"x", method="POST", path="/reset", authority="a.test", scheme="http")
        assert (await peer.answer(stream))[0] == 502
        other = await peer.ask(*GRPC, body=b"x", method="POST", authority="a.test", scheme="http")
        assert (await peer.answer(other))[2] == b"x"
        await here.logged(2)
        assert [served.status for served in here.log] == [502, 200]


async def hangs_up(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.aclose()


async def answers_in_http1(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    await trio.sleep_forever()


async def sends_a_broken_frame(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"\0\0\0\4\0\0\0\0\0" + b"\0\0\4\10\0\0\0\0\0" + bytes(4))  # a window of nothing
    await trio.sleep_forever()


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("guest", "status"), [(hangs_up, 502), (answers_in_http1, 502), (sends_a_broken_frame, 502), (silent, 504)]
)
async def test_guests_that_fail(guest: Guest, status: int) -> None:
    async with peers(guest, Timeouts(stream=1)) as (here, peer):
        stream = await peer.ask(*GRPC, body=b"x", method="POST", authority="a.test", scheme="http")
        assert (await peer.answer(stream))[0] == status
        assert (await here.logged()).status == status


async def test_a_dropped_ingress_ends_its_calls() -> None:
    origin = GrpcLike()
    async with peers(origin.talk) as (here, peer):
        stream = await peer.ask(*GRPC, method="POST", authority="a.test", scheme="http", end=False)
        with trio.fail_after(60):
            while not origin.heads:
                await trio.sleep(0.01)
            await here.egress.front.drop("a.test")
            while not peer.of(stream, h2.events.StreamReset):
                assert await peer.pump()
            while not origin.resets:
                await trio.sleep(0.01)


async def test_an_instance_that_ends_midway() -> None:
    origin = GrpcLike()
    async with peers(origin.talk) as (here, peer):
        streams = [await peer.ask(*GRPC, method="POST", authority="a.test", scheme="http", end=False) for _ in range(3)]
        while len(origin.heads) < 3:
            await trio.sleep(0.01)
        here.egress.front.forget(["a"], ended=True)
        for stream in streams:
            assert (await peer.answer(stream))[0] == 503
        stream = await peer.ask(*GRPC, body=b"x", method="POST", authority="a.test", scheme="http")
        assert (await peer.answer(stream))[2] == b"x"
    assert origin.connections == 2


async def test_first_bytes_one_by_one() -> None:
    """The preface of HTTP/2, and what only begins like it."""
    async with world(http_guest(shows_head)) as here:
        async with await here.connect() as stream:
            peer = Peer(Wire(stream), client=True)
            for byte in peer.http.data_to_send():
                await stream.send_all(bytes((byte,)))
            asked = await peer.ask(authority="a.test", scheme="http")
            assert (await peer.answer(asked))[0] == 200
        for sent, status in [
            (b"P", None), (b"PRI * HTTP/2.0\r\n\r\nS", None), (b"PRI * HTTP/1.1\r\nHost: a.test\r\n\r\n", 400),
            (b"PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\n\r\n", 200),
        ]:  # fmt: skip
            async with await here.connect() as stream:
                for byte in sent:
                    await stream.send_all(bytes((byte,)))
                with trio.fail_after(60):
                    line = (await stream.receive_some(65536)).partition(b"\r\n")[0]
            assert (int(line.split()[1]) if line else None) == status, sent


async def test_the_scheme_is_the_connections(tmp_path: Path) -> None:
    async with secure(tmp_path) as here, await here.connect(context=here.context("h2")) as stream:
        peer = Peer(Wire(stream), client=True)
        asked = await peer.ask(authority="s.test", scheme="http")
        assert (await peer.answer(asked))[0] == 400
    async with peers(http_guest(shows_head)) as (_, peer):
        asked = await peer.ask(authority="a.test", scheme="https")
        assert (await peer.answer(asked))[0] == 400
