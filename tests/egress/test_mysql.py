"""Logins to MySQL: the guest has the placeholder, the server gets the password, and neither can do more."""

from __future__ import annotations

import os
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trustme

from hypeman._native.egress import rewrite_head
from hypeman.egress.policy import compile_policy, logs_in_to_postgres, redirected_ports
from hypeman.egress.protocol import ApprovalNeeded
from hypeman.egress.records import AuditRecord
from hypeman.egress.service import Limits
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
    MysqlForm,
)
from hypeman.egress.usage import outcome_of
from hypeman.errors import InvalidRequest
from tests.egress.conftest import GUEST, HOST, World
from tests.egress.login_peers import check_sessions
from tests.egress.mysql_peers import (
    ATTRIBUTES,
    CLEAR,
    COMPRESS,
    DEPRECATE_EOF,
    LOCAL_FILES,
    LONG_ANSWER,
    LONG_PASSWORD,
    MFA,
    MULTI,
    NATIVE,
    PLUGINS,
    PROTOCOL_41,
    READY,
    SECURE,
    SERVERS,
    SHA2,
    SSL,
    THREAD,
    TRACK,
    USUAL,
    ZSTD,
    Client,
    Server,
    Told,
    counted,
    error,
    greeting,
    login,
    packet,
    sha2,
    ssl_request,
    text,
    told,
)
from tests.egress.test_mtls import readable
from tests.egress.test_postgres import Pieces, for_hosts

PASSWORD = "my-9f31c8d2a77e"
HELD = "mock-MYSQL_PWD"
ANYBODY = "8.0.0-hypeman"
"""The version in a greeting for a host that is not known yet."""


def mysql(port: int, **form: Any) -> CredentialPolicy:
    shape = MysqlForm(user=form.pop("user", "app"), **form)
    return CredentialPolicy(
        source=CredentialSource(env="REAL_KEY"),
        inject=(InjectRule(hosts=(HOST,), ports=(port,), as_=InjectAs(mysql=shape)),),
    )


class Shop:
    """A world with a server of MySQL, reached at the port that redirected TLS is taken for."""

    def __init__(self, world: World, server: Server, port: int) -> None:
        self.world, self.server, self.port = world, server, port
        self.records: list[AuditRecord] = []
        world.egress.on_audit(self.records.append)

    async def allow(self, password: str = PASSWORD, access: EgressAccess | None = None, **form: Any) -> None:
        await self.world.allow(secret=password, access=access, MYSQL_PWD=mysql(self.port, **form))

    async def two_hosts(self) -> None:
        """At the same port: the other one for another user."""
        other = for_hosts(mysql(self.port, user="other"), "other.test")
        await self.world.allow(secret=PASSWORD, MYSQL_PWD=mysql(self.port), OTHER=other)

    async def connect(self, *, tls: bool = False, name: str | None = HOST) -> Client:
        client = Client(await self.world.tcp())
        assert await client.greeted() == Told()
        if tls:
            await self.begin_tls(client, name)
        return client

    async def begin_tls(self, client: Client, name: str | None = HOST) -> None:
        await client.send(ssl_request())
        client.wire = await self.world.tls(name, over=client.wire, alpn=())

    async def log_in(self, password: str = HELD, user: str = "app", **more: Any) -> Told:
        client = Client(await self.world.tcp())
        refused = await client.greeted()
        return refused if refused.code else await client.log_in(password, user, **more)

    async def record(self) -> AuditRecord:
        """The next one."""
        while not self.records:
            await trio.sleep(0.01)
        return self.records.pop(0)


@pytest.fixture
def make_shop(make_world: Any, origin_ca: trustme.CA) -> Any:
    @asynccontextmanager
    async def make(**changes: Any) -> AsyncGenerator[Shop]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        origin_ca.issue_cert(changes.pop("certified", HOST)).configure_cert(context)
        server = Server(PASSWORD, context)
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            redirected = port if changes.pop("redirected", True) else 443
            async with make_world(assumed_tls_port=redirected, **changes) as world:
                shop = Shop(world, server, port)
                await shop.allow()
                yield shop
            nursery.cancel_scope.cancel()

    return make


