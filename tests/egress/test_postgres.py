"""Logins to Postgres: the guest has the placeholder, the server gets the password, and neither can do more."""

from __future__ import annotations

import hashlib
import os
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trustme

from hypeman._native.egress import rewrite_head
from hypeman.egress.policy import compile_policy, redirected_ports
from hypeman.egress.protocol import ApprovalNeeded
from hypeman.egress.records import AuditRecord
from hypeman.egress.service import Bounds, Limits
from hypeman.egress.transforms import Value
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    CredentialSource,
    EgressAccess,
    InjectAs,
    InjectRule,
    PostgresForm,
)
from hypeman.egress.usage import outcome_of
from hypeman.errors import InvalidRequest
from tests.egress.conftest import GUEST, HOST, Wire, World
from tests.egress.login_peers import check_sessions
from tests.egress.postgres_peers import (
    GSS_REQUEST,
    KEY,
    PLAIN,
    PLUS,
    SSL_REQUEST,
    Client,
    Server,
    authentication,
    cancel_request,
    certificate_of,
    error,
    first_message,
    message,
    startup,
)
from tests.egress.test_mtls import readable

PASSWORD = "pg-9f31c8d2a77e"
HELD = "mock-PGPASSWORD"
ROLE = startup(user="app", database="shop")


def postgres(port: int, **form: Any) -> CredentialPolicy:
    shape = PostgresForm(user=form.pop("user", "app"), **form)
    return CredentialPolicy(
        source=CredentialSource(env="REAL_KEY"),
        inject=(InjectRule(hosts=(HOST,), ports=(port,), as_=InjectAs(postgres=shape)),),
    )


class Shop:
    """A world with a server of Postgres, reached at the port that redirected TLS is taken for."""

    def __init__(self, world: World, server: Server, port: int) -> None:
        self.world, self.server, self.port = world, server, port
        self.records: list[AuditRecord] = []
        world.egress.on_audit(self.records.append)

    async def allow(self, password: str = PASSWORD, access: EgressAccess | None = None, **form: Any) -> None:
        await self.world.allow(secret=password, access=access, PGPASSWORD=postgres(self.port, **form))

    async def connect(self, name: str | None = HOST, *, direct: bool = False) -> Client:
        wire = await self.world.tcp()
        if not direct:
            await wire.send(SSL_REQUEST)
            assert await wire.exactly(1) == b"S"
        wire = await self.world.tls(name, over=wire, alpn=("postgresql",))
        return Client(wire, hashlib.sha256(certificate_of(wire.stream)).digest())

    async def log_in(self, password: str = HELD, first: bytes = ROLE) -> dict[str, str]:
        return await (await self.connect()).log_in(password, first)

    async def record(self) -> AuditRecord:
        """The next one."""
        while not self.records:
            await trio.sleep(0.01)
        return self.records.pop(0)

    async def check_records(self, *reasons: str) -> None:
        """Those that are not read yet; engines send them four times a second."""
        found = [await self.record() for _ in reasons]
        assert [each.reason for each in found] == list(reasons)
        assert all(outcome_of(each) == "failed" for each in found)


@pytest.fixture
def make_shop(make_world: Any, origin_ca: trustme.CA) -> Any:
    @asynccontextmanager
    async def make(**changes: Any) -> AsyncGenerator[Shop]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        leaf = origin_ca.issue_cert(changes.pop("certified", HOST))
        leaf.configure_cert(context)
        der = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
        server = Server(PASSWORD, context, der)
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            async with make_world(assumed_tls_port=port, **changes) as world:
                shop = Shop(world, server, port)
                await shop.allow()
                yield shop
            nursery.cancel_scope.cancel()

    return make


@pytest.fixture
async def shop(make_shop: Any) -> AsyncGenerator[Shop]:
    async with make_shop() as made:
        yield made


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("mechanism", "flag"), [(PLAIN, "n"), (PLUS, "p")])
async def test_session(shop: Shop, mechanism: str, flag: str, direct: bool) -> None:
    """The server is shown the password with channel binding, the guest only its own placeholder."""
    client = await shop.connect(direct=direct)
    first = startup(user="app", database="shop", application_name="x", options="-c a=b")
    assert await client.log_in(HELD, first, mechanism=mechanism, flag=flag) == {}
    assert await client.query("select 1") == b"select 1"
    assert (b"K", KEY) in client.messages
    assert shop.server.used == [f"{PLUS} p"]
    assert shop.server.startups == [{"user": "app", "database": "shop", "application_name": "x", "options": "-c a=b"}]
    await client.wire.send(message(b"X"))
    assert await client.wire.rest() == b""
    await client.wire.stream.aclose()
    record = await shop.record()
    assert (record.method, record.host, record.port, record.status) == ("POSTGRES", HOST, shop.port, 200)
    assert (record.credentials, record.injected, record.reason, record.http) == (("PGPASSWORD",), True, "ok", 0)
    assert record.bytes_up > 0 and record.bytes_down > 0
    assert outcome_of(record) == "ok"


