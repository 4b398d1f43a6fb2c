"""TLS in the data plane: which certificate, which alert, and that nothing is lost when certificates are exchanged."""

from __future__ import annotations

import enum
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.events
import h11
import pytest
import trio

from hypeman.ingress.certificates.internal import InternalCA
from hypeman.ingress.certificates.types import Pair
from hypeman.ingress.routing import Route, compile_routes
from tests.egress.conftest import Wire
from tests.egress.test_http2 import Peer
from tests.ingress.test_certificates import NOW
from tests.ingress.test_proxy import Guest, World, http_guest, response_of, shows_head, world


class Alert(enum.IntEnum):
    """Numbers of RFC 8446."""

    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


def alert_record(alert: Alert) -> bytes:
    """Fatal, before anything is encrypted."""
    return bytes((0x15, 3, 3, 0, 2, 2, alert))


class Secure:
    """An engine with the sites s.test (with tls), {x}.w.test (a wildcard), bare.test (no certificate), redirects."""

    def __init__(self, here: World, ca: InternalCA) -> None:
        self.here = here
        self.front = here.egress.front
        self.ca = ca

    async def certify(self, name: str) -> Pair:
        pair = self.ca.issue(name, NOW)
        await self.front.certify(name, pair.chain, pair.key)
        return pair

    def context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca.root())
        if protocols:
            context.set_alpn_protocols(protocols)
        return context

    async def connect(
        self, name: str | None = "s.test", context: ssl.SSLContext | None = None
    ) -> trio.SSLStream[trio.SocketStream]:
        context = context or self.context("http/1.1")
        if name is None:
            context.check_hostname = False
        stream = trio.SSLStream(await self.here.connect(), context, server_hostname=name, https_compatible=True)
        await stream.do_handshake()
        return stream

    async def get(self, host: str, name: str | None = None, *, path: str = "/") -> tuple[h11.Response, bytes]:
        async with await self.connect(name or host) as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return await response_of(stream)


@asynccontextmanager
async def secure(folder: Path, guest: Guest | None = None) -> AsyncIterator[Secure]:
    async with world(guest or http_guest(shows_head)) as here:

        def route(hostname: str, instance: str = "a", **more: Any) -> Route:
            return Route(hostname=hostname, port=80, instance=instance, target_port=here.guest_port, **more)

        for each in [
            route("s.test", tls=True), route("{x}.w.test", "a", tls=True), route("bare.test", tls=True),
            route("moved.test", redirect=443), route("own.test", tls=True, redirect=80), route("plain.test"),
        ]:  # fmt: skip
            await here.egress.front.put(each.hostname, compile_routes([each]))
        made = Secure(here, InternalCA(folder / "ca"))
        for name in ("s.test", "*.w.test", "plain.test"):
            await made.certify(name)
        yield made