@pytest.fixture
async def shop(make_shop: Any) -> AsyncGenerator[Shop]:
    async with make_shop() as made:
        yield made


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("plugin", [NATIVE, SHA2])
async def test_session(shop: Shop, plugin: str, tls: bool) -> None:
    """The server is shown the password, the guest only its own placeholder; what the client is comes through."""
    shop.server.plugin = shop.server.account = plugin
    client = await shop.connect(tls=tls)
    assert (client.plugin, client.version, client.thread) == (plugin, "8.0.36", THREAD)
    pairs = counted(b"_client_name") + counted(b"x" * 300)
    wanted = USUAL | MULTI | LOCAL_FILES | DEPRECATE_EOF | TRACK
    assert await client.log_in(HELD, database="shop", attributes=pairs, capabilities=wanted) == Told()
    assert await client.query("select 1") == "select 1"
    (seen,) = shop.server.logins
    assert (seen.user, seen.database, seen.plugin, seen.attributes) == ("app", "shop", plugin, counted(pairs))
    assert (
        seen.capabilities & (MULTI | LOCAL_FILES | DEPRECATE_EOF | TRACK) == MULTI | LOCAL_FILES | DEPRECATE_EOF | TRACK
    )
    assert shop.server.encrypted == [True]
    await client.wire.send(packet(0, b"\x01"))
    assert await client.wire.rest() == b""
    await client.wire.stream.aclose()
    record = await shop.record()
    assert (record.method, record.host, record.port, record.status) == ("MYSQL", HOST, shop.port, 200)
    assert (record.credentials, record.injected, record.reason, record.http) == (("MYSQL_PWD",), True, "ok", 0)
    assert record.bytes_up > 0 and record.bytes_down > 0
    assert outcome_of(record) == "ok"


# ── What the guest may do ────────────────────────────────────────────────────────────────────────


async def test_capabilities(shop: Shop) -> None:
    """Nothing that compresses, no second factor; of the rest what the server has; and no more than was offered."""
    client = await shop.connect()
    assert not client.capabilities & (COMPRESS | ZSTD | MFA)
    assert client.capabilities & (SSL | DEPRECATE_EOF | LOCAL_FILES) == SSL | DEPRECATE_EOF | LOCAL_FILES
    assert await client.log_in(HELD, capabilities=USUAL | COMPRESS | ZSTD | DEPRECATE_EOF | 1 << 31) == Told()
    seen = shop.server.logins[-1].capabilities
    assert not seen & (COMPRESS | ZSTD | MFA | 1 << 31) and seen & DEPRECATE_EOF
    shop.server.capabilities &= ~(DEPRECATE_EOF | LOCAL_FILES | ATTRIBUTES)
    client = await shop.connect()
    assert not client.capabilities & (DEPRECATE_EOF | LOCAL_FILES | ATTRIBUTES)
    shop.server.capabilities &= ~PLUGINS
    shop.server.account = NATIVE
    assert await shop.log_in(capabilities=USUAL | LOCAL_FILES) == Told()
    assert not shop.server.logins[-1].capabilities & (PLUGINS | LOCAL_FILES)


async def test_capabilities_of_mariadb(shop: Shop) -> None:
    """Those beyond 32 bits are in what MySQL reserves, where the server says that it is none."""
    shop.server.capabilities &= ~LONG_PASSWORD
    shop.server.further = 0xFF
    client = await shop.connect()
    assert not client.capabilities & LONG_PASSWORD and client.further == 0x3D
    assert await client.log_in(HELD, capabilities=USUAL & ~LONG_PASSWORD, further=0xFFFF) == Told()
    assert shop.server.logins[-1].further == 0x3D
    shop.server.capabilities |= LONG_PASSWORD
    assert (await shop.connect()).further == 0


@pytest.mark.parametrize("server", [NATIVE, SHA2])
@pytest.mark.parametrize("client", [NATIVE, SHA2])
async def test_client_with_a_way_of_its_own(shop: Shop, server: str, client: str) -> None:
    """It names another way than it was greeted with, and is asked in that one."""
    shop.server.plugin = shop.server.account = server
    guest = await shop.connect()
    assert await guest.log_in(HELD, plugin=client) == Told()
    assert guest.plugin == client
    assert (await (await shop.connect()).log_in("mine", plugin=client)).code == 1045


async def test_client_with_a_way_that_nobody_knows(shop: Shop) -> None:
    """It is asked for caching_sha2_password, which all have."""
    guest = await shop.connect()
    assert await guest.log_in(HELD, plugin="client_ed25519", answer=b"x" * 64) == Told()
    assert guest.plugin == SHA2