# ── What the guest may do ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "parameters", "answer"),
    [
        ((3 << 16) + 2, {}, struct.pack(">II", 3 << 16, 0)),
        ((3 << 16) + 9999, {"_pq_.x": "1", "_pq_.y": ""}, struct.pack(">II", 3 << 16, 2) + b"_pq_.x\0_pq_.y\0"),
    ],
)
async def test_newer_protocol(shop: Shop, version: int, parameters: dict[str, str], answer: bytes) -> None:
    """Negotiated down to 3.0, and the server never hears of the options."""
    client = await shop.connect()
    assert await client.log_in(HELD, startup(version, user="app", database="shop", **parameters)) == {}
    assert client.messages[0] == (b"v", answer)
    assert shop.server.startups == [{"user": "app", "database": "shop"}]


async def test_gss_and_no_database(shop: Shop) -> None:
    """GSSAPI encryption is declined; without a database it is the one named like the role."""
    wire = await shop.world.tcp()
    await wire.send(GSS_REQUEST)
    assert await wire.exactly(1) == b"N"
    await wire.send(SSL_REQUEST)
    assert await wire.exactly(1) == b"S"
    client = Client(await shop.world.tls(over=wire, alpn=("postgresql",)))
    assert await client.log_in(HELD, startup(user="app")) == {}
    assert shop.server.startups == [{"user": "app", "database": "app"}]


async def test_without_a_server_name(shop: Shop) -> None:
    """There is one host for logins: it is verified as ever. With two, nobody knows which is meant."""
    client = await shop.connect(None)
    assert await client.log_in(HELD, ROLE) == {}
    other = for_hosts(postgres(shop.port, user="other"), "other.test")
    await shop.world.allow(secret=PASSWORD, PGPASSWORD=postgres(shop.port), OTHER=other)
    shop.world.guest_trust.check_hostname = False
    refused = await (await shop.connect(None)).log_in(HELD, ROLE)
    assert refused["C"] == "28000" and "(tls_required)" in refused["M"]


def for_hosts(policy: CredentialPolicy, *hosts: str) -> CredentialPolicy:
    rule = policy.inject[0]
    return CredentialPolicy(source=policy.source, inject=(InjectRule(hosts=hosts, ports=rule.ports, as_=rule.as_),))


REFUSED_LOGINS = [
    ("its own password", ROLE, "28P01", "placeholder_expected"),
    (PASSWORD, ROLE, "28P01", "placeholder_expected"),
    (HELD, startup(user="postgres", database="shop"), "28000", "role_denied"),
    (HELD, startup(user="App", database="shop"), "28000", "role_denied"),
    (HELD, startup(2 << 16, user="app"), "08P01", "postgres_protocol"),
    (HELD, SSL_REQUEST, "08P01", "postgres_protocol"),
    (HELD, GSS_REQUEST, "08P01", "postgres_protocol"),
    (HELD, first_message(3 << 16, "user", "app", "user", "root"), "08P01", "postgres_protocol"),
    (HELD, first_message(3 << 16, "user", "app", "database", "a", "database", "b"), "08P01", "postgres_protocol"),
    (HELD, first_message(3 << 16, "user", "app", "options", "a", "options", "b"), "08P01", "postgres_protocol"),
    (HELD, startup(user=""), "08P01", "postgres_protocol"),
    (HELD, startup(user="a" * 64), "08P01", "postgres_protocol"),
    (HELD, startup(database="shop"), "08P01", "postgres_protocol"),
    (HELD, first_message(3 << 16, "user", "app", *(f"p{i // 2}" for i in range(130))), "08P01", "postgres_protocol"),
    (HELD, startup(user="app", x="y" * 10_000), "08P01", "postgres_protocol"),
    (HELD, struct.pack(">II", 9, 3 << 16) + b"x", "08P01", "postgres_protocol"),
    (HELD, struct.pack(">II", 7, 3 << 16), "08P01", "postgres_protocol"),
    (HELD, struct.pack(">II", 1 << 31, 3 << 16), "08P01", "postgres_protocol"),
]


