"""TLS passed through by its server name: the guest has the certificate, and nothing of a connection is opened."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme

from hypeman._native.egress import Sites
from hypeman.egress.service import Timeouts
from hypeman.ingress.routing import Route, compile_routes
from tests.ingress.test_certificates import NOW
from tests.ingress.test_proxy import Guest, World, http_guest, shows_head, world
from tests.ingress.test_tls import Alert, Secure, alert_record, hello_of, secure

ROOT, OTHER = trustme.CA(), trustme.CA()
PATIENT = Timeouts()


async def put(here: World, hostname: str, instance: str = "a", port: int = 0, redirect: int = 0) -> None:
    route = Route(hostname, 80, instance, port or here.guest_port, tls_passthrough=True, redirect=redirect)
    await here.egress.front.put(hostname, compile_routes([route]))


def server_context(*protocols: str) -> ssl.SSLContext:
    """It requires a client certificate, which only the client at the other end can show."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ROOT.issue_cert("raw.test", "*.raw.test").configure_cert(context)
    OTHER.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(protocols or ["own/1"])
    return context


async def echo(stream: trio.SSLStream[trio.SocketStream]) -> None:
    with suppress(trio.BrokenResourceError):
        async for piece in stream:
            await stream.send_all(piece)
        await stream.aclose()


@asynccontextmanager
async def passing(guest: Guest | None = None, timeouts: Timeouts = PATIENT) -> AsyncIterator[World]:
    """The site raw.test; without ``guest`` a server of TLS is behind it."""
    async with world(guest or http_guest(shows_head), timeouts) as here, trio.open_nursery() as nursery:
        port = 0
        if guest is None:
            listeners = await nursery.start(
                partial(trio.serve_ssl_over_tcp, echo, 0, server_context(), host="127.0.0.1")
            )
            port = listeners[0].transport_listener.socket.getsockname()[1]
        await put(here, "raw.test", port=port)
        await put(here, "{x}.raw.test", port=port)
        yield here
        nursery.cancel_scope.cancel()


async def connect(here: World, name: str = "raw.test") -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context()
    ROOT.configure_trust(context)
    OTHER.issue_cert("client").configure_cert(context)
    context.set_alpn_protocols(["own/1"])
    stream = trio.SSLStream(await here.connect(), context, server_hostname=name)
    await stream.do_handshake()
    return stream


async def test_the_guest_ends_tls() -> None:
    """Its certificate, its protocol, the client's certificate, and every byte in both directions."""
    data = bytes(range(256)) * 20_000
    async with passing() as here:
        async with await connect(here) as stream:
            assert stream.selected_alpn_protocol() == "own/1"
            received = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                while len(received) < len(data):
                    received += await stream.receive_some(65536)
            assert received == data
        served = await here.logged()
        assert (served.ingress, served.host, served.instance) == ("raw.test", "raw.test", "a")
        assert (served.passed, served.status, served.client, served.method) == (True, 0, "127.0.0.1", "")
        assert min(served.received, served.sent) > len(data)
        async with await connect(here, "any.raw.test"):
            pass
        assert (await here.logged(2)).host == "any.raw.test"


async def test_who_else_knocks() -> None:
    """Plain requests, other names, none, and what is no hello."""
    async with passing() as here:
        await put(here, "moved.test", redirect=443)
        assert (await here.get("raw.test"))[0].status_code == 403
        response, _ = await here.get("moved.test", path="/x")
        assert (response.status_code, dict(response.headers)[b"location"]) == (308, b"https://moved.test/x")
        for sent, alert in [
            (hello_of("other.test"), Alert.UNRECOGNIZED_NAME),
            (hello_of(None), Alert.UNRECOGNIZED_NAME),
            (hello_of("a.b.raw.test"), Alert.UNRECOGNIZED_NAME),
            (b"\x16\x03\x01\x00\x05\x02\x00\x00\x01x", Alert.DECODE_ERROR),
        ]:
            async with await here.connect() as stream:
                await stream.send_all(sent)
                assert await stream.receive_some(100) == alert_record(alert)
        assert here.asked == []


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def answers_in_http(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("instance", "status", "alert"),
    [
        ("down", 503, Alert.INTERNAL_ERROR),
        ("gone", 503, Alert.INTERNAL_ERROR),
        ("{x}", 404, Alert.UNRECOGNIZED_NAME),
        ("a", 502, Alert.INTERNAL_ERROR),
    ],
)
async def test_guests_that_cannot_be_reached(instance: str, status: int, alert: Alert) -> None:
    async with passing(silent) as here:
        await put(here, "{x}.far.test", instance, port=1)
        async with await here.connect() as stream:
            await stream.send_all(hello_of("some.far.test"))
            assert await stream.receive_some(100) == alert_record(alert)
            assert await stream.receive_some(100) == b""
        served = await here.logged()
        assert (served.passed, served.status, served.host) == (True, status, "some.far.test")