def hello_of(name: str | None, *protocols: str) -> bytes:
    """As OpenSSL writes it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_requests_over_tls(tmp_path: Path, version: ssl.TLSVersion) -> None:
    async with secure(tmp_path) as here:
        context = here.context("http/1.1")
        context.minimum_version = context.maximum_version = version
        async with await here.connect(context=context) as stream:
            assert stream.selected_alpn_protocol() == "http/1.1"
            for _ in range(3):
                await stream.send_all(b"GET /x HTTP/1.1\r\nHost: s.test\r\n\r\n")
                response, body = await response_of(stream)
                assert response.status_code == 200
                assert b"x-forwarded-proto: https" in body.splitlines()
                assert b'forwarded: for=127.0.0.1;host="s.test";proto=https' in body.splitlines()
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: any.w.test\r\n\r\n")
            assert (await response_of(stream))[0].status_code == 421, "the connection is for another site"
        assert (await here.get("any.w.test"))[0].status_code == 200
        assert (await here.here.logged()).host == "any.w.test"
        async with await here.connect(context=here.context()) as stream:
            assert stream.selected_alpn_protocol() is None, "a client without ALPN"


ALERTS: list[tuple[str | None, tuple[str, ...], Alert]] = [
    (None, (), Alert.UNRECOGNIZED_NAME),
    ("other.test", (), Alert.UNRECOGNIZED_NAME),
    ("plain.test", (), Alert.UNRECOGNIZED_NAME),  # it has a certificate, for another port
    ("bare.test", (), Alert.INTERNAL_ERROR),
    ("s.test", ("spdy/3",), Alert.NO_APPLICATION_PROTOCOL),
    ("s.test", ("acme-tls/1",), Alert.UNRECOGNIZED_NAME),
    ("s.test", ("spdy/3", "acme-tls/1"), Alert.NO_APPLICATION_PROTOCOL),
]


async def test_which_alert_says_what_is_wrong(tmp_path: Path) -> None:
    async with secure(tmp_path) as here:
        for name, protocols, alert in ALERTS:
            async with await here.here.connect() as stream:
                await stream.send_all(hello_of(name, *protocols))
                assert await stream.receive_some(100) == alert_record(alert), (name, protocols)
        assert (await here.get("s.test"))[0].status_code == 200


async def test_what_is_no_tls_ends_alone(tmp_path: Path) -> None:
    async with secure(tmp_path) as here:
        for sent in (b"\x16nonsense", b"\x16\x03\x01\x00\x05\x02\x00\x00\x01x", hello_of("s.test")[:-1]):
            async with await here.here.connect() as stream:
                await stream.send_all(sent)
                await stream.send_eof()
                received = await stream.receive_some(100)
                assert received in (b"", alert_record(Alert.DECODE_ERROR))
        hello = hello_of("s.test", "http/1.1")
        async with await here.here.connect() as stream:
            await stream.send_all(hello + b"\x17\x03\x03\x00\x05wrong")
            while await stream.receive_some(65536):
                pass
        assert (await here.get("s.test"))[0].status_code == 200


async def test_plain_requests_for_a_site_with_tls(tmp_path: Path) -> None:
    async with secure(tmp_path) as here:
        for host, status, location in [
            ("moved.test", 308, b"https://moved.test/x?y=1"),
            ("Own.test:80", 308, b"https://own.test:80/x?y=1"),
            ("s.test", 403, None),
            ("plain.test", 200, None),
        ]:
            response, _ = await here.here.get(host, path="/x?y=1")
            assert (response.status_code, dict(response.headers).get(b"location")) == (status, location)
        response, _ = await here.here.ask(b"POST /x HTTP/1.1\r\nHost: moved.test\r\nContent-Length: 100000\r\n\r\nsome")
        assert response.status_code == 308


async def test_answers_to_a_public_ca(tmp_path: Path) -> None:
    async with secure(tmp_path) as here:
        pair = here.ca.issue("bare.test", NOW)
        await here.front.challenge("bare.test", "tok-1", "tok-1.thumb", pair.chain, pair.key)
        path = "/.well-known/acme-challenge/"
        response, body = await here.here.get("Bare.test", path=path + "tok-1")
        assert (response.status_code, body) == (200, b"tok-1.thumb")
        assert (await here.here.get("bare.test", path=path + "tok-2"))[0].status_code == 403
        response, body = await here.here.get("plain.test", path=path + "tok-1")
        assert body.startswith(b"GET " + path.encode()), "a guest may have a certificate of its own"
        async with await here.connect("bare.test", here.context("acme-tls/1")) as stream:
            assert stream.selected_alpn_protocol() == "acme-tls/1"
            assert stream.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(pair.chain)
            assert await stream.receive_some(100) == b""
        await here.front.unchallenge("bare.test")
        assert (await here.here.get("bare.test", path=path + "tok-1"))[0].status_code == 403
        async with await here.here.connect() as plain:
            await plain.send_all(hello_of("bare.test", "acme-tls/1"))
            assert await plain.receive_some(100) == alert_record(Alert.UNRECOGNIZED_NAME)


async def test_an_upload_and_its_answer_over_tls(tmp_path: Path) -> None:
    def digest(request: h11.Request, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
        return [], hashlib.sha256(body).hexdigest().encode() + body

    data = bytes(range(256)) * 4096
    async with secure(tmp_path, http_guest(digest)) as here, await here.connect() as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: s.test\r\nContent-Length: %d\r\n\r\n" % len(data))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            _, body = await response_of(stream)
        assert body == hashlib.sha256(data).hexdigest().encode() + data


async def test_a_tunnel_over_tls(tmp_path: Path) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        async for data in stream:
            await stream.send_all(data)

    data = bytes(range(256)) * 2048
    async with secure(tmp_path, echo) as here, await here.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: s.test\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += await stream.receive_some(1)
        assert received.startswith(b"HTTP/1.1 101")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            received = b""
            while len(received) < len(data):
                received += await stream.receive_some(65536)
        assert received == data


async def test_no_request_is_lost_while_certificates_are_exchanged(tmp_path: Path) -> None:
    async with secure(tmp_path) as here:
        seen: set[bytes] = set()
        done = 0
        is_over = False

        async def connect_often() -> None:
            nonlocal done
            while not is_over:
                async with await here.connect() as stream:
                    seen.add(stream.getpeercert(binary_form=True))
                    await stream.send_all(b"GET / HTTP/1.1\r\nHost: s.test\r\nConnection: close\r\n\r\n")
                    assert (await response_of(stream))[0].status_code == 200
                    done += 1

        async def stay() -> None:
            nonlocal done
            async with await here.connect() as stream:
                while not is_over:
                    await stream.send_all(b"GET / HTTP/1.1\r\nHost: s.test\r\n\r\n")
                    assert (await response_of(stream))[0].status_code == 200
                    done += 1

        async with trio.open_nursery() as nursery:
            for client in (connect_often, connect_often, stay):
                nursery.start_soon(client)
            for _ in range(20):
                before = done
                await here.certify("s.test")
                while done < before + 5:
                    await trio.sleep(0.001)
            is_over = True
        assert len(seen) > 5


async def test_streams_of_http2(tmp_path: Path) -> None:
    """Each is a request of its own; the guest gets HTTP/1.1."""

    def echo(request: h11.Request, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
        lines = [b"%b %b" % (request.method, request.target), *(b"%b: %b" % header for header in request.headers)]
        return [("X-Hop", "1"), ("Connection", "X-Hop, keep-alive")], b"\n".join((*lines, b"%d" % len(body)))

    async with secure(tmp_path, http_guest(echo)) as here:
        async with await here.connect(context=here.context("h2", "http/1.1")) as stream:
            assert stream.selected_alpn_protocol() == "h2"
            peer = Peer(Wire(stream), client=True)
            first = await peer.ask(("x-mine", "1"), ("x-forwarded-for", "10.0.0.1"), authority="s.test", path="/x?y")
            second = await peer.ask(authority="s.test", body=b"some", method="POST", end=False)
            other = await peer.ask(authority="any.w.test")
            await peer.upload(second, 300_000)
            status, fields, body = await peer.answer(first)
            assert (status, "x-hop" in fields, "via" in fields) == (200, False, False)
            assert body.splitlines() == [
                b"GET /x?y", b"host: s.test", b"x-mine: 1", b"x-forwarded-for: 127.0.0.1", b"x-forwarded-proto: https",
                b"x-forwarded-host: s.test", b'forwarded: for=127.0.0.1;host="s.test";proto=https', b"0",
            ]  # fmt: skip
            status, _, body = await peer.answer(second)
            assert (status, body.splitlines()[-1]) == (200, b"300004")
            status, fields, body = await peer.answer(other)
            assert (status, fields["content-type"]) == (421, "text/plain; charset=utf-8")
            assert body == b"421 Misdirected Request: This connection is for another site.\n"
            refused = await peer.ask(authority="s.test", scheme="http")
            assert (await peer.answer(refused))[0] in (0, 400)
            await here.front.put("s.test", compile_routes([]))
            gone = await peer.ask(authority="s.test")
            assert (await peer.answer(gone))[0] == 404
        served = await here.here.logged(3)
        assert served.http == 2


async def test_a_dropped_ingress_resets_its_streams(tmp_path: Path) -> None:
    asked = trio.Event()

    async def guest(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        asked.set()
        await trio.sleep_forever()

    async with secure(tmp_path, guest) as here, await here.connect(context=here.context("h2")) as stream:
        peer = Peer(Wire(stream), client=True)
        waiting = await peer.ask(authority="s.test")
        await peer.flush()
        await asked.wait()
        await here.front.drop("s.test")
        assert (await peer.answer(waiting))[0] == 0
        assert peer.of(waiting, h2.events.StreamReset)
