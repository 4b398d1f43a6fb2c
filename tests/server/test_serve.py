"""Real sockets: who is trusted, how a client is held back, how everything ends."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trustme

from hypeman.server import app as app_module
from hypeman.server import serve as serve_module
from hypeman.server.app import ApiApp
from hypeman.server.connection import Connection
from hypeman.server.serve import ServeError, Server, bind_tcp, bind_unix, metrics_app
from tests.fakes.services import FakeWorld


async def talk(stream: trio.abc.Stream, request: str) -> tuple[int, dict[str, str], bytes]:
    """One request on an open connection; answers with a length only."""
    if request:
        await stream.send_all(request.replace("\n", "\r\n").encode())
    data = b""
    while b"\r\n\r\n" not in data:
        data += (chunk := await stream.receive_some())
        assert chunk, "the server closed the connection"
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers.get("content-length", 0)):
        body += await stream.receive_some()
    return int(status.split()[1]), headers, body


async def test_tcp_requires_a_token_and_the_socket_does_not(served: Any, world: FakeWorld) -> None:
    world.instances.add("web")
    ask = "GET /instances/web HTTP/1.1\nHost: x\n\n"
    async with await trio.open_tcp_stream("127.0.0.1", served.port) as stream:
        status, headers, body = await talk(stream, ask)
        assert (status, msgspec.json.decode(body)["code"]) == (401, "Unauthorized")
        assert "server" not in headers
    async with await trio.open_unix_socket(served.socket_path) as stream:
        status, _, body = await talk(stream, ask)
        assert (status, msgspec.json.decode(body)["name"]) == (200, "web")
        status, _, _ = await talk(stream, ask)  # the connection is kept
        assert status == 200


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("/images/docker.io%2Flibrary%2Falpine:latest", 200, "docker.io/library/alpine:latest"),
        ("/images/docker.io%2flibrary%2falpine%3Alatest", 200, "docker.io/library/alpine:latest"),
        ("/images/docker.io/library/alpine:latest", 200, "docker.io/library/alpine:latest"),
        ("/images/alpine", 200, "docker.io/library/alpine:latest"),
        ("/images/ghcr.io%2Fa%2Fb%40sha256:00/progress", 404, "ghcr.io/a/b@sha256:00"),
        ("/instances/a%252Fb", 404, "a%2Fb"),
        ("/instances/%ff", 400, "UTF-8"),
        ("/instances/", 404, "/instances/"),
        ("/instances/../volumes", 404, ".."),
        ("http://host/health", 200, "ok"),
    ],
)
async def test_paths_as_they_come(served: Any, world: FakeWorld, path: str, status: int, expected: str) -> None:
    """Percent signs are decoded once, after the path was matched."""
    await world.images.create_named("alpine")
    async with await trio.open_unix_socket(served.socket_path) as stream:
        got, _, body = await talk(stream, f"GET {path} HTTP/1.1\nHost: x\n\n")
        assert got == status, body
        assert expected in body.decode()


async def test_head(served: Any) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", served.port) as stream:
        await stream.send_all(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join([chunk async for chunk in stream])
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("head", "status", "told"),
    [
        ("GET /health HTTP/1.1\r\n", 400, "not valid HTTP"),
        ("GET /health HTTP/1.1\r\nHost : x\r\n", 400, "not valid HTTP"),
        ("POST /volumes HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n", 400, "not valid HTTP"),
        ("POST /volumes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n", 501, "only chunked"),
        ("POST /volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400, "not valid"),
        (f"GET /{'a' * 200_000} HTTP/1.1\r\nHost: x\r\n", 431, "too large"),
    ],
)
async def test_what_is_not_http_has_the_error_body_too(served: Any, head: str, status: int, told: str) -> None:
    """And it ends the connection: a request behind it may have been a part of a body, for a proxy in front."""
    behind = "0\r\n\r\nDELETE /instances/web HTTP/1.1\r\nHost: x\r\n\r\n"
    async with await trio.open_unix_socket(served.socket_path) as stream:
        await stream.send_all(f"{head}\r\n{behind}".encode())
        answer = b""
        with trio.fail_after(20), suppress(trio.BrokenResourceError):
            async for chunk in stream:
                answer += chunk
    lines, _, body = answer.partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 %d" % status) and b"connection: close" in lines, answer
    assert told in msgspec.json.decode(body)["message"]


async def test_a_fast_sender_is_held_back(served: Any, world: FakeWorld) -> None:
    """An upload that nobody reads yet stops after some megabytes, and goes on when it is read."""
    world.volumes.reads_slowly = trio.Event()
    size = 64 * 2**20
    sent = 0

    async def send(stream: trio.abc.Stream) -> None:
        nonlocal sent
        while sent < size:
            await stream.send_all(bytes(2**20))
            sent += 2**20

    async with await trio.open_unix_socket(served.socket_path) as stream, trio.open_nursery() as nursery:
        await stream.send_all(
            b"POST /volumes/from-archive?name=a&size_gb=1&id=v HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
        )
        nursery.start_soon(send, stream)
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await trio.sleep(0.3)
        assert 0 < sent <= 24 * 2**20
        world.volumes.reads_slowly.set()
        status, _, _ = await talk(stream, "")
        assert (status, len(world.volumes.archives["v"])) == (201, size)


async def test_a_client_that_hangs_up_ends_its_handler(served: Any, world: FakeWorld) -> None:
    ended = trio.Event()

    async def get(ref: str) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    world.instances.get = get  # type: ignore[method-assign]
    stream = await trio.open_unix_socket(served.socket_path)
    await stream.send_all(b"GET /instances/web HTTP/1.1\r\nHost: x\r\n\r\n")
    await trio.testing.wait_all_tasks_blocked(0.1)
    await stream.aclose()
    with trio.fail_after(5):
        await ended.wait()


async def test_shutdown_ends_streams_at_once_and_lets_requests_finish(served: Any, world: FakeWorld) -> None:
    instance = world.instances.add("web")
    (world.log_directory / "web-app.log").write_text("one\n")
    may_finish = trio.Event()

    async def stop(ref: str, request: object) -> Any:
        await may_finish.wait()
        return instance

    world.instances.stop = stop  # type: ignore[method-assign]
    follower = await trio.open_unix_socket(served.socket_path)
    await follower.send_all(b"GET /instances/web/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
    received = b""
    while b'"one"' not in received:
        received += await follower.receive_some()
    slow = await trio.open_unix_socket(served.socket_path)
    await slow.send_all(b"POST /instances/web/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await trio.testing.wait_all_tasks_blocked(0.1)
    served.shutdown.set()
    with trio.fail_after(5):
        while await follower.receive_some():
            pass
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream("127.0.0.1", served.port)
        assert not served.ended.is_set()
        may_finish.set()
        status, _, _ = await talk(slow, "")
        assert status == 200
        await served.ended.wait()
    assert not os.path.exists(served.socket_path)
    await follower.aclose()
    await slow.aclose()


async def test_shutdown_does_not_wait_for_a_client_that_never_reads(served: Any, world: FakeWorld) -> None:
    world.instances.encoded = b'"' + b"x" * (32 * 2**20) + b'"'
    stream = await trio.open_unix_socket(served.socket_path)
    await stream.send_all(b"GET /instances HTTP/1.1\r\nHost: x\r\n\r\n")
    await trio.testing.wait_all_tasks_blocked(0.2)
    served.shutdown.set()
    with trio.fail_after(10):
        await served.ended.wait()
    await stream.aclose()


async def test_a_hang_up_behind_unread_bytes_is_noticed(
    served: Any, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the stream is hidden behind bytes that the handler does not take."""
    monkeypatch.setattr("hypeman.server.serve.HANG_UP_SECONDS", 0.1)
    world.volumes.reads_slowly = trio.Event()
    cancelled = trio.Event()
    waits = world.volumes.reads_slowly.wait

    async def wait() -> None:
        try:
            await waits()
        finally:
            cancelled.set()

    monkeypatch.setattr(world.volumes, "reads_slowly", type("Gate", (), {"wait": staticmethod(wait)}))
    stream = await trio.open_unix_socket(served.socket_path)
    await stream.send_all(
        b"POST /volumes/from-archive?name=a&size_gb=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    )
    with trio.move_on_after(0.5):
        while True:
            await stream.send_all(bytes(2**20))
    await trio.aclose_forcefully(stream)
    with trio.fail_after(5):
        await cancelled.wait()


async def test_idle_keep_alive_connections_do_not_hold_up_shutdown(served: Any) -> None:
    stream = await trio.open_unix_socket(served.socket_path)
    await talk(stream, "GET /health HTTP/1.1\nHost: x\n\n")
    served.shutdown.set()
    with trio.fail_after(5):
        await served.ended.wait()
        assert await stream.receive_some() == b""
    await stream.aclose()


def test_socket_permissions(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s.sock"
    with bind_unix(str(path), mode=0o660, group="root"):
        found = os.stat(path)
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, 0)
        with pytest.raises(ServeError, match="another server"):
            bind_unix(str(path), mode=0o660)
    assert path.exists()  # as after a kill
    bind_unix(str(path), mode=0o600).close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ServeError, match="a file of that name"):
        bind_unix(str(path), mode=0o600)
    assert path.read_text() == "precious"
    with pytest.raises(ServeError, match="no-such-group"):
        bind_unix(str(tmp_path / "other"), mode=0o600, group="no-such-group")