async def test_old_client(shop: Shop) -> None:
    """Without plugins there is one way; without even that, none."""
    shop.server.plugin = shop.server.account = NATIVE
    old = USUAL & ~PLUGINS
    assert await shop.log_in(capabilities=old & ~LONG_ANSWER) == Told()
    refused = await shop.log_in("wrong", capabilities=old)
    assert refused.code == 1045 and "(placeholder_expected)" in refused.message


def bad_logins() -> list[bytes]:
    good = login("app", b"a" * 32, database="d", attributes=counted(b"a") + counted(b"b"))
    short = login("app", b"", capabilities=PROTOCOL_41, plugin="")
    return [
        b"",
        *(good[:cut] for cut in range(1, len(good)) if cut != 32),
        good + b"x",
        login("a" * 128, b""),
        login("app", b"", plugin="p" * 64),
        login("app", b"", attributes=b"\x01"),
        login("app", b"", attributes=counted(b"a")),
        login("app", b"", attributes=b"\xfe" + bytes(8)),
        login("app", b"", attributes=b"\xfb\xfb"),
        login("app", b"", capabilities=USUAL & ~PROTOCOL_41),
        short,
        struct.pack("<IIB", USUAL, 0, 45) + bytes(23),
        struct.pack("<IIB", USUAL | SSL, 0, 45) + bytes(24),
        login("app", b"a" * 32, capabilities=USUAL | SSL),
    ]


async def test_malformed_logins(shop: Shop) -> None:
    """Cut at each of its bytes among them. Told in words; the server hears of none."""
    cases = bad_logins()
    for body in cases:
        client = await shop.connect()
        await client.send(body)
        refused = told(await client.read())
        assert (refused.code, refused.state) == (1043, "08S01"), body
        assert "(mysql_protocol)" in refused.message, body
        assert await client.wire.rest() == b""
    for _ in cases:
        assert (await shop.record()).reason == "mysql_protocol"
    assert not shop.server.logins


async def test_packets_out_of_order_or_too_long(shop: Shop) -> None:
    for raw in (packet(0, b"x"), packet(2, b"x"), packet(255, login("app", b"")), b"\xff\xff\xff\x01", b"\x01\0\1\1"):
        client = await shop.connect()
        await client.wire.send(raw)
        assert "(mysql_protocol)" in told(await client.read()).message
    client = await shop.connect()
    await client.send(login("app", b"", plugin=NATIVE))
    assert (await client.read())[:1] == b"\xfe"
    await client.wire.send((3000).to_bytes(3, "little") + b"\x03")
    assert "(mysql_protocol)" in told(await client.read()).message


async def test_every_cut_of_the_guest(shop: Shop) -> None:
    """Ended at each byte it leaves nothing open; in single bytes, it works."""
    client = await shop.connect()
    client.wire = Pieces(client.wire)
    assert await client.log_in(HELD) == Told()
    whole = packet(1, login("app", b"a" * 32))
    for cut in range(0, len(whole), 3):
        client = await shop.connect()
        await client.wire.send(whole[:cut])
        await trio.aclose_forcefully(client.wire.stream)
    for cut in range(0, 36, 5):
        client = await shop.connect()
        await client.wire.send(packet(1, ssl_request())[:cut] + (b"\x16\x03" if cut == 35 else b""))
        await trio.aclose_forcefully(client.wire.stream)
    with trio.fail_after(60):
        while (await shop.world.egress.statistics()).in_use["connections"] > 1:
            await trio.sleep(0.02)
    with trio.fail_after(60):
        while (await shop.world.egress.statistics()).in_use["upstreams"] > 1:
            await trio.sleep(0.02)


async def test_refused_logins(shop: Shop) -> None:
    """With an error that a client shows; the server hears of none of them."""
    for password, user, code in (
        ("its own password", "app", "placeholder_expected"),
        (PASSWORD, "app", "placeholder_expected"),
        ("", "app", "placeholder_expected"),
        (HELD, "root", "role_denied"),
        (HELD, "App", "role_denied"),
        (HELD, "", "role_denied"),
    ):
        refused = await shop.log_in(password, user)
        assert (refused.code, refused.state) == (1045, "28000")
        assert refused.message.startswith("hypeman: ") and f"({code})" in refused.message
        assert "; change_the_request: " in refused.message
        record = await shop.record()
        assert (record.reason, record.injected, record.credentials) == (code, False, ())
        assert outcome_of(record) == "failed"
    refused = await shop.log_in(answer=b"")
    assert "(placeholder_expected)" in refused.message
    assert not shop.server.logins


