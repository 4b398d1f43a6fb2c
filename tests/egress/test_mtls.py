"""Client certificates: the host sees the rule's, the guest has none, and the key stays in the policy's memory."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key

from hypeman.egress.types import CredentialPolicy, CredentialSource, InjectAs, InjectRule, MtlsForm
from hypeman.errors import InvalidRequest
from tests.egress.conftest import GUEST, HOST, Origin, Wire, World, read_response
from tests.egress.test_http2 import GrpcLike, Peer

OTHER_GUEST = "127.0.1.2"


class Shop:
    """A CA for clients with an intermediate, and the name on each certificate."""

    def __init__(self) -> None:
        self.root = trustme.CA()
        self.between = self.root.create_child_ca()

    def identity(self, name: str, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> str:
        made = self.between.issue_cert(name, key_type=key_type)
        return (made.private_key_and_cert_chain_pem.bytes()).decode()


class Host(Origin):
    """Asks for a client certificate; knows the name on it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str | None] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        assert isinstance(stream, trio.SSLStream)
        try:
            await stream.do_handshake()
        except (trio.BrokenResourceError, OSError):
            return
        found = stream.getpeercert()
        self.names.append(found["subjectAltName"][0][1] if found else None)
        await super().serve(stream)


def used_as(shape: InjectAs, port: int) -> CredentialPolicy:
    rule = InjectRule(hosts=(HOST,), ports=(port,), as_=shape)
    return CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=(rule,))


def certificate(port: int) -> CredentialPolicy:
    return used_as(InjectAs(mtls=MtlsForm()), port)


def header(port: int) -> CredentialPolicy:
    return used_as(InjectAs(header="X-Key", format="${value}"), port)


