"""Where connections may go: CONNECT, server names, names and addresses, tenants, certificates."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from hypeman.egress.policy import Unmatched
from hypeman.egress.records import AuditRecord
from hypeman.egress.service import Bounds, Limits, Timeouts
from hypeman.errors import InternalError
from tests.egress.conftest import GUEST, HOST, PORTS, SECRET, Origin, Wire, World, credential, read_response

H = f"Host: {HOST}\r\n"
RESET = (OSError, EOFError, trio.BrokenResourceError)


async def connect(
    world: World, target: str, *, host: str | None = None, source: str = GUEST
) -> tuple[Wire, int, dict[str, str]]:
    wire = await world.tcp(source)
    status, fields, _ = await world.ask(
        wire, f"CONNECT {target} HTTP/1.1\r\nHost: {host or target}\r\n\r\n".encode(), head_only=True
    )
    return wire, status, fields


async def test_connect(world: World) -> None:
    wire, status, _ = await connect(world, f"{HOST}:{world.origin.port}")
    assert status == 200
    inside = await world.tls(over=wire)
    assert (await world.ask(inside, f"GET /t HTTP/1.1\r\n{H}\r\n".encode()))[2] == b"GET /t 0"
    assert world.origin.requests[0].all("authorization") == [f"Bearer {SECRET}"]


async def test_connect_without_host_in_1_0(world: World) -> None:
    """Python's http.client sends CONNECT like this."""
    wire = await world.tcp()
    await wire.send(f"CONNECT {HOST}:{world.origin.port} HTTP/1.0\r\n\r\n".encode())
    assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert (await world.ask(await world.tls(over=wire), f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200


@pytest.mark.parametrize(
    ("target", "host", "reason"),
    [
        (HOST, None, "bad_host"),
        (f"{HOST}:0", None, "bad_host"),
        (f"{HOST}:99999", None, "bad_host"),
        (f"{HOST}:443", "evil.test:443", "host_mismatch"),
        ("evil.example%23.com:443", None, "bad_host"),
        ("127.1:443", None, "bad_host"),
        ("0x7f.1:443", None, "bad_host"),
        ("2130706433:443", None, "bad_host"),
        ("[::1%25lo]:443", None, "bad_host"),
        ("a..b:443", None, "bad_host"),
        ("-a.b:443", None, "bad_host"),
        ("169.254.169.254:80", None, "address_denied"),
        ("10.0.0.1:443", None, "address_denied"),
        ("[::1]:443", None, "address_denied"),
        ("[::ffff:169.254.169.254]:443", None, "address_denied"),
        ("[64:ff9b::a9fe:a9fe]:443", None, "address_denied"),
        ("[fd00::1]:443", None, "address_denied"),
        ("[fe80::1]:443", None, "address_denied"),
    ],
)
async def test_connect_refused(world: World, target: str, host: str | None, reason: str) -> None:
    _, status, fields = await connect(world, target, host=host)
    assert (status >= 400, fields["x-hypeman-egress"]) == (True, reason)


async def test_connect_to_one_name_and_tls_to_another(world: World) -> None:
    """With a rule: 421 inside TLS, readable; passed through: the connection ends."""
    wire, _, _ = await connect(world, f"{HOST}:{world.origin.port}")
    inside = await world.tls("www.other.test", over=wire)
    status, fields, _ = await world.ask(inside, b"GET / HTTP/1.1\r\nHost: www.other.test\r\n\r\n")
    assert (status, fields["x-hypeman-egress"]) == (421, "host_mismatch")
    wire, status, _ = await connect(world, f"other.test:{world.origin.port}")
    assert status == 200
    with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
        await world.tls(HOST, over=wire)
    assert world.origin.requests == []


async def test_connect_carries_only_tls(world: World) -> None:
    wire, _, _ = await connect(world, f"{HOST}:{world.origin.port}")
    await wire.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await wire.rest() == b""
    assert (await world.egress.statistics()).denied["not_tls"] == 1


async def test_plain_http_never_carries_a_credential(world: World) -> None:
    """Not even to a host with a rule; the placeholder is refused there, since the host could make nothing of it."""
    wire = await world.tcp()
    target = f"http://{HOST}:{world.plain.port}/p"
    status, _, _ = await world.ask(wire, f"GET {target} HTTP/1.1\r\nHost: {HOST}:{world.plain.port}\r\n\r\n".encode())
    assert status == 200
    assert world.plain.requests[0].fields == [("host", f"{HOST}:{world.plain.port}"), ("via", "1.1 hypeman")]
    fields = f"Host: {HOST}:{world.plain.port}\r\nAuthorization: Bearer mock-API_KEY\r\n"
    status, said, _ = await world.ask(wire, f"GET {target} HTTP/1.1\r\n{fields}\r\n".encode())
    assert (status, said["x-hypeman-egress"]) == (403, "placeholder_outside_hosts")
    status, _, _ = await world.ask(wire, f"GET https://{HOST}/ HTTP/1.1\r\n{H}\r\n".encode())
    assert status == 400


async def test_placeholder_elsewhere(world: World) -> None:
    """A placeholder on its way to a host that the credential is not for: refused and recorded."""
    await world.allow(API_KEY=credential(HOST), OTHER=credential("other.test", env="OTHER_KEY", header="X-Key"))
    records: list[AuditRecord] = []
    world.egress.on_audit(records.append)
    status, fields, _ = await world.get(name="other.test", fields="X-Foo: Bearer mock-API_KEY\r\n")
    assert (status, fields["x-hypeman-egress"]) == (403, "placeholder_outside_hosts")
    while not records:
        await trio.sleep(0.01)
    assert (records[0].reason, records[0].injected, records[0].host) == (
        "placeholder_outside_hosts", False, "other.test",
    )  # fmt: skip


async def test_passed_through_unread(world: World, origin_ca: trustme.CA) -> None:
    """A host without a rule: its own certificate reaches the guest, and HTTP/2 or pinning would work."""
    context = ssl.create_default_context()
    origin_ca.configure_trust(context)
    world.guest_trust, ours = context, world.guest_trust
    records: list[AuditRecord] = []
    world.egress.on_audit(records.append)
    for over in (None, (await connect(world, f"other.test:{world.origin.port}"))[0]):
        wire = await world.tls("other.test", over=over)
        big = b"x" * 300_000
        head = f"POST /pass HTTP/1.1\r\nHost: other.test\r\nContent-Length: {len(big)}\r\n\r\n".encode()
        assert (await world.ask(wire, head + big))[2] == b"POST /pass 300000"
        await trio.aclose_forcefully(wire.stream)
    assert world.origin.requests[0].all("authorization") == []
    while len(records) < 2:
        await trio.sleep(0.01)
    assert {record.kind for record in records} == {"passed_through"}
    assert records[0].bytes_up > 300_000
    world.guest_trust = ours
    with pytest.raises(RESET):
        await world.tls("other.test")


@pytest.mark.parametrize(("unmatched", "status"), [(Unmatched.INSPECT, 200), (Unmatched.DENY, 403)])
async def test_unmatched_hosts(world: World, unmatched: Unmatched, status: int) -> None:
    """Decrypted and carried without a credential, or refused; addresses are refused in both."""
    await world.egress.set_policy("inst-a", GUEST, {"K": credential(HOST)}, {"REAL_KEY": SECRET}, unmatched)
    assert (await world.get(name="other.test"))[0] == status
    assert [request.all("authorization") for request in world.origin.requests] == [[]] * (status == 200)
    _, refused, fields = await connect(world, f"127.0.0.1:{world.origin.port}")
    assert (refused, fields["x-hypeman-egress"]) == (403, "address_literal")


async def test_wildcard_is_one_label(world: World) -> None:
    await world.allow(API_KEY=credential("*.example.com"))
    await world.egress.set_policy("inst-a", GUEST, {"API_KEY": credential("*.example.com")}, {"REAL_KEY": SECRET},
                            Unmatched.INSPECT)  # fmt: skip
    for name, wanted in (("api.example.com", 1), ("x.example.com", 1), ("example.com", 0), ("a.b.example.com", 0)):
        assert (await world.get(name=name))[0] == 200
        assert len(world.origin.requests[-1].all("authorization")) == wanted, name


async def test_several_credentials(world: World) -> None:
    await world.allow(A=credential(HOST), B=credential(HOST, header="X-Api-Key", template="${value}", env="OTHER_KEY"),
                C=credential("example.com"))  # fmt: skip
    await world.get(fields="x-API-key: mine\r\nX-API-KEY: mine too\r\n")
    assert world.origin.requests[0].all("x-api-key") == [f"other-{SECRET}"]
    assert world.origin.requests[0].all("authorization") == [f"Bearer {SECRET}"]


async def test_names_are_resolved_here(world: World) -> None:
    """One forbidden address among several refuses the name; names without addresses are reported."""
    for addresses in (["127.0.0.1", "10.1.2.3"], ["169.254.169.254"], ["::1", "127.0.0.1"], ["fd00::1"],
                      ["::ffff:10.0.0.1"], ["100.64.0.1"], ["0.0.0.0"], ["224.0.0.1"], ["192.168.1.1"]):  # fmt: skip
        world.egress._resolver.forget()
        world.names[HOST] = addresses
        status, fields, _ = await world.get()
        assert (status, fields["x-hypeman-egress"]) == (403, "address_denied"), addresses
    world.egress._resolver.forget()
    world.names[HOST] = []
    assert (await world.get())[1]["x-hypeman-egress"] == "name_not_resolved"
    assert world.origin.connections == 0


async def test_rebinding(world: World) -> None:
    """The resolver is asked again later and answers with the metadata address: refused then, too."""
    assert (await world.get())[0] == 200
    world.egress._resolver.forget()
    world.names[HOST] = ["169.254.169.254"]
    await world.allow(secret="another")  # a new generation of rules: kept connections are not used
    assert (await world.get())[0] == 403


async def test_next_address_is_tried(world: World) -> None:
    world.names[HOST] = ["127.0.0.9", "127.0.0.1"]  # nobody listens at the first
    assert (await world.get())[0] == 200
    world.names["other.test"] = ["127.0.0.9"]
    await world.egress.set_policy("inst-a", GUEST, {}, {}, Unmatched.INSPECT)
    status, fields, body = await world.get(name="other.test")
    assert (status, fields["x-hypeman-egress"]) == (502, "connect_failed")
    assert b"Connection refused" in body


async def test_failed_pass_through_can_be_read(world: World) -> None:
    """The guest gets the reason inside TLS with our certificate, not a reset."""
    world.names["other.test"] = ["10.0.0.1"]
    status, fields, _ = await world.get(name="other.test")
    assert (status, fields["x-hypeman-egress"]) == (403, "address_denied")


async def test_unregistered_source(world: World) -> None:
    with pytest.raises(RESET):
        wire = await world.tcp("127.0.1.77")
        await wire.rest()
        await wire.send(b"x")
    assert (await world.egress.statistics()).counters["unregistered"] == 1


async def nobody_is_served(world: World, wire: Wire) -> None:
    """An old connection of a removed instance is closed, or, if the request was quicker, refused."""
    try:
        status, fields, _ = await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    except RESET:
        return
    assert (status, fields["x-hypeman-egress"]) == (403, "unregistered")
    assert await wire.rest() == b""


async def test_addresses_that_are_none(world: World) -> None:
    """Told as a failure of ours; the rules of others stay."""
    with pytest.raises(InternalError):
        await world.allow("inst-b", "not an address")
    assert (await world.get())[0] == 200


async def test_removed_instance(world: World) -> None:
    """Its connections end, and so do the ones in the pool."""
    wire = await world.tls()
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
    await world.egress.remove("inst-a")
    await nobody_is_served(world, wire)
    assert len(world.origin.requests) == 1
    with pytest.raises(RESET):
        await world.tls()


async def test_address_of_another_instance(world: World) -> None:
    """An address that passes to a new instance takes nothing along."""
    wire = await world.tls()
    await world.allow("inst-b", secret="sk-of-b")
    await nobody_is_served(world, wire)
    await world.get()
    assert world.origin.requests[-1].all("authorization") == ["Bearer sk-of-b"]


async def test_tenants_share_no_connection(world: World) -> None:
    """Two instances, one host: never one upstream connection, though both keep theirs."""
    await world.allow("inst-b", "127.0.1.2", "sk-of-b")
    for _ in range(5):
        await world.get(source="127.0.1.1")
        await world.get(source="127.0.1.2")
    of = {value: {r.connection for r in world.origin.requests if r.all("authorization") == [value]}
          for value in (f"Bearer {SECRET}", "Bearer sk-of-b")}  # fmt: skip
    assert [len(found) for found in of.values()] == [1, 1]
    assert not set.intersection(*of.values())


async def test_limits(make_world: object) -> None:
    """Connections, requests and new names per instance; 429 says when to come again."""
    async with make_world(
        limits=Limits(each=Bounds(connections=3), requests_per_second=2, mints_per_second=1)
    ) as world:  # type: ignore[operator]
        await world.allow(API_KEY=credential("*.example.com"))
        wire = await world.tls()
        answers = [await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()) for _ in range(8)]
        assert {answer[0] for answer in answers} == {200, 429}
        assert next(answer for answer in answers if answer[0] == 429)[1]["retry-after"] == "1"
        await world.tls()
        await world.tls()
        with pytest.raises(RESET):
            await world.tls()
        assert (await world.egress.statistics()).counters["too_many"] == 1
    async with make_world(limits=Limits(mints_per_second=1)) as world:  # type: ignore[operator]
        await world.allow(API_KEY=credential("*.example.com"))
        made = 0
        for n in range(6):
            try:
                await world.tls(f"n{n}.example.com")
                made += 1
            except RESET:
                break
        assert 1 <= made <= 3


async def test_time_limits(make_world: object) -> None:
    """A head that never ends is answered 408; a host that never answers 504; silence ends idle connections."""
    limits = Timeouts(head=0.3, idle_down=0.3, stream=0.4, handshake=0.3, half=0.3)
    async with make_world(timeouts=limits) as world:  # type: ignore[operator]
        await world.allow()
        wire = await world.tls()
        await wire.send(b"GET / HT")
        assert (await read_response(wire))[1]["x-hypeman-egress"] == "request_timeout"
        wire = await world.tls()
        assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
        assert await wire.rest() == b""

        async def never(request: object, wire: Wire) -> None:
            await wire.more()

        world.origin.answers["/never"] = never
        status, fields, _ = await world.get("/never")
        assert (status, fields["x-hypeman-egress"]) == (504, "upstream_timeout")
        silent = await world.tcp()
        with pytest.raises(RESET):
            await silent.until(b"anything")


async def test_drain(make_world: object) -> None:
    """An exchange that runs is finished and its connection told to close; new connections wait for the next engine."""
    async with make_world() as world:  # type: ignore[operator]
        await world.allow()
        go = trio.Event()

        async def slow(request: object, wire: Wire) -> None:
            await go.wait()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")

        world.origin.answers["/slow"] = slow
        idle, busy = await world.tls(), await world.tls()
        await busy.send(f"GET /slow HTTP/1.1\r\n{H}\r\n".encode())
        while not world.origin.requests:
            await trio.sleep(0.01)
        await world.egress._engine.drain(20)
        assert await idle.rest() == b""
        waiting = await world.tcp()
        go.set()
        status, fields, body = await read_response(busy)
        assert (status, fields["connection"], body) == (200, "close", b"done")
        assert await busy.rest() == b""
        await world.tls(over=waiting)


# The certificate matrix: only a certificate that is good for the very name lets a credential out.

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


SIGNS = x509.KeyUsage(digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
                      key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False,
                      decipher_only=False)  # fmt: skip


class Issuer:
    def __init__(self, signed_by: Issuer | None = None, *, permitted: str | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"issuer {id(self)}")])
        builder = self.builder(self.name, self.key.public_key(), signed_by)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(SIGNS, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
        if permitted:
            builder = builder.add_extension(x509.NameConstraints([x509.DNSName(permitted)], None), critical=True)
        self.certificate = builder.sign((signed_by or self).key, hashes.SHA256())

    def builder(self, name: x509.Name, key: object, by: Issuer | None, start: datetime.datetime = NOW - DAY,
                end: datetime.datetime = NOW + DAY) -> x509.CertificateBuilder:  # fmt: skip
        builder = (x509.CertificateBuilder().subject_name(name).issuer_name((by or self).name).public_key(key)  # type: ignore[arg-type]
                   .serial_number(x509.random_serial_number())
                   .not_valid_before(start).not_valid_after(end))  # fmt: skip
        if by is None:
            return builder
        return builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False
        )

    def leaf(self, *names: str | x509.GeneralName, common: str = "x", key: object = None, digest: object = None,
             start: datetime.datetime = NOW - DAY, end: datetime.datetime = NOW + DAY,
             usage: x509.ObjectIdentifier | None = None,
             chain: tuple[Issuer, ...] = ()) -> tuple[bytes, bytes]:  # fmt: skip
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])
        builder = self.builder(subject, key.public_key(), self, start, end)  # type: ignore[attr-defined]
        if names:
            found = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(found), critical=False)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        made = builder.sign(self.key, digest or hashes.SHA256())  # type: ignore[arg-type]
        pem = b"".join(
            each.public_bytes(serialization.Encoding.PEM) for each in (made, *(i.certificate for i in chain))
        )
        return pem, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,  # type: ignore[attr-defined]
                                      serialization.NoEncryption())  # fmt: skip


