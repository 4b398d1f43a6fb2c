"""The ClientHello in any pieces, the leaf that answers it, and what the listener refuses."""

from __future__ import annotations

import ssl
import struct

import pytest
import trio
import trio.lowlevel
from cryptography import x509

from tests.egress.conftest import HOST, SECRET, Wire, World, credential

H = f"Host: {HOST}\r\n"
ALPN, RECORD_SIZE_LIMIT = 16, 28


Client = tuple[bytes, ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]


def client_hello(context: ssl.SSLContext, name: str | None) -> Client:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read(), session, incoming, outgoing


async def finish(wire: Wire, session: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
    while True:
        try:
            session.do_handshake()
            break
        except ssl.SSLWantReadError:
            if data := outgoing.read():
                await wire.send(data)
            assert await wire.more(), "closed during the handshake"
            incoming.write(wire.data)
            wire.data = b""
    await wire.send(outgoing.read())


def split_record(hello: bytes, size: int) -> bytes:
    """The same handshake message in records of `size` bytes."""
    message = hello[5:]
    out = b""
    for at in range(0, len(message), size):
        part = message[at : at + size]
        out += b"\x16\x03\x01" + struct.pack(">H", len(part)) + part
    return out


def extend(hello: bytes, kind: int, size: int) -> bytes:
    """The hello with one extension more, of `size` zeros."""
    body = hello[9:]
    at = 2 + 32
    at += 1 + body[at]
    at += 2 + struct.unpack(">H", body[at : at + 2])[0]
    at += 1 + body[at]
    extensions = body[at + 2 :] + struct.pack(">HH", kind, size) + bytes(size)
    body = body[:at] + struct.pack(">H", len(extensions)) + extensions
    message = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return b"".join(
        b"\x16\x03\x01" + struct.pack(">H", len(part)) + part
        for part in (message[n : n + 16384] for n in range(0, len(message), 16384))
    )


async def test_split_at_every_byte(world: World) -> None:
    """Whatever two segments it comes in, the name is found and the handshake succeeds."""
    size = len(client_hello(world.guest_trust, HOST)[0])
    for cut in range(1, size):
        hello, session, incoming, outgoing = client_hello(world.guest_trust, HOST)
        wire = await world.tcp()
        await wire.send(hello[:cut])
        await trio.lowlevel.checkpoint()
        await wire.send(hello[cut:])
        await finish(wire, session, incoming, outgoing)
        await trio.aclose_forcefully(wire.stream)
    assert (await world.egress.statistics()).counters["minted"] == 1


async def test_byte_by_byte(world: World) -> None:
    hello, session, incoming, outgoing = client_hello(world.guest_trust, HOST)
    wire = await world.tcp()
    for n in range(len(hello)):
        await wire.send(hello[n : n + 1])
    await finish(wire, session, incoming, outgoing)


@pytest.mark.parametrize("size", [1, 3, 64, 200])
async def test_over_many_records(world: World, size: int) -> None:
    """A message may span records; TLS 1.3 transcripts do not cover record boundaries."""
    hello, session, incoming, outgoing = client_hello(world.guest_trust, HOST)
    wire = await world.tcp()
    await wire.send(split_record(hello, size))
    await finish(wire, session, incoming, outgoing)


@pytest.mark.parametrize("size", [4000, 16000, 28000])
async def test_large(world: World, size: int) -> None:
    """Passed through whole, however large: the origin sees the padded bytes and answers with a server flight."""
    hello, _, _, _ = client_hello(world.guest_trust, "other.test")
    wire = await world.tcp()
    data = extend(hello, 0xFDFD, size)  # unknown, and as large as key shares may make it
    assert len(data) > size
    await wire.send(data)
    assert await wire.more()
    assert wire.data[0] in (0x16, 0x15)
    assert (await world.egress.statistics()).counters["passed_through"] == 1


def chosen_protocol(flight: bytes) -> bytes | None:
    """What a ServerHello of TLS 1.2 says about ALPN; None if it has not come whole."""
    size = 5 + int.from_bytes(flight[3:5], "big")
    if len(flight) < 5 or len(flight) < size:
        return None
    at = 9 + 2 + 32
    at += 1 + flight[at] + 2 + 1 + 2
    while at < size:
        kind, length = struct.unpack(">HH", flight[at : at + 4])
        if kind == ALPN:
            return flight[at + 7 : at + 4 + length]
        at += 4 + length
    return b""


@pytest.mark.parametrize(
    ("gnutls", "offered", "chosen"),
    [(False, ["h2", "http/1.1"], b"h2"), (True, ["h2", "http/1.1"], b"http/1.1"), (True, ["h2"], b"h2")],
)
async def test_gnutls_is_led_to_http1(world: World, gnutls: bool, offered: list[str], chosen: bytes) -> None:
    """git of Debian 12, which is GnuTLS, loses its place in uploads over HTTP/2 (ext/egress/README.md)."""
    world.guest_trust.maximum_version = ssl.TLSVersion.TLSv1_2  # its ServerHello can be read
    world.guest_trust.set_alpn_protocols(offered)
    hello, _, _, _ = client_hello(world.guest_trust, HOST)
    wire = await world.tcp()
    await wire.send(extend(hello, RECORD_SIZE_LIMIT, 2) if gnutls else hello)
    while (said := chosen_protocol(wire.data)) is None:
        assert await wire.more(), "closed during the handshake"
    assert said == chosen


async def test_leaf(world: World) -> None:
    """Exactly the name, backdated, of a day, signed by our CA, not a CA itself."""
    wire = await world.tls()
    der = wire.stream.getpeercert(binary_form=True)  # type: ignore[attr-defined]
    leaf = x509.load_der_x509_certificate(der)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName(HOST)]
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    assert 24 * 3600 <= lifetime.total_seconds() <= 26 * 3600
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(world.egress.ca_pem))