async def listen(world: World, ca: trustme.CA, shop: Shop, serve: Any, *, alpn: str = "http/1.1",
                 version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int:  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(HOST).configure_cert(context)
    shop.root.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([alpn])
    context.maximum_version = version
    listeners = await world.nursery.start(
        partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1", handler_nursery=world.nursery)
    )
    port: int = listeners[0].transport_listener.socket.getsockname()[1]
    return port


async def connect(world: World, port: int, *, source: str = GUEST, alpn: tuple[str, ...] = ("http/1.1",)) -> Wire:
    wire = await world.tcp(source)
    asked = f"CONNECT {HOST}:{port} HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()
    assert (await world.ask(wire, asked, head_only=True))[0] == 200
    return await world.tls(source=source, over=wire, alpn=alpn)


async def get(world: World, wire: Wire, port: int) -> tuple[int, dict[str, str], bytes]:
    return await world.ask(wire, f"GET / HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("key_type", list(trustme.KeyType))
async def test_host_sees_the_certificate(
    world: World, origin_ca: trustme.CA, version: ssl.TLSVersion, key_type: trustme.KeyType
) -> None:
    """With its intermediate, since the host knows only the root; afterwards an RSA key is in the policy alone."""
    shop, host = Shop(), Host()
    port = await listen(world, origin_ca, shop, host.serve, version=version)
    identity = shop.identity("robot.test", key_type)
    await world.allow(secret=identity, CERT=certificate(port))
    wire = await connect(world, port)
    assert (await get(world, wire, port))[0] == 200
    assert host.names == ["robot.test"]
    # of other keys OpenSSL leaves a copy behind where it decoded them; sanitizers keep what was freed
    if key_type is trustme.KeyType.RSA and "HYPEMAN_EGRESS_SANITIZED" not in os.environ:
        assert not copies_of_key(identity, world.egress.engine_pid)


def copies_of_key(identity: str, pid: int) -> int:
    """How often a factor of the private number is in the memory of the process, in either order of bytes."""
    key = load_key(identity.encode(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    secret = key.private_numbers().p
    text = secret.to_bytes((secret.bit_length() + 7) // 8, "big")
    memory = b"".join(readable(pid))
    assert memory.count(b"mock-CERT"), "else this looks at nothing"
    return memory.count(text) + memory.count(text[::-1])


def readable(pid: int) -> list[bytes]:
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, *rest = line.split()
            if not mode.startswith("rw") or (len(rest) > 3 and rest[3].startswith("[v")):
                continue
            start, end = (int(each, 16) for each in span.split("-"))
            memory.seek(start)
            parts.append(memory.read(end - start))
    return parts


async def test_rotation_during_the_handshake(world: World, origin_ca: trustme.CA) -> None:
    """The request does not use the connection for which the old certificate was shown."""
    shop, host = Shop(), Host()
    arrived, go_on = trio.Event(), trio.Event()

    async def serve(stream: trio.abc.Stream) -> None:
        arrived.set()
        await go_on.wait()
        await host.serve(stream)

    port = await listen(world, origin_ca, shop, serve)
    await world.allow(secret=shop.identity("old.test"), CERT=certificate(port))
    wire = await connect(world, port)
    await wire.send(f"GET / HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
    await arrived.wait()
    await world.allow(secret=shop.identity("new.test"), CERT=certificate(port))
    go_on.set()
    assert (await read_response(wire))[0] == 200
    assert host.names in (["old.test", "new.test"], ["new.test"])  # the engine may have seen the change first
    assert [request.connection for request in host.requests] == [len(host.names)]


async def test_rotation_and_the_neighbour(world: World, origin_ca: trustme.CA) -> None:
    """A new certificate is in force for the next request, on a new connection; another instance has none."""
    shop, host = Shop(), Host()
    port = await listen(world, origin_ca, shop, host.serve)
    await world.allow(secret=shop.identity("old.test"), CERT=certificate(port))
    wire = await connect(world, port)
    for _ in range(2):
        assert (await get(world, wire, port))[0] == 200
    await world.allow(secret=shop.identity("new.test"), CERT=certificate(port))
    assert (await get(world, wire, port))[0] == 200
    assert host.names == ["old.test", "new.test"]
    assert [request.connection for request in host.requests] == [1, 1, 2]
    await world.allow("inst-b", OTHER_GUEST, secret="k", KEY=header(port))
    wire = await connect(world, port, source=OTHER_GUEST)
    status, fields, _ = await get(world, wire, port)
    assert (status, fields["x-hypeman-egress"]) == (502, "upstream_closed")
    assert host.names == ["old.test", "new.test"]


@asynccontextmanager
async def openssl_server(version: str, host: Path, clients: Path) -> AsyncGenerator[int]:
    """The port on which it asks for a client certificate of a CA."""
    argv = ["openssl", "s_server", "-accept", "127.0.0.1:0", version, "-www", "-Verify", "3", "-verify_return_error",
            "-cert", str(host), "-CAfile", str(clients)]  # fmt: skip
    server = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    said = b""
    try:
        while not (found := re.search(rb"ACCEPT \S+:(\d+)\n", said)):
            said += await server.stdout.receive_some()
        yield int(found[1])
    finally:
        with trio.CancelScope(shield=True):
            server.kill()
            await server.wait()
            await server.stdout.aclose()


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl(world: World, origin_ca: trustme.CA, tmp_path: Path, version: str) -> None:
    """Its server takes the certificate, and its alert is in the error where there is none."""
    shop = Shop()
    origin_ca.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "host.pem"))
    shop.root.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    async with openssl_server(version, tmp_path / "host.pem", tmp_path / "clients.pem") as port:
        await world.allow(secret=shop.identity("robot.test"), CERT=certificate(port))
        status, _, body = await get(world, await connect(world, port), port)
        assert status == 200 and b"Client certificate" in body and b"robot.test" in body
        await world.allow(secret="k", KEY=header(port))
        status, _, body = await get(world, await connect(world, port), port)
        assert status == 502 and b"alert" in body


async def test_streams_of_http2(world: World, origin_ca: trustme.CA) -> None:
    shop, host = Shop(), GrpcLike()
    names: list[str] = []

    async def serve(stream: trio.SSLStream[Any]) -> None:
        await stream.do_handshake()
        names.append(stream.getpeercert()["subjectAltName"][0][1])
        await host.serve(stream)

    port = await listen(world, origin_ca, shop, serve, alpn="h2")
    for name in ("old.test", "new.test"):
        await world.allow(secret=shop.identity(name), CERT=certificate(port))
        peer = Peer(await connect(world, port, alpn=("h2",)), client=True)
        for _ in range(2):
            stream = await peer.ask(authority=f"{HOST}:{port}", body=b"x", method="POST")
            assert (await peer.answer(stream))[0] == 200
    assert names == ["old.test", "new.test"]


async def test_unusable_values(world: World) -> None:
    """They are refused when they are set, and no error has any of the value."""
    shop = Shop()
    identity, other = shop.identity("a.test"), shop.identity("b.test")
    blocks = identity.split("-----END EC PRIVATE KEY-----\n")
    key, chain = blocks[0] + "-----END EC PRIVATE KEY-----\n", blocks[1]
    locked = load_key(key.encode(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    for value in (key, chain, key + other[other.index("-----BEGIN CERT") :], locked.decode() + chain, key + chain * 4,
                  key + key + chain, identity.replace("M", "*"), "x"):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            await world.allow(secret=value, CERT=certificate(443))
        assert key[40:80] not in str(caught.value) and "mtls" in str(caught.value)
    with pytest.raises(InvalidRequest, match="client certificate"):
        await world.allow(secret=identity, A=certificate(443), B=certificate(443))