def test_ports_that_are_not_available() -> None:
    [sock] = bind_tcp("127.0.0.1", 0)
    with sock, pytest.raises(ServeError, match="something else listens"):
        bind_tcp("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(ServeError, match="no-such-host"):
        bind_tcp("no-such-host.invalid", 80)


async def test_metrics_on_their_own_listener(app: ApiApp, nursery: trio.Nursery) -> None:
    await app.test_client().get("/health")
    sockets = bind_tcp("127.0.0.1", 0)
    shutdown = trio.Event()
    await nursery.start(Server(metrics_app).run, sockets, shutdown)
    async with await trio.open_tcp_stream(*sockets[0].getsockname()) as stream:
        status, headers, body = await talk(stream, "GET /metrics HTTP/1.1\nHost: x\nConnection: close\n\n")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        assert b'hypeman_http_requests_total{method="GET",path="/health",status="200"}' in body
        assert b"hypeman_uptime_seconds" in body
    async with await trio.open_tcp_stream(*sockets[0].getsockname()) as stream:
        assert (await talk(stream, "GET / HTTP/1.1\nHost: x\nContent-Length: 0\n\n"))[0] == 404
    shutdown.set()


async def test_aborting_twice_is_fine() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = Connection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), trusted=False)
        connection.abort()
        connection.abort()
        await connection.stream.aclose()
        connection.abort()