async def test_garbage_instead_of_tls(shop: Shop) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\x05hello", packet(2, login("app", b""))):
        client = await shop.connect()
        await client.send(ssl_request())
        await client.wire.send(data)
        await client.wire.rest()
    client = await shop.connect(tls=True)
    await client.send(ssl_request())
    assert "TLS within TLS" in told(await client.read()).message
    assert not shop.server.logins
    assert await shop.log_in() == Told()


# ── Which host is meant ──────────────────────────────────────────────────────────────────────────


async def test_two_hosts_at_one_port(shop: Shop) -> None:
    """The server name says which, or the user; nobody is connected to before. The number is of no session."""
    await shop.two_hosts()
    client = await shop.connect(tls=True)
    assert (client.version, client.thread, client.plugin) == (ANYBODY, 2**32 - 1, SHA2)
    assert not shop.server.connections
    assert await client.log_in(HELD) == Told()
    client = await shop.connect()
    assert await client.log_in(HELD, capabilities=USUAL | DEPRECATE_EOF) == Told()
    assert not shop.server.logins[-1].capabilities & DEPRECATE_EOF, "it was not offered"
    shared = for_hosts(mysql(shop.port), "other.test")
    await shop.world.allow(secret=PASSWORD, MYSQL_PWD=mysql(shop.port), OTHER=shared)
    refused = await shop.log_in()
    assert refused.code == 1045 and "(ambiguous_host)" in refused.message
    assert await (await shop.connect(tls=True)).log_in(HELD) == Told()


async def test_host_without_a_rule(shop: Shop) -> None:
    """A server name that is none of the rules'; the host that was connected to is left alone."""
    shop.world.guest_trust.check_hostname = False
    client = await shop.connect(tls=True, name="other.test")
    assert shop.server.connections == 1
    refused = await client.log_in(HELD)
    assert refused.code == 1045 and "(host_denied)" in refused.message
    assert not shop.server.logins
    assert ((await shop.record()).host, shop.server.connections) == ("other.test", 1)


async def test_tls_without_a_server_name(shop: Shop) -> None:
    """The leaf is for the host that can be meant."""
    client = await shop.connect(tls=True, name=None)
    assert await client.log_in(HELD) == Told()


async def test_connect_by_name(make_shop: Any) -> None:
    """CONNECT names the host. Another server name then is refused."""
    async with make_shop(redirected=False) as shop:
        shop.world.guest_trust.check_hostname = False
        head = f"CONNECT {HOST}:{shop.port} HTTP/1.1\r\nHost: {HOST}:{shop.port}\r\n\r\n".encode()
        for name, code in ((None, ""), (HOST, ""), ("other.test", "host_mismatch")):
            wire = await shop.world.tcp()
            assert (await shop.world.ask(wire, head, head_only=True))[0] == 200
            client = Client(wire)
            assert await client.greeted() == Told()
            if name:
                await shop.begin_tls(client, name)
            refused = await client.log_in(HELD)
            assert f"({code})" in refused.message if code else refused == Told()
        wire = await shop.world.tcp()
        assert (await shop.world.ask(wire, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))[0], "others speak first as ever"


# ── What the server may do ───────────────────────────────────────────────────────────────────────


async def test_server_in_single_bytes(shop: Shop) -> None:
    shop.server.piece = 1
    assert await shop.log_in() == Told()


async def test_ways_to_authenticate(shop: Shop) -> None:
    """What the server names, what the account has, what the rule accepts. The password itself is sent to a server that
    cannot know its hash yet, over TLS."""
    for accepted, plugin, account, cached, works in (
        ("sha2", SHA2, SHA2, True, True), ("sha2", SHA2, SHA2, False, True), ("sha2", NATIVE, SHA2, True, True),
        ("sha2", SHA2, NATIVE, True, False), ("sha2", NATIVE, NATIVE, True, False),
        ("native", SHA2, NATIVE, True, True),
        ("native", NATIVE, SHA2, False, True), ("native", "sha256_password", SHA2, True, True),
        ("native", SHA2, CLEAR, True, False), ("clear", SHA2, CLEAR, True, True), ("clear", NATIVE, NATIVE, True, True),
    ):  # fmt: skip
        await shop.allow(auth=accepted)
        shop.server.plugin, shop.server.account, shop.server.cached = plugin, account, cached
        shop.server.answers.clear()
        told = await shop.log_in()
        assert (told == Told()) is works, (accepted, plugin, account, cached, told)
        sent = [each for each in shop.server.answers if PASSWORD.encode() in each]
        assert bool(sent) is (works and (not cached or account == CLEAR))
        assert works or ("(upstream_authentication)" in told.message and "does not accept" in told.message)