async def test_refused_logins(shop: Shop) -> None:
    """With an error that a client shows; the server hears of none of them."""
    for password, first, state, code in REFUSED_LOGINS:
        told = await shop.log_in(password, first)
        assert (told["S"], told["V"], told["C"]) == ("FATAL", "FATAL", state), (first, told)
        assert told["M"].startswith("hypeman: ") and told["M"].endswith(f"({code})"), (first, told)
        assert told["H"].startswith("change_the_request")
    for *_, code in REFUSED_LOGINS:
        record = await shop.record()
        assert (record.reason, record.injected, record.credentials) == (code, False, ())
    assert not shop.server.startups


async def test_database_of_the_rule(shop: Shop) -> None:
    await shop.allow(database="shop")
    assert await shop.log_in() == {}
    assert (await shop.log_in(HELD, startup(user="app", database="other")))["C"] == "28000"
    assert (await shop.log_in(HELD, startup(user="app")))["C"] == "28000"


async def test_physical_replication_is_in_no_database(shop: Shop) -> None:
    """It reads all of them, whichever one is named."""
    everything = startup(user="app", database="shop", replication="true")
    assert await shop.log_in(HELD, everything) == {}
    await shop.allow(database="shop")
    assert (await shop.log_in(HELD, everything))["M"].endswith("(role_denied)")
    assert await shop.log_in(HELD, startup(user="app", database="shop", replication="database")) == {}


@pytest.mark.parametrize("first", [ROLE, startup(2 << 16, user="app")])
async def test_without_tls(shop: Shop, first: bytes) -> None:
    wire = await shop.world.tcp()
    await wire.send(first)
    kind, body = await Client(wire).read()
    assert kind == b"E" and (b"C28000" in body or b"C08P01" in body)
    assert await wire.rest() == b""


async def test_host_without_a_rule(shop: Shop, origin_ca: trustme.CA) -> None:
    """Passed through unread to the server with its own certificate, as HTTPS is; where that fails, it is told."""
    trust = ssl.create_default_context()
    origin_ca.configure_trust(trust)
    trust.check_hostname = False
    shop.world.guest_trust, ours = trust, shop.world.guest_trust
    client = await shop.connect("other.test")
    assert client.binding == shop.server.binding
    assert await client.log_in(PASSWORD, ROLE, mechanism=PLUS, flag="p") == {}
    assert await client.query("unread") == b"unread"
    await client.wire.stream.aclose()
    assert ((await shop.record()).kind, shop.server.used) == ("passed_through", [f"{PLUS} p"])
    shop.world.guest_trust = ours
    shop.server.answer_to_tls = b"N"
    assert "(upstream_tls)" in (await (await shop.connect("other.test")).log_in(HELD, ROLE))["M"]
    rule = AccessRule(action=AccessAction.DENY, hosts=("other.test",))
    await shop.allow(access=EgressAccess(rules=(rule,)))
    assert "(host_denied_by_rule)" in (await (await shop.connect("other.test")).log_in(HELD, ROLE))["M"]


async def test_nothing_else_to_a_host_with_a_rule(shop: Shop) -> None:
    """TLS that does not say that it is for Postgres ends here too: it would be a way around the role."""
    connect = f"CONNECT {HOST}:{shop.port} HTTP/1.1\r\nHost: {HOST}:{shop.port}\r\n\r\n".encode()
    shop.server.direct = True
    for head in (b"", connect):
        wire = await shop.world.tcp()
        if head:
            assert (await shop.world.ask(wire, head, head_only=True))[0] == 200
        await shop.world.tls(HOST, over=wire)  # trusts no certificate but ours


async def test_malformed_scram_of_the_guest(shop: Shop) -> None:
    for mechanism, flag in ((PLAIN, "y"), (PLAIN, "p"), (PLUS, "n"), ("SCRAM-SHA-1", "n"), ("SCRAM-SHA-256 ", "n")):
        told = await (await shop.connect()).log_in(HELD, ROLE, mechanism=mechanism, flag=flag)
        assert told["C"] == "08P01", (mechanism, flag)