@pytest.mark.parametrize("name", ["API.Example.COM", "api.example.com."])
async def test_names_have_one_spelling(world: World, name: str) -> None:
    world.guest_trust.check_hostname = False
    wire = await world.tls(name)
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()))[0] == 200
    assert world.origin.requests[0].all("authorization") == [f"Bearer {SECRET}"]
    assert world.origin.requests[0].all("host") == [f"{HOST}:{world.origin.port}"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions(world: World, version: ssl.TLSVersion) -> None:
    world.guest_trust.minimum_version = world.guest_trust.maximum_version = version
    assert (await world.get())[0] == 200


BAD_HELLOS = {
    "not a hello": b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
    "empty record": b"\x16\x03\x01\x00\x00" * 3,
    "record too long": b"\x16\x03\x01\xff\xff" + bytes(100),
    "wrong version": b"\x16\x09\x01\x00\x04\x01\x00\x00\x00",
    "short body": b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
    "alert inside": b"\x16\x03\x01\x00\x01\x01" + b"\x15\x03\x01\x00\x02\x01\x00",
    "too long": b"\x16\x03\x01\x40\x00\x01\x01\x00\x00" + bytes(16380),
}


@pytest.mark.parametrize("name", BAD_HELLOS)
async def test_bad_hello(world: World, name: str) -> None:
    wire = await world.tcp()
    await wire.send(BAD_HELLOS[name])
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        await wire.until(b"anything")


async def test_no_server_name(world: World) -> None:
    """Without redirection there is no destination at all then."""
    world.guest_trust.check_hostname = False
    with pytest.raises(trio.BrokenResourceError):
        await world.tls(None)


async def test_guest_that_does_not_trust_us(world: World) -> None:
    """Counted: it tells of pinning or of a missing CA."""
    world.guest_trust = ssl.create_default_context()
    with pytest.raises(trio.BrokenResourceError):
        await world.tls()
    await trio.aclose_forcefully(world.streams[-1])
    with trio.fail_after(5):
        while not (await world.egress.statistics()).counters["handshakes_failed"]:
            await trio.sleep(0.01)


async def test_leaf_cache_is_bounded(world: World) -> None:
    await world.allow(API_KEY=credential("*.example.com"))
    for n in range(40):
        await world.tls(f"n{n}.example.com")
    await world.tls("n3.example.com")
    assert (await world.egress.statistics()).counters["minted"] == 40