async def test_unfinished_bodies_are_bounded_together(
    served: Any, app: ApiApp, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients with a large JSON body that never ends: their sum is bounded, others are served, then they time out."""
    monkeypatch.setattr(app_module, "BODY_SECONDS", 3.0)
    monkeypatch.setattr(app_module, "MAX_JSON_BODIES", 4 * 2**20)  # reached long before the first one times out
    statuses: list[int] = []

    async def client() -> None:
        async with await trio.open_unix_socket(served.socket_path) as stream:
            await stream.send_all(b"POST /instances HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                await stream.send_all(b"{" + b" " * (2**20 - 1))
            statuses.append((await talk(stream, ""))[0])

    highest = 0
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(client)
            while len(statuses) < 12:
                highest = max(highest, app.held_bodies.bytes)
                async with await trio.open_unix_socket(served.socket_path) as stream:
                    assert (await talk(stream, "GET /health HTTP/1.1\nHost: x\n\n"))[0] == 200
                await trio.sleep(0.05)
    assert set(statuses) == {408, 503}
    assert 0 < highest <= app_module.MAX_JSON_BODIES + 2**20 and app.held_bodies.bytes == 0


async def test_tls_presents_a_renewed_certificate_and_knows_the_client(nursery: trio.Nursery) -> None:
    """A client without a certificate is heard as well: the application decides."""
    authority = trustme.CA()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.verify_mode = ssl.CERT_OPTIONAL
    authority.configure_trust(ours)
    first, second = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    first.configure_cert(ours)
    seen = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(scope["state"]["connection"].secure.getpeercert(True))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sockets = bind_tcp("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    shutdown = trio.Event()
    await nursery.start(lambda task_status: Server(app, tls=ours).run(sockets, shutdown, task_status=task_status))
    mine = authority.issue_cert("client")
    presented = []
    for certificate, renewed in ((None, first), (mine, second)):
        renewed.configure_cert(ours)
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if certificate is not None:
            certificate.configure_cert(context)
        transport = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.SSLStream(transport, context, server_hostname="127.0.0.1", https_compatible=True) as stream:
            status, _, _ = await talk(stream, "GET / HTTP/1.1\nHost: x\n\n")
            assert status == 204
            presented.append(stream.getpeercert(True))
    assert presented[0] != presented[1]
    assert seen[0] is None
    assert seen[1] == ssl.PEM_cert_to_DER_cert(mine.cert_chain_pems[0].bytes().decode())
    shutdown.set()


async def test_a_closed_connection_does_not_read_a_newer_one_of_the_same_number(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another task closes it between the moment its reader is woken and the moment it reads."""
    connections: list[Connection] = []

    def connection(stream: trio.SocketStream, trusted: bool) -> Connection:
        connections.append(Connection(stream, trusted))
        return connections[-1]

    monkeypatch.setattr(serve_module, "Connection", connection)
    newer, its_client = socket.socketpair()
    its_client.send(b"another client's request")
    wait, swapped = trio.lowlevel.wait_readable, trio.Event()
    taken: list[int] = []

    async def wait_and_lose(number: Any) -> None:
        await wait(number)
        if connections and number == connections[0].stream.socket.fileno():
            connections[0].stream.socket.close()
            taken.append(os.dup2(newer.fileno(), number))
            swapped.set()

    path = tmp_path / "socket"
    await nursery.start(
        lambda task_status: Server(metrics_app).run(
            [], trio.Event(), trusted=[bind_unix(str(path), mode=0o600)], task_status=task_status
        )
    )
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_and_lose)
    with newer, its_client, trio.fail_after(60):
        async with await trio.open_unix_socket(str(path)) as client:
            await client.send_all(b"G")
            await swapped.wait()
            await trio.testing.wait_all_tasks_blocked()
            newer.setblocking(False)
            assert newer.recv(100) == b"another client's request"
    os.close(taken[0])