async def test_binding_to_another_certificate(shop: Shop) -> None:
    """Somebody between the guest and us would have one."""
    client = await shop.connect()
    client.binding = bytes(32)
    assert (await client.log_in(HELD, ROLE, mechanism=PLUS, flag="p"))["C"] == "28P01"


async def test_every_cut_of_the_guest(shop: Shop) -> None:
    """Each message, cut at each of its bytes, leaves nothing open; in single bytes, it works."""
    client = await shop.connect()
    whole = Pieces(client.wire)
    client.wire = whole
    assert await client.log_in(HELD, ROLE, mechanism=PLUS, flag="p") == {}
    for cut in range(0, len(ROLE), 3):
        client = await shop.connect()
        await client.wire.send(ROLE[:cut])
        await trio.aclose_forcefully(client.wire.stream)
    for cut in range(len(SSL_REQUEST)):
        wire = await shop.world.tcp()
        await wire.send(SSL_REQUEST[:cut])
        await trio.aclose_forcefully(wire.stream)
    assert await shop.log_in() == {}
    with trio.fail_after(60):
        while (await shop.world.egress.statistics()).in_use["connections"] > 2:
            await trio.sleep(0.02)


class Pieces(Wire):
    """Sends single bytes."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire.stream)

    async def send(self, data: bytes) -> None:
        for at in range(len(data)):
            await self.stream.send_all(data[at : at + 1])
            await trio.lowlevel.checkpoint()


async def test_oversized_message_of_the_guest(shop: Shop) -> None:
    client = await shop.connect()
    await client.wire.send(ROLE)
    await client.read()
    await client.wire.send(b"p" + struct.pack(">I", 3000) + bytes(100))
    kind, body = await client.read()
    assert kind == b"E" and b"C08P01" in body


# ── What the server may do ───────────────────────────────────────────────────────────────────────


async def test_server_in_single_bytes(shop: Shop) -> None:
    shop.server.piece = 1
    assert await shop.log_in() == {}


async def test_iterations(shop: Shop) -> None:
    for iterations in (4096, 4097, 12_345, 100_000):
        shop.server.iterations = iterations
        assert await shop.log_in() == {}


async def test_wrong_iterations(shop: Shop) -> None:
    """Few make the password easier to guess for a server that records the proof, many keep us busy."""
    for iterations in (0, 1, 4095, 1_000_001, 2**31, 2**64, -4096, "4096x", "", "04096", "+4096"):
        shop.server.iterations = iterations
        await check_distrusted(shop, iterations)


async def check_distrusted(shop: Shop, case: object) -> None:
    told = await shop.log_in()
    assert told["C"] == "08001" and told["M"].endswith("(upstream_authentication)"), (case, told)
    assert not shop.server.passwords


SALT = b"c2FsdHNhbHRzYWx0c2FsdA=="


CHALLENGES = [
    b"r=NONCE,s=" + SALT + b",i=4096",  # nothing of its own
    b"r=otherNONCE,s=" + SALT + b",i=4096",
    b"r=other,s=" + SALT + b",i=4096",
    b"r=NONCE\x01,s=" + SALT + b",i=4096",
    b"r=NONCEx,s=,i=4096",
    b"r=NONCEx,s=c2Fsd,i=4096",
    b"r=NONCEx,s=c2FsdB==,i=4096",
    b"r=NONCEx,s= " + SALT[1:] + b",i=4096",
    b"r=NONCEx,s=" + SALT + b",i=4096,x=y",
    b"r=NONCEx,i=4096,s=" + SALT,
    b"m=x,r=NONCEx,s=" + SALT + b",i=4096",
    b"r=NONCEx,s=" + SALT,
    b"r=NONCE" + b"x" * 600 + b",s=" + SALT + b",i=4096",
    b"e=other-error",
    b"",
]


async def test_malformed_challenges(shop: Shop) -> None:
    for challenge in CHALLENGES:
        shop.server.challenge = challenge
        await check_distrusted(shop, challenge)


async def test_server_that_does_not_know_the_password(shop: Shop) -> None:
    for proof in (b"v=" + b"A" * 43 + b"=", b"v=", b"e=invalid-proof", b"x", b"v=AAAA", b" "):
        shop.server.proof = proof
        await check_distrusted(shop, proof)


async def test_downgrades(shop: Shop) -> None:
    """Without the rule's consent nothing is sent that would be worth as much as the password."""
    for method in ("password", "md5", "trust"):
        shop.server.method = method
        await check_distrusted(shop, method)
    await shop.check_records(*["upstream_authentication"] * 3)