ROOT = Issuer()
MIDDLE = Issuer(ROOT)
STRANGER = Issuer()
CONSTRAINED = Issuer(ROOT, permitted="other.test")

CERTIFICATES: dict[str, tuple[bool, Callable[[], tuple[bytes, bytes]] | None]] = {
    "good": (True, lambda: ROOT.leaf(HOST)),
    "good by wildcard": (True, lambda: ROOT.leaf("*.example.com")),
    "good through an intermediate": (True, lambda: MIDDLE.leaf(HOST, chain=(MIDDLE,))),
    "good RSA 2048": (True, lambda: ROOT.leaf(HOST, key=rsa.generate_private_key(65537, 2048))),
    "intermediate missing": (False, lambda: MIDDLE.leaf(HOST)),
    "expired": (False, lambda: ROOT.leaf(HOST, start=NOW - 3 * DAY, end=NOW - DAY)),
    "not yet valid": (False, lambda: ROOT.leaf(HOST, start=NOW + DAY, end=NOW + 2 * DAY)),
    "wrong name": (False, lambda: ROOT.leaf("www.example.com")),
    "name in the common name only": (False, lambda: ROOT.leaf(common=HOST)),
    "name in the common name, other SAN": (False, lambda: ROOT.leaf("other.test", common=HOST)),
    "unknown CA": (False, lambda: STRANGER.leaf(HOST)),
    "wildcard too high": (False, lambda: ROOT.leaf("*.com")),
    "wildcard inside a label": (False, lambda: ROOT.leaf("a*.example.com")),
    "address": (False, lambda: ROOT.leaf(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))),
    "for clients only": (False, lambda: ROOT.leaf(HOST, usage=ExtendedKeyUsageOID.CLIENT_AUTH)),
    "name constraints": (False, lambda: CONSTRAINED.leaf(HOST, chain=(CONSTRAINED,))),
    "RSA 1024": (False, lambda: ROOT.leaf(HOST, key=rsa.generate_private_key(65537, 1024))),
    "the leaf of our own CA": (False, None),
}


