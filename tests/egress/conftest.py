"""A data plane on loopback between hand-written clients and a hand-written origin.

Nothing here uses an HTTP library: what matters is which bytes go where. Guests are distinguished by their source
address, 127.0.1.x; every name resolves to 127.0.0.1 unless a test says otherwise.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trustme

from hypeman.egress.link import engine_command
from hypeman.egress.service import Egress, Limits, Settings, Timeouts
from hypeman.egress.types import CredentialPolicy, CredentialSource, EgressAccess, InjectAs, InjectRule

HOST = "api.example.com"
SECRET = "sk-live-7f3a91"
GUEST = "127.0.1.1"
PORTS: list[int] = []
"""Where the origins of this world listen: what rules are for, in place of 443."""


def engine_process(fd: int) -> list[str]:
    """The engine, or the one built with sanitizers, see test_sanitized.py."""
    if other := os.environ.get("HYPEMAN_EGRESS_SANITIZED"):
        return ["env", *other.split(" "), sys.executable, str(Path(__file__).with_name("sanitized_engine.py")), str(fd)]
    return engine_command(fd)


def resident(egress: Egress) -> int:
    """Bytes in memory of the engine process."""
    pages = Path(f"/proc/{egress.engine_pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def credential(
    *hosts: str, header: str = "Authorization", template: str = "Bearer ${value}", env: str = "REAL_KEY"
) -> CredentialPolicy:
    return CredentialPolicy(
        source=CredentialSource(env=env),
        inject=(
            InjectRule(hosts=hosts or None, as_=InjectAs(header=header, format=template), ports=tuple(PORTS) or None),
        ),
    )


class Request:
    """One request as the origin got it."""

    def __init__(self, head: bytes, body: bytes, trailers: bytes, connection: int) -> None:
        lines = head.split(b"\r\n")
        self.line = lines[0].decode()
        self.method, self.target, self.version = self.line.split(" ")
        self.fields = [(name.lower().decode(), value.strip().decode("latin-1"))
                       for name, _, value in (line.partition(b":") for line in lines[1:] if line)]  # fmt: skip
        self.body = body
        self.trailers = trailers
        self.connection = connection

    def all(self, name: str) -> list[str]:
        return [value for field, value in self.fields if field == name.lower()]


class Wire:
    """A stream with a buffer: lines and counts."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.data = b""
        self.ended = False

    async def more(self) -> bool:
        got = await self.stream.receive_some(65536)
        self.data += got
        self.ended = not got
        return bool(got)

    async def until(self, mark: bytes) -> bytes:
        while mark not in self.data:
            if not await self.more():
                raise EOFError(self.data)
        taken, _, self.data = self.data.partition(mark)
        return taken

    async def exactly(self, count: int) -> bytes:
        while len(self.data) < count:
            if not await self.more():
                raise EOFError(self.data)
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    async def rest(self) -> bytes:
        while await self.more():
            pass
        taken, self.data = self.data, b""
        return taken

    async def chunks(self) -> tuple[bytes, bytes]:
        """Body and trailers of a chunked message."""
        body = b""
        while size := int((await self.until(b"\r\n")).split(b";")[0], 16):
            body += await self.exactly(size)
            assert await self.exactly(2) == b"\r\n"
        trailers = b""
        while line := await self.until(b"\r\n"):
            trailers += line + b"\r\n"
        return body, trailers

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)


Answer = Callable[[Request, Wire], Awaitable[bool | None]]