async def test_older_methods(shop: Shop) -> None:
    for accepted, method, works in (
        ("md5", "md5", True), ("md5", "password", False), ("password", "md5", True), ("password", "password", True),
        ("md5", "scram", True), ("password", "trust", False),
    ):  # fmt: skip
        await shop.allow(auth=accepted)
        shop.server.method = method
        shop.server.passwords.clear()
        assert (await shop.log_in() == {}) is works, (accepted, method)
        assert bool(shop.server.passwords) is (works and method != "scram")


async def test_no_mechanism_that_we_speak(shop: Shop) -> None:
    for mechanisms in ((), ("SCRAM-SHA-1",), ("SCRAM-SHA-512", "OAUTHBEARER"), ("SCRAM-SHA-256x",)):
        shop.server.mechanisms = mechanisms
        await check_distrusted(shop, mechanisms)


async def test_server_without_channel_binding(shop: Shop) -> None:
    """It is told that we could have done it, so that it notices if somebody else took its offer away."""
    shop.server.mechanisms = (PLAIN,)
    assert await shop.log_in() == {}
    assert shop.server.used == [f"{PLAIN} y"]


async def test_server_without_tls(shop: Shop) -> None:
    """Nothing that anybody may have put there before TLS is believed or shown, CVE-2021-23222 and CVE-2024-10977."""
    pay = error(C="28000", M="pay me")
    for answer in (b"N", b"E", b"X", b"SN", b"S" + pay, pay, b"HTTP/1.1 400 x"):
        shop.server.answer_to_tls = answer
        told = await shop.log_in()
        assert told["C"] == "08001" and "(upstream_tls)" in told["M"] and "pay me" not in str(told), answer
    assert not shop.server.startups


async def test_server_with_another_name(make_shop: Any) -> None:
    async with make_shop(certified="other.test") as shop:
        told = await shop.log_in()
        assert told["C"] == "08001" and "(upstream_certificate)" in told["M"]
        assert not shop.server.startups


async def test_in_clear_where_the_rule_says_so(shop: Shop) -> None:
    await shop.allow(tls="off")
    shop.server.answer_to_tls = b""
    shop.server.mechanisms = (PLAIN,)
    assert await shop.log_in() == {}
    assert shop.server.used == [f"{PLAIN} n"]
    with pytest.raises(InvalidRequest, match="tls off"):
        await shop.allow(tls="off", auth="password")


OUT_OF_ORDER = [
    (authentication(0) + message(b"D", b"x"), "upstream_response"),
    (authentication(0) + message(b"R", b"\0\0\0\3"), "upstream_response"),
    (authentication(0, b"x"), "upstream_authentication"),
    (authentication(3), "upstream_authentication"),
    (message(b"Z", b"I"), "upstream_response"),
    (message(b"K", KEY), "upstream_response"),
    (message(b"R", b""), "upstream_response"),
    (b"R" + struct.pack(">I", 3), "upstream_response"),
    (b"R" + struct.pack(">I", 1 << 31), "upstream_response"),
    (message(b"v", struct.pack(">II", 3 << 16, 0)), "upstream_response"),
]


async def test_server_out_of_order(shop: Shop) -> None:
    """The guest is told as long as it has not been let in."""
    for after, code in OUT_OF_ORDER:
        shop.server.after = after
        client = await shop.connect()
        if after.startswith(authentication(0)):
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                await client.log_in(HELD, ROLE)
        else:
            assert (await client.log_in(HELD, ROLE))["M"].endswith(f"({code})"), after
    await shop.check_records(*(code for _, code in OUT_OF_ORDER))


@pytest.mark.parametrize("before", [b"", authentication(0)])
async def test_server_that_goes_on_for_ever(shop: Shop, before: bytes) -> None:
    """What it says before the guest may speak is bounded: nothing else holds it back."""
    shop.server.after = before + message(b"N", b"SNOTICE\0\0") * 300_000
    client = await shop.connect()
    with suppress(EOFError):
        assert (await client.log_in(HELD, ROLE))["M"].endswith("(upstream_response)")
    assert len(client.messages) < 30_000
    assert (await shop.record()).reason == "upstream_response"