async def test_a_guest_that_speaks_no_tls() -> None:
    """No tunnel for other protocols: the client gets an alert, and none of the guest's bytes."""
    async with passing(answers_in_http) as here, await here.connect() as stream:
        await stream.send_all(hello_of("raw.test") + b"not for a guest that is not one of TLS")
        assert await stream.receive_some(100) == alert_record(Alert.INTERNAL_ERROR)
        assert (await here.logged()).status == 502


async def test_a_client_that_leaves() -> None:
    arrived, left = trio.Event(), trio.Event()

    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        arrived.set()
        with suppress(trio.BrokenResourceError):
            assert await stream.receive_some(65536) == b""
        left.set()

    async with passing(guest) as here:
        async with await here.connect() as stream:
            await stream.send_all(hello_of("raw.test"))
            await arrived.wait()
        await left.wait()
        while await here.counted("clients"):
            await trio.sleep(0.01)
        assert (await here.logged()).passed


async def test_an_instance_that_ends_midway() -> None:
    async with passing() as here, await connect(here) as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some(10) == b"x"
        here.egress.front.forget(["a"], ended=True)
        assert await stream.receive_some(10) == b""
        assert (await here.logged()).passed


@pytest.mark.parametrize("established", [False, True])
async def test_a_dropped_ingress_ends_its_connections(established: bool) -> None:
    async with passing(None if established else silent) as here:
        stream = (await connect(here)).transport_stream if established else await here.connect()
        async with stream:
            if not established:
                await stream.send_all(hello_of("raw.test"))
                while not here.asked:
                    await trio.sleep(0.01)
            await here.egress.front.drop("raw.test")
            with pytest.raises(trio.BrokenResourceError):
                while await stream.receive_some(65536):
                    pass
        assert (await here.logged()).passed
        while await here.counted("clients"):
            await trio.sleep(0.01)


async def test_a_silent_guest_is_not_waited_for() -> None:
    async with passing(silent, Timeouts(handshake=1)) as here, await here.connect() as stream:
        await stream.send_all(hello_of("raw.test"))
        assert await stream.receive_some(100) == alert_record(Alert.INTERNAL_ERROR)
        assert (await here.logged()).status == 504


async def test_a_public_ca_meets_who_asked_it(tmp_path: Path) -> None:
    """TLS-ALPN-01 goes to the guest, which may have a certificate from a CA of its own, unless we asked for one."""
    seen: list[bytes] = []

    async def guest(stream: trio.SocketStream) -> None:
        seen.append(await stream.receive_some(65536))

    async with secure(tmp_path, guest) as here:
        await put(here.here, "s.test")
        hello = hello_of("s.test", "acme-tls/1")
        await acme(here, hello)
        assert seen == [hello]
        pair = here.ca.issue("s.test", NOW)
        await here.front.challenge("s.test", "t", "p", pair.chain, pair.key)
        async with await here.connect("s.test", here.context("acme-tls/1")) as stream:
            assert stream.selected_alpn_protocol() == "acme-tls/1"
        assert len(seen) == 1


async def acme(here: Secure, hello: bytes) -> None:
    async with await here.here.connect() as stream:
        await stream.send_all(hello)
        with trio.fail_after(60):
            assert await stream.receive_some(100) == alert_record(Alert.INTERNAL_ERROR)


def test_unknown_ways_of_tls_are_refused() -> None:
    routes = bytearray(compile_routes([Route("a.b", 1, "web", 2, tls_passthrough=True)]))
    assert routes[10] == 2
    routes[10] = 3
    with pytest.raises(ValueError, match="no routes"):
        Sites().put(b"x", bytes(routes))
