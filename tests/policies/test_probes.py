"""Checks against real listeners on loopback, and against peers that do not behave."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import trio
import trustme

from hypeman.instances.model.policies import HealthRules
from hypeman.instances.model.types import HealthCheckType
from hypeman.policies.probes import CheckFailed, Probes

HTTP = HealthRules(type=HealthCheckType.HTTP, path="/ready?x=1")
Serve = Callable[[trio.abc.Stream], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server on 127.0.0.1."""

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await serve(stream if tls is None else trio.SSLStream(stream, tls, server_side=True))
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handle, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def ask(rules: HealthRules, port: int) -> None:
    rules = msgspec.structs.replace(rules, port=port)
    with trio.fail_after(20):
        await Probes().check(rules, address="127.0.0.1", guest=None)


def answers(data: bytes) -> Serve:
    async def serve(stream: trio.abc.Stream) -> None:
        request = await stream.receive_some(65536)
        assert bytes(request).startswith(b"GET /ready?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        await stream.send_all(data)

    return serve


async def free_port() -> int:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def test_tcp() -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        assert await stream.receive_some(1) == b""

    opened: list[int] = []
    async with serving(serve) as port:
        rules = HealthRules(type=HealthCheckType.TCP, port=port)
        await Probes().check(rules, address="127.0.0.1", guest=None, opening=opened.append)
    assert len(opened) == 1 and opened[0] > 0
    with pytest.raises(CheckFailed, match="cannot connect"):
        await ask(rules, await free_port())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.0 200 \r\n\r\n", None),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "HTTP status 503, expected 200"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "no HTTP/1 response"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP/1 response"),
        (b"HTTP/1.1 200", "no HTTP response"),
        (b"", "no HTTP response"),
        (b"x" * 100_000, "no HTTP response"),
    ],
)
async def test_http(answer: bytes, reason: str | None) -> None:
    async with serving(answers(answer)) as port:
        if reason is None:
            await ask(HTTP, port)
        else:
            with pytest.raises(CheckFailed, match=reason):
                await ask(HTTP, port)


@pytest.mark.parametrize(("status", "fits"), [(199, False), (200, True), (302, True), (399, True), (400, False)])
async def test_a_range_of_statuses(status: int, fits: bool) -> None:
    rules = msgspec.structs.replace(HTTP, expected_status_max=399)
    async with serving(answers(f"HTTP/1.1 {status} X\r\n\r\n".encode())) as port:
        if fits:
            await ask(rules, port)
        else:
            with pytest.raises(CheckFailed, match=f"HTTP status {status}, expected 200 to 399"):
                await ask(rules, port)


async def test_https_without_a_name() -> None:
    """Any certificate will do; what does not speak TLS will not."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("elsewhere.example").configure_cert(context)
    rules = HealthRules(type=HealthCheckType.HTTP, path="/ready?x=1", tls=True, expected_status=204)
    async with serving(answers(b"HTTP/1.1 204 No Content\r\n\r\n"), tls=context) as port:
        await ask(rules, port)

    async def plain(stream: trio.abc.Stream) -> None:
        await stream.receive_some(1)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(plain) as port:
        with pytest.raises(CheckFailed, match="the connection broke"):
            await ask(rules, port)


async def test_exec_without_an_agent() -> None:
    with pytest.raises(CheckFailed, match="agent"):
        await Probes().check(HealthRules(type=HealthCheckType.EXEC, command=("true",)), address="", guest=None)