async def test_key_derivations_at_once(make_shop: Any) -> None:
    """Those that need several turns are bounded as handshakes are."""
    async with make_shop(limits=Limits(each=Bounds(handshakes=2))) as shop:
        shop.server.iterations = 500_000
        clients = [await shop.connect() for _ in range(4)]
        told: list[dict[str, str]] = []

        async def log_in(client: Client) -> None:
            told.append(await client.log_in(HELD, ROLE))

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(log_in, client)
        assert {} in told
        assert {each["C"] for each in told if each} == {"53300"}
        shop.server.iterations = 4096
        assert await shop.log_in() == {}
        assert not (await shop.world.egress.statistics()).in_use["handshakes"]


async def test_every_cut_of_the_server(shop: Shop) -> None:
    """What it says once the password is shown, ended at each byte: an end or an error, and no session but with all."""
    whole = authentication(0) + message(b"S", b"a\0b\0") + message(b"K", KEY) + message(b"Z", b"I")
    shop.server.closes = True
    for cut in range(len(whole)):
        shop.server.after = whole[:cut]
        client = await shop.connect()
        with suppress(EOFError, trio.BrokenResourceError):
            assert (await client.log_in(HELD, ROLE))["M"].endswith("(upstream_closed)")
    await shop.check_records(*["upstream_closed"] * len(whole))
    shop.server.after = None
    assert await shop.log_in() == {}


async def test_refusals_of_the_server(shop: Shop) -> None:
    """Are the guest's as they are; a wrong password counts as a rejected credential."""
    await shop.allow("wrong")
    assert await shop.log_in() == {"S": "FATAL", "V": "FATAL", "C": "28P01", "M": "password authentication failed"}
    record = await shop.record()
    assert (record.status, record.reason, outcome_of(record)) == (401, "ok", "rejected")
    await shop.allow()
    shop.server.after = authentication(0) + error(S="FATAL", C="3D000", M="no such database")
    client = await shop.connect()
    assert (await client.log_in(HELD, ROLE))["C"] == "3D000"


# ── Sessions, cancellation, rules ────────────────────────────────────────────────────────────────


async def test_cancellation(shop: Shop) -> None:
    """In clear, as libpq before 17 does, or over TLS: for a session of the instance, to its host over TLS."""
    client = await shop.connect()
    assert await client.log_in(HELD, ROLE) == {}
    for encrypted in (False, True):
        for key in (bytes(8), KEY[:4] + bytes(4), KEY):
            wire = (await shop.connect()).wire if encrypted else await shop.world.tcp()
            await wire.send(cancel_request(key))
            assert await wire.rest() == b""
    assert shop.server.cancelled == [KEY, KEY]
    await shop.world.allow("inst-b", "127.0.1.2", secret=PASSWORD, PGPASSWORD=postgres(shop.port))
    wire = await shop.world.tcp("127.0.1.2")
    await wire.send(cancel_request())
    assert await wire.rest() == b""
    await client.wire.stream.aclose()
    assert {(await shop.record()).method for _ in range(3)} == {"POSTGRES", "CANCEL"}
    wire = await shop.world.tcp()
    await wire.send(cancel_request())
    assert await wire.rest() == b""
    assert shop.server.cancelled == [KEY, KEY], "of another instance, and of a session that has ended"


async def test_cancellations_are_limited(make_shop: Any) -> None:
    async with make_shop(limits=Limits(requests_per_second=2)) as shop:
        assert await shop.log_in() == {}
        for _ in range(8):
            wire = await shop.world.tcp()
            await wire.send(cancel_request())
            await wire.rest()
        assert len(shop.server.cancelled) < 8
        assert "rate_limited" in {(await shop.record()).reason for _ in range(8)}


async def test_rotation_and_revocation(shop: Shop) -> None:
    """A new value is for the next login; a session ends when no rule allows it."""
    client = await shop.connect()
    assert await client.log_in(HELD, ROLE) == {}
    shop.server.password = "pg-another-one-5d1"
    assert (await shop.log_in())["C"] == "28P01"
    await shop.allow("pg-another-one-5d1")
    assert await shop.log_in() == {}
    assert await client.query("still here") == b"still here"
    await shop.allow("pg-another-one-5d1", database="other")
    assert await client.wire.rest() == b""
    assert (await shop.log_in())["M"].endswith("(role_denied)")


NOWHERE = EgressAccess(
    rules=(AccessRule(action=AccessAction.ALLOW, hosts=("other.test",)),), default=AccessDefault.DENY
)