async def test_ways_that_are_not_supported(shop: Shop) -> None:
    """Named, with what to do."""
    for plugin in ("client_ed25519", "auth_gssapi_client", "dialog", "sha256_password", "parsec", "x" * 63):
        shop.server.after = b"\xfe" + text(plugin) + os.urandom(32) + b"\0"
        told = await shop.log_in()
        assert f"authenticates by {plugin}, which is not supported" in told.message and told.code == 1429
    shop.server.after = b"\xfe"
    assert "mysql_old_password" in (await shop.log_in()).message
    assert not shop.server.answers


GREETINGS = [
    (b"", "upstream_closed"),
    (packet(0, b""), "upstream_response"),
    (packet(1, greeting()), "upstream_response"),
    (packet(0, b"\x09" + greeting()[1:]), "upstream_response"),
    (packet(0, greeting(version="")), "upstream_response"),
    (packet(0, greeting(version="v" * 64)), "upstream_response"),
    (packet(0, greeting(version="8.0\r\n")), "upstream_response"),
    (packet(0, greeting(plugin="p" * 64)), "upstream_response"),
    (packet(0, greeting(capabilities=SERVERS & ~PROTOCOL_41)), "upstream_response"),
    (packet(0, greeting(capabilities=SERVERS & ~SECURE)), "upstream_response"),
    (packet(0, greeting() + b"x"), "upstream_response"),
    (b"\xff\xff\xff\0", "upstream_response"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "upstream_response"),
    (packet(0, error(1040, "08004", "pay me")), "upstream_closed"),
    (packet(0, b"\xff\x10\x04Too many connections"), "upstream_closed"),
    *((packet(0, greeting()[:cut]), "upstream_response") for cut in range(1, len(greeting()) - 22)),
]


async def test_malformed_greetings(shop: Shop) -> None:
    """Refused before the guest is greeted, with nothing of what anybody may have put there."""
    for raw, code in GREETINGS:
        shop.server.greets = raw
        async with trio.open_nursery() as nursery:
            client = Client(await shop.world.tcp())
            if len(raw) in (0, 4):  # it says no more
                await trio.sleep(0.05)
                shop.server.closes = True
            with trio.move_on_after(5):
                refused = await client.greeted()
                assert f"({code})" in refused.message and refused.state == "" and "pay me" not in refused.message, raw
            nursery.cancel_scope.cancel()
    assert not shop.server.logins


async def test_server_without_tls(shop: Shop) -> None:
    shop.server.capabilities &= ~SSL
    refused = await shop.log_in()
    assert refused.code == 1429 and "(upstream_tls)" in refused.message
    shop.server.capabilities |= SSL
    shop.server.greets = packet(0, greeting()) + packet(1, READY)
    refused = await shop.log_in()
    assert "(upstream_response)" in refused.message, "it could be anybody's, and would be read behind TLS"
    assert not shop.server.logins


async def test_server_with_another_name(make_shop: Any) -> None:
    async with make_shop(certified="other.test") as shop:
        refused = await shop.log_in()
        assert refused.code == 1429 and "(upstream_certificate)" in refused.message
        assert not shop.server.logins


async def test_in_clear_where_the_rule_says_so(shop: Shop) -> None:
    """Hashes only: the password itself never."""
    await shop.allow(tls="off")
    assert await shop.log_in() == Told()
    assert shop.server.encrypted == [False]
    shop.server.cached = False
    refused = await shop.log_in()
    assert "(upstream_authentication)" in refused.message and "over TLS only" in refused.message
    with pytest.raises(InvalidRequest, match="tls off"):
        await shop.allow(tls="off", auth="clear")
    assert not shop.server.answers