class Origin:
    """Records requests and answers by path; an `answers` entry does as it likes (True: keep the connection)."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.answers: dict[str, Answer] = {}
        self.port = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        number = self.connections
        wire = Wire(stream)
        try:
            if isinstance(stream, trio.SSLStream):
                await stream.do_handshake()
            self.open += 1
            while True:
                head = await wire.until(b"\r\n\r\n")
                answered = await self._one(head, wire, number)
                if answered is False:
                    break
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await trio.aclose_forcefully(stream)

    async def _one(self, head: bytes, wire: Wire, number: int) -> bool | None:
        request = Request(head, b"", b"", number)
        self.requests.append(request)
        path = request.target.partition("?")[0]
        if path in self.answers:
            return await self.answers[path](request, wire)
        await read_body(request, wire)
        body = f"{request.method} {request.target} {len(request.body)}".encode()
        if request.method == "HEAD":
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")
        else:
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return None


async def read_body(request: Request, wire: Wire) -> None:
    if request.all("transfer-encoding"):
        request.body, request.trailers = await wire.chunks()
    elif request.all("content-length"):
        request.body = await wire.exactly(int(request.all("content-length")[0]))


class World(msgspec.Struct):
    """Everything a test of the data plane needs."""

    egress: Egress
    origin: Origin
    plain: Origin
    names: dict[str, list[str]]
    asked: list[str]
    guest_trust: ssl.SSLContext
    nursery: Any
    streams: list[trio.abc.Stream]

    async def allow(
        self,
        instance: str = "inst-a",
        source: str = GUEST,
        secret: str = SECRET,
        *,
        access: EgressAccess | None = None,
        **credentials: Any,
    ) -> None:
        found = credentials or {"API_KEY": credential(HOST)}
        secrets = {"REAL_KEY": secret, "OTHER_KEY": "other-" + secret}
        await self.egress.set_policy(instance, source, found, secrets, access=access)

    async def tcp(self, source: str = GUEST) -> Wire:
        stream = await trio.open_tcp_stream("127.0.0.1", self.egress.port, local_address=source)
        self.streams.append(stream)
        return Wire(stream)

    async def tls(self, name: str | None = HOST, *, source: str = GUEST, over: Wire | None = None,
                  alpn: tuple[str, ...] = ("http/1.1",)) -> Wire:  # fmt: skip
        wire = over or await self.tcp(source)
        context = self.guest_trust
        context.set_alpn_protocols(list(alpn))
        stream = trio.SSLStream(wire.stream, context, server_hostname=name, https_compatible=True)
        await stream.do_handshake()
        return Wire(stream)

    async def ask(self, wire: Wire, data: bytes, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Sends bytes, reads one response."""
        await wire.send(data)
        return await read_response(wire, head_only=head_only)

    async def get(
        self, path: str = "/", *, name: str = HOST, fields: str = "", source: str = GUEST
    ) -> tuple[int, dict[str, str], bytes]:
        wire = await self.tls(name, source=source)
        try:
            return await self.ask(wire, f"GET {path} HTTP/1.1\r\nHost: {name}\r\n{fields}\r\n".encode())
        finally:
            await trio.aclose_forcefully(wire.stream)


async def read_response(wire: Wire, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
    head = await wire.until(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if head_only or status < 200 or status in (204, 304):
        return status, fields, b""
    if "transfer-encoding" in fields:
        body, trailers = await wire.chunks()
        if trailers:
            fields["(trailers)"] = trailers.decode()
        return status, fields, body
    if "content-length" in fields:
        return status, fields, await wire.exactly(int(fields["content-length"]))
    return status, fields, await wire.rest()


@pytest.fixture(scope="session")
def origin_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def origin_context(origin_ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    leaf = origin_ca.issue_cert(HOST, "*.example.com", "other.test", "example.com", "*.b.example.com", "localhost")
    leaf.configure_cert(context)
    return context


@pytest.fixture
def make_world(tmp_path: Path, origin_ca: trustme.CA, origin_context: ssl.SSLContext) -> Any:
    @asynccontextmanager
    async def make(**changes: Any) -> AsyncGenerator[World]:
        roots = tmp_path / "origin-ca.pem"
        origin_ca.cert_pem.write_to_path(str(roots))
        async with trio.open_nursery() as nursery:
            origin, plain = Origin(), Origin()
            listeners = await nursery.start(
                partial(
                    trio.serve_ssl_over_tcp, origin.serve, 0, origin_context, host="127.0.0.1", handler_nursery=nursery
                )
            )
            origin.port = listeners[0].transport_listener.socket.getsockname()[1]
            PORTS[:] = [origin.port]
            listeners = await nursery.start(
                partial(trio.serve_tcp, plain.serve, 0, host="127.0.0.1", handler_nursery=nursery)
            )
            plain.port = listeners[0].socket.getsockname()[1]
            names: dict[str, list[str]] = {}
            asked: list[str] = []

            async def resolve(name: str) -> list[str]:
                asked.append(name)
                return names.get(name, ["127.0.0.1"])

            settings = Settings(
                address="127.0.0.1", port=0, loops=changes.pop("loops", 1), allow=("127.0.0.0/8",),
                trust_file=str(roots), assumed_tls_port=changes.pop("assumed_tls_port", origin.port),
                timeouts=changes.pop("timeouts", Timeouts()),
                limits=changes.pop("limits", Limits()), **changes,
            )  # fmt: skip
            egress = Egress(settings, tmp_path / "egress", resolve=resolve, command=engine_process)
            await nursery.start(partial(egress.run, grace=0))
            await egress.accept()
            trust = ssl.create_default_context(cadata=egress.ca_pem.decode())
            world = World(egress, origin, plain, names, asked, trust, nursery, [])
            try:
                with trio.fail_after(120):
                    yield world
            finally:
                PORTS.clear()
                for stream in world.streams:
                    with trio.CancelScope() as scope:
                        scope.cancel()
                        await stream.aclose()
            nursery.cancel_scope.cancel()

    return make


@pytest.fixture
async def world(make_world: Any) -> AsyncGenerator[World]:
    async with make_world() as made:
        await made.allow()
        yield made