async def log_in_at(shop: Shop, stage: str, **rules: Any) -> dict[str, str]:
    """What the guest is told if the rules change while the server is there; nothing: it is cut off."""
    told: dict[str, str] = {}
    shop.server.stops_at = stage

    async def log_in() -> None:
        with suppress(EOFError):
            told.update(await shop.log_in() or {"M": "let in"})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log_in)
        await shop.server.arrived.wait()
        await trio.sleep(0.1)
        await shop.allow(**rules)
        shop.server.held.set()
    return told


@pytest.mark.parametrize("stage", ["tls", "shown", "ready"])
@pytest.mark.parametrize(("rules", "code"), [({"user": "other"}, "(role_denied)"), ({"access": NOWHERE}, "(no_rule)")])
async def test_rules_that_change_during_the_login(shop: Shop, stage: str, rules: dict[str, Any], code: str) -> None:
    """It is decided again before the guest is let in, and before it may speak."""
    told = await log_in_at(shop, stage, **rules)
    assert told.get("M", "").endswith("" if stage == "ready" else code)
    assert bool(told) is (stage != "ready")
    assert (await shop.record()).reason == code[1:-1]


@pytest.mark.parametrize("stage", ["shown", "ready"])
async def test_rule_that_demands_tls_during_the_login(shop: Shop, stage: str) -> None:
    shop.server.answer_to_tls = b""
    await shop.allow(tls="off")
    told = await log_in_at(shop, stage)
    assert told.get("M", "(upstream_tls)").endswith("(upstream_tls)")


async def test_rule_that_demands_tls_in_a_session(shop: Shop) -> None:
    """One in clear ends."""
    shop.server.answer_to_tls = b""
    await shop.allow(tls="off")
    client = await shop.connect()
    assert await client.log_in(HELD, ROLE) == {}
    await shop.allow()
    assert await client.wire.rest() == b""


async def test_value_that_is_not_there_yet(shop: Shop) -> None:
    """The login waits for it."""
    source = CredentialSource(named="vault")
    policy = CredentialPolicy(source=source, inject=postgres(shop.port).inject)
    await shop.world.egress.set_policy("inst-a", GUEST, {"PGPASSWORD": policy}, {})
    async with trio.open_nursery() as nursery:
        told: list[dict[str, str]] = []

        async def log_in() -> None:
            told.append(await shop.log_in())

        nursery.start_soon(log_in)
        await trio.sleep(0.3)
        assert not shop.server.startups
        await shop.world.egress.set_policy(
            "inst-a", GUEST, {"PGPASSWORD": policy}, {}, obtained={"PGPASSWORD": Value(PASSWORD)}
        )
    assert told == [{}]


async def test_where_it_may_go(shop: Shop) -> None:
    """Rules on destinations decide about logins too; those on paths and methods of HTTP are not for them."""
    for rules, allowed in (
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,)),), True),
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,), methods=("POSTGRES",)),), True),
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,), methods=("GET",)),), False),
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,), paths=("/*",)),), False),
        ((AccessRule(action=AccessAction.ALLOW, hosts=("other.test",)),), False),
    ):
        await shop.allow(access=EgressAccess(rules=rules, default=AccessDefault.DENY))
        told = await shop.log_in()
        assert (told == {}) is allowed, rules
        assert allowed or (told["C"], told["M"][-9:]) == ("28000", "(no_rule)")


async def test_approval(shop: Shop) -> None:
    """A login can be asked about, once it has shown the placeholder."""
    asked: list[ApprovalNeeded] = []
    allow = True

    async def ask(what: ApprovalNeeded, decide: Any) -> None:
        asked.append(what)
        await decide(allow)

    shop.world.egress.on_approval_needed(ask)
    rule = AccessRule(action=AccessAction.ASK, hosts=(HOST,))
    await shop.allow(access=EgressAccess(rules=(rule,), default=AccessDefault.DENY))
    assert (await shop.log_in("wrong"))["C"] == "28P01"
    assert not asked
    assert await shop.log_in() == {}
    assert (asked[0].method, asked[0].host, asked[0].path) == ("POSTGRES", HOST, "*")
    allow = False
    assert (await shop.log_in())["M"].endswith("(not_approved)")