OUT_OF_ORDER = [
    (packet(2, READY), "upstream_response"),
    (packet(4, READY), "upstream_response"),
    (packet(3, b""), "upstream_response"),
    (packet(3, b"\x02x"), "upstream_response"),
    (packet(3, b"\x01"), "upstream_response"),
    (packet(3, b"\x01\x05"), "upstream_response"),
    (packet(3, b"\x01\x03") + packet(4, b"\x01\x03"), "upstream_response"),
    (packet(3, b"\x01\x03") + packet(4, b"\x01\x04"), "upstream_response"),
    (packet(3, b"\xfe" + text(NATIVE) + b"x" * 19), "upstream_response"),
    (packet(3, b"\xfe" + text(NATIVE)), "upstream_response"),
    (packet(3, b"\xfe" + NATIVE.encode()), "upstream_response"),
    (packet(3, b"\xfe" + text("p\x01p") + b"x" * 20), "upstream_response"),
    (packet(3, b"\xff\x01"), "upstream_response"),
    (b"\x01\x40\x00\x03" + bytes(100), "upstream_response"),
]


async def test_server_out_of_order(shop: Shop) -> None:
    for raw, code in OUT_OF_ORDER:
        shop.server.raw_after = raw
        refused = await shop.log_in()
        assert refused.code == 1429 and f"({code})" in refused.message, raw
    for _, code in OUT_OF_ORDER:
        assert (await shop.record()).reason == code


async def test_server_that_switches_twice(shop: Shop) -> None:
    again = b"\xfe" + text(NATIVE) + text(b"x" * 20)
    shop.server.raw_after = packet(3, again) + packet(5, again)
    assert "(upstream_response)" in (await shop.log_in()).message


async def test_every_cut_of_the_server(shop: Shop) -> None:
    """What it says once it was answered, ended at each byte."""
    whole = packet(3, b"\x01\x03") + packet(4, READY)
    shop.server.closes = True
    for cut in range(len(whole)):
        shop.server.raw_after = whole[:cut]
        assert "(upstream_closed)" in (await shop.log_in()).message
    shop.server.raw_after = whole
    assert await shop.log_in() == Told()


async def test_refusals_of_the_server(shop: Shop) -> None:
    """Are the guest's as they are; a wrong password counts as a rejected credential."""
    await shop.allow("wrong")
    assert await shop.log_in() == Told(1045, "28000", "Access denied for user 'app'")
    record = await shop.record()
    assert (record.status, record.reason, outcome_of(record)) == (401, "ok", "rejected")
    await shop.allow()
    shop.server.after = error(1049, "42000", "Unknown database 'x'")
    assert await shop.log_in() == Told(1049, "42000", "Unknown database 'x'")
    assert (await shop.record()).status == 503


async def test_server_that_is_not_there(shop: Shop) -> None:
    """Told before the greeting, as servers do."""
    shop.world.names[HOST] = ["127.0.0.9"]
    refused = await shop.log_in()
    assert (refused.code, refused.state) == (1429, "") and "(connect_failed)" in refused.message


@pytest.mark.parametrize("tls", [False, True])
async def test_server_that_goes_away_before_the_login(shop: Shop, tls: bool) -> None:
    """As servers do after some seconds. The guest gets the error in its turn, else its client takes it for garbage."""
    shop.server.greets = packet(0, greeting())
    shop.server.closes = True
    client = await shop.connect()
    await trio.sleep(0.1)
    if tls:
        await shop.begin_tls(client)
    refused = await client.log_in(HELD)
    assert refused.code == 1429 and "(upstream_closed)" in refused.message
    assert (await shop.record()).reason == "upstream_closed"


# ── Sessions and rules ───────────────────────────────────────────────────────────────────────────


async def test_rotation_and_revocation(shop: Shop) -> None:
    """A new value is for the next login; a session ends when no rule allows it."""
    client = await shop.connect()
    assert await client.log_in(HELD) == Told()
    shop.server.password = "my-another-one-5d1"
    assert (await shop.log_in()).code == 1045
    await shop.allow("my-another-one-5d1")
    assert await shop.log_in() == Told()
    assert await client.query("still here") == "still here"
    await shop.allow("my-another-one-5d1", user="other")
    assert await client.wire.rest() == b""
    assert "(role_denied)" in (await shop.log_in()).message


NOWHERE = EgressAccess(
    rules=(AccessRule(action=AccessAction.ALLOW, hosts=("other.test",)),), default=AccessDefault.DENY
)