@pytest.mark.parametrize("name", CERTIFICATES)
async def test_certificates(make_world: object, tmp_path: Path, name: str) -> None:
    """502 with the reason, and the host has not seen a byte of the request."""
    good, make = CERTIFICATES[name]
    roots = tmp_path / "roots.pem"
    roots.write_bytes(ROOT.certificate.public_bytes(serialization.Encoding.PEM))
    async with make_world(extra_ca_file=str(roots)) as world:  # type: ignore[operator]
        await world.allow()
        if make is None:
            authority = world.egress.authority
            issuer = Issuer()
            issuer.key = serialization.load_pem_private_key(authority.key, None)  # type: ignore[assignment]
            issuer.name = x509.load_pem_x509_certificate(authority.certificate).subject
            chain, key = issuer.leaf(HOST)
        else:
            chain, key = make()
        path = tmp_path / "leaf.pem"
        path.write_bytes(chain + key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        context.load_cert_chain(path)
        other = Origin()
        listeners = await world.nursery.start(
            partial(trio.serve_ssl_over_tcp, other.serve, 0, context, host="127.0.0.1", handler_nursery=world.nursery)
        )
        port = listeners[0].transport_listener.socket.getsockname()[1]
        PORTS.append(port)
        await world.allow()
        wire, _, _ = await connect(world, f"{HOST}:{port}")
        inside = await world.tls(over=wire)
        status, fields, body = await world.ask(inside, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
        if good:
            assert status == 200, body
        else:
            assert (status, fields["x-hypeman-egress"]) == (502, "upstream_certificate"), body
            assert other.requests == []