async def test_http_never_gets_the_password(shop: Shop) -> None:
    """A rule as postgres covers no request of HTTP, and its placeholder in one is refused."""
    wire = await shop.world.tcp()
    head = f"GET http://{HOST}:{shop.port}/ HTTP/1.1\r\nHost: {HOST}:{shop.port}\r\n"
    status, fields, _ = await shop.world.ask(wire, f"{head}X: {HELD}\r\n\r\n".encode())
    assert (status, fields["x-hypeman-egress"]) == (403, "placeholder_outside_hosts")
    compiled = compile_policy({"A": postgres(8443)}, {"REAL_KEY": PASSWORD})
    request = f"GET / HTTP/1.1\r\nHost: {HOST}:8443\r\n\r\n".encode()
    sent = rewrite_head(request, compiled, HOST.encode(), False, 8443)
    assert isinstance(sent, bytes) and sent.count(b"\r\n") == 4, "request line, Host and Via"


async def test_the_password_is_in_the_policy_alone(shop: Shop, caplog: Any) -> None:
    """After logins that worked and that did not, the engine's memory has it once, with the rule."""
    assert await shop.log_in() == {}
    shop.server.proof = b"v=" + b"A" * 43 + b"="
    await shop.log_in()
    shop.server.proof = None
    await shop.allow("wrong-" + PASSWORD[::-1])
    await shop.log_in()
    for method in ("md5", "password"):
        await shop.allow(auth=method)
        shop.server.method = method
        assert await shop.log_in() == {}
    if "HYPEMAN_EGRESS_SANITIZED" not in os.environ:  # which keeps what was freed
        memory = b"".join(readable(shop.world.egress.engine_pid))
        assert memory.count(b"mock-PGPASSWORD"), "else this looks at nothing"
        assert memory.count(PASSWORD.encode()) == 1
        assert memory.count(PASSWORD[::-1].encode()) == 0
    records = [await shop.record() for _ in range(2)]
    text = repr(records) + caplog.text + repr(await shop.world.egress.statistics())
    assert PASSWORD not in text and PASSWORD[::-1] not in text


async def test_sessions_are_independent(shop: Shop) -> None:
    """Many at once, each with what it sent; the engine holds nothing afterwards."""

    async def session(number: int) -> None:
        client = await shop.connect()
        assert await client.log_in(HELD, ROLE) == {}
        text = f"{number}-" * 5000
        assert await client.query(text) == text.encode()
        await client.wire.send(message(b"X"))
        await client.wire.stream.aclose()

    await check_sessions(shop.world, session)


# ── Configuration ────────────────────────────────────────────────────────────────────────────────


def test_rules_that_are_refused() -> None:
    good = postgres(5432).inject[0]
    form = good.as_.postgres
    assert form is not None
    for rule, words in (
        (InjectRule(as_=good.as_), "needs hosts"),
        (InjectRule(hosts=(HOST,), as_=good.as_, scrub=True), "cannot scrub"),
        (InjectRule(hosts=(HOST,), as_=good.as_, ports=(443,)), "443"),
        (InjectRule(hosts=(HOST,), as_=InjectAs(postgres=form, query="x")), "exactly one"),
    ):
        policy = CredentialPolicy(source=CredentialSource(env="K"), inject=(rule,))
        with pytest.raises(InvalidRequest, match=words):
            compile_policy({"A": policy}, {"K": "x"})
    with pytest.raises(InvalidRequest, match="both set the password of 'app'"):
        compile_policy({"A": postgres(5432), "B": postgres(5432, database="d")}, {"REAL_KEY": "x"})
    compile_policy({"A": postgres(5432), "B": postgres(5432, user="b"), "C": postgres(5433)}, {"REAL_KEY": "x"})
    with pytest.raises(InvalidRequest, match="1000 characters") as caught:
        compile_policy({"A": postgres(5432)}, {"REAL_KEY": "s3cret" * 200})
    assert "s3cret" not in str(caught.value)


def test_ports() -> None:
    rule = InjectRule(hosts=(HOST,), as_=postgres(1).inject[0].as_)
    both = CredentialPolicy(source=CredentialSource(env="K"), inject=(rule, *postgres(6432).inject))
    header = InjectRule(as_=InjectAs(header="X", format="${value}"), ports=(8443,))
    other = CredentialPolicy(source=CredentialSource(env="K"), inject=(header,))
    assert redirected_ports({"A": both, "B": other}) == (5432, 6432)
    assert redirected_ports({"B": other}) == ()