@pytest.mark.parametrize("stage", ["tls", "shown"])
@pytest.mark.parametrize(("rules", "code"), [({"user": "other"}, "(role_denied)"), ({"access": NOWHERE}, "(no_rule)")])
async def test_rules_that_change_during_the_login(shop: Shop, stage: str, rules: dict[str, Any], code: str) -> None:
    refused = Told()
    shop.server.stops_at = stage

    async def log_in() -> None:
        nonlocal refused
        refused = await shop.log_in()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log_in)
        await shop.server.arrived.wait()
        await trio.sleep(0.1)
        await shop.allow(**rules)
        shop.server.held.set()
    assert code in refused.message
    assert (await shop.record()).reason == code[1:-1]


async def test_rule_that_demands_tls_in_a_session(shop: Shop) -> None:
    """One in clear ends."""
    await shop.allow(tls="off")
    client = await shop.connect()
    assert await client.log_in(HELD) == Told()
    await shop.allow()
    assert await client.wire.rest() == b""


async def test_value_that_is_not_there_yet(shop: Shop) -> None:
    """The login waits for it, and the server is connected to once it is there."""
    source = CredentialSource(named="vault")
    policy = CredentialPolicy(source=source, inject=mysql(shop.port).inject)
    await shop.world.egress.set_policy("inst-a", GUEST, {"MYSQL_PWD": policy}, {})
    refused = [Told(1)]
    async with trio.open_nursery() as nursery:

        async def log_in() -> None:
            refused[0] = await shop.log_in()

        nursery.start_soon(log_in)
        await trio.sleep(0.3)
        assert not shop.server.logins
        await shop.world.egress.set_policy(
            "inst-a", GUEST, {"MYSQL_PWD": policy}, {}, obtained={"MYSQL_PWD": Value(PASSWORD)}
        )
    assert refused == [Told()]


async def test_where_it_may_go(shop: Shop) -> None:
    """Rules on destinations decide about logins too, before anything is connected to."""
    for rules, allowed in (
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,)),), True),
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,), methods=("MYSQL",)),), True),
        ((AccessRule(action=AccessAction.ALLOW, hosts=(HOST,), methods=("GET", "POSTGRES")),), False),
        ((AccessRule(action=AccessAction.ALLOW, hosts=("other.test",)),), False),
    ):
        await shop.allow(access=EgressAccess(rules=rules, default=AccessDefault.DENY))
        before = shop.server.connections
        refused = await shop.log_in()
        assert (refused == Told()) is allowed, rules
        assert allowed or ("(no_rule)" in refused.message and shop.server.connections == before)


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
    assert (await shop.log_in("wrong")).code == 1045
    assert not asked and not shop.server.connections
    assert await shop.log_in() == Told()
    assert (asked[0].method, asked[0].host, asked[0].path) == ("MYSQL", HOST, "*")
    allow = False
    assert "(not_approved)" in (await shop.log_in()).message


async def test_limits(make_shop: Any) -> None:
    """Refused before the greeting: too many logins, too many at once."""
    async with make_shop(limits=Limits(requests_per_second=2)) as shop:
        codes = {(await shop.log_in()).code for _ in range(8)}
        assert codes == {0, 1040}


async def test_http_never_gets_the_password(shop: Shop) -> None:
    """A rule as mysql covers no request of HTTP."""
    compiled = compile_policy({"A": mysql(8443)}, {"REAL_KEY": PASSWORD})
    request = f"GET / HTTP/1.1\r\nHost: {HOST}:8443\r\n\r\n".encode()
    sent = rewrite_head(request, compiled, HOST.encode(), False, 8443)
    assert isinstance(sent, bytes) and sent.count(b"\r\n") == 4, "request line, Host and Via"


async def test_the_password_is_in_the_policy_alone(shop: Shop, caplog: Any) -> None:
    """After logins that worked and that did not, the engine's memory has it once, with the rule."""
    assert await shop.log_in() == Told()
    shop.server.cached = False
    assert await shop.log_in() == Told()
    shop.server.cached = True
    await shop.allow("wrong-" + PASSWORD[::-1])
    await shop.log_in()
    for accepted, plugin in (("native", NATIVE), ("clear", CLEAR)):
        await shop.allow(auth=accepted)
        shop.server.account = plugin
        assert await shop.log_in() == Told()
    if "HYPEMAN_EGRESS_SANITIZED" not in os.environ:  # which keeps what was freed
        memory = b"".join(readable(shop.world.egress.engine_pid))
        assert memory.count(b"mock-MYSQL_PWD"), "else this looks at nothing"
        assert memory.count(PASSWORD.encode()) == 1
        assert memory.count(PASSWORD[::-1].encode()) == 0
    records = [await shop.record()]
    shown = repr(records) + caplog.text + repr(await shop.world.egress.statistics())
    assert PASSWORD not in shown and PASSWORD[::-1] not in shown


async def test_sessions_are_independent(shop: Shop) -> None:
    """Many at once, each with what it sent; the engine holds nothing afterwards."""

    async def session(number: int) -> None:
        client = await shop.connect(tls=number % 2 == 0)
        assert await client.log_in(HELD) == Told()
        query = f"{number}-" * 5000
        assert await client.query(query) == query
        await client.wire.send(packet(0, b"\x01"))
        await client.wire.stream.aclose()

    await check_sessions(shop.world, session)


# ── Configuration ────────────────────────────────────────────────────────────────────────────────


def test_rules_that_are_refused() -> None:
    good = mysql(3306).inject[0]
    form = good.as_.mysql
    assert form is not None
    for rule, words in (
        (InjectRule(as_=good.as_), "as mysql needs hosts"),
        (InjectRule(hosts=(HOST,), as_=good.as_, scrub=True), "cannot scrub"),
        (InjectRule(hosts=(HOST,), as_=good.as_, ports=(443,)), "443"),
        (InjectRule(hosts=(HOST,), as_=InjectAs(mysql=form, query="x")), "exactly one"),
    ):
        policy = CredentialPolicy(source=CredentialSource(env="K"), inject=(rule,))
        with pytest.raises(InvalidRequest, match=words):
            compile_policy({"A": policy}, {"K": "x"})
    with pytest.raises(InvalidRequest, match="both set the password of 'app'"):
        compile_policy({"A": mysql(3306), "B": mysql(3306, auth="sha2")}, {"REAL_KEY": "x"})
    header = InjectRule(hosts=("b.test",), as_=InjectAs(header="X", format="${value}"), ports=(3306,))
    other = CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=(header,))
    with pytest.raises(InvalidRequest, match="port 3306 is for mysql; credential 'B'"):
        compile_policy({"A": mysql(3306), "B": other}, {"REAL_KEY": "x"})
    compile_policy({"A": mysql(3306), "B": mysql(3306, user="b"), "C": mysql(3307)}, {"REAL_KEY": "x"})
    with pytest.raises(InvalidRequest, match="1000 characters") as caught:
        compile_policy({"A": mysql(3306)}, {"REAL_KEY": "s3cret" * 200})
    assert "s3cret" not in str(caught.value)
    compile_policy({"A": mysql(3306, auth="clear")}, {"REAL_KEY": "s3cret" * 200})


def test_ports() -> None:
    rule = InjectRule(hosts=(HOST,), as_=mysql(1).inject[0].as_)
    both = CredentialPolicy(source=CredentialSource(env="K"), inject=(rule, *mysql(3307).inject))
    assert redirected_ports({"A": both}) == (3306, 3307)
    assert not logs_in_to_postgres({"A": both})


def test_hash_of_a_challenge() -> None:
    """As published: the native one in MariaDB's and PyMySQL's tests, the other in Go's driver."""
    from tests.egress.mysql_peers import native

    challenge = bytes((10, 47, 74, 111, 75, 73, 34, 48, 88, 76, 114, 74, 37, 13, 3, 80, 82, 2, 23, 21))
    assert sha2("secret", challenge) == bytes((
        244, 144, 231, 111, 102, 217, 216, 102, 101, 206, 84, 217, 140, 120, 208, 172,
        254, 47, 176, 176, 139, 66, 61, 168, 7, 20, 72, 115, 211, 11, 49, 44,
    ))  # fmt: skip
    scramble = bytes((70, 114, 92, 94, 1, 38, 11, 116, 63, 114, 23, 101, 126, 103, 26, 95, 81, 17, 24, 21))
    assert native("secret", scramble) == bytes((
        53, 177, 140, 159, 251, 189, 127, 53, 109, 252, 172, 50, 211, 192, 240, 164, 26, 48, 207, 45,
    ))  # fmt: skip
