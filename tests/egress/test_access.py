"""Egress rules on the wire: what is decided, how a refusal reads, and when a change is in force."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
import trustme

from hypeman.egress.protocol import ApprovalNeeded
from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import check_access
from hypeman.egress.service import Decide, Timeouts
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRecord,
    AccessRule,
    EgressAccess,
    PrivateNetworks,
)
from tests.egress.conftest import HOST, SECRET, World, credential, read_response
from tests.egress.test_http2 import client

ALLOW, DENY = AccessAction.ALLOW, AccessAction.DENY


def closed(*rules: AccessRule, **fields: Any) -> EgressAccess:
    return check_access(EgressAccess(rules=rules, default=AccessDefault.DENY, **fields))


async def records_of(world: World, count: int) -> list[AuditRecord]:
    found: list[AuditRecord] = []
    world.egress.on_audit(found.append)
    while len(found) < count:
        await trio.sleep(0.01)
    return found


async def test_refused_readably(world: World) -> None:
    """Inside TLS, before anything is looked up, as RFC 9457 has it."""
    await world.allow(
        access=closed(
            AccessRule(action=ALLOW, hosts=(HOST,), methods=("GET",), paths=("/v1/*",)),
            AccessRule(action=DENY, name="no-deletes", hosts=(HOST,), methods=("DELETE",)),
            AccessRule(action=DENY, hosts=("*.b.example.com",)),
        )
    )
    seen = {}
    for name, method, path in (
        (HOST, "GET", "/v1/x?y"), (HOST, "GET", "/v2"), (HOST, "DELETE", "/v1/x"), (HOST, "GET", "/v1/../v2"),
        ("a.b.example.com", "GET", "/"), ("other.test", "POST", "/"),
    ):  # fmt: skip
        wire = await world.tls(name)
        seen[method, name, path] = await world.ask(wire, f"{method} {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    statuses = [(status, fields.get("x-hypeman-egress")) for status, fields, _ in seen.values()]
    assert statuses == [
        (200, None), (403, "no_rule"), (403, "request_denied"), (400, "ambiguous_path"), (403, "host_denied_by_rule"),
        (403, "no_rule"),
    ]  # fmt: skip
    _, fields, body = seen["DELETE", HOST, "/v1/x"]
    assert fields["content-type"] == "application/problem+json"
    assert json.loads(body) == {
        "type": "urn:hypeman:egress:request_denied",
        "title": "a rule of this instance denies this method or path",
        "status": 403,
        "code": "request_denied",
        "next": "never_retry",
        "requested": {"scheme": "https", "host": HOST, "port": world.origin.port, "method": "DELETE"},
        "rule": "no-deletes",
    }
    assert json.loads(seen["POST", "other.test", "/"][2])["next"] == "use_another_host"
    assert set(world.asked) == {HOST}
    [request] = world.origin.requests
    assert request.all("authorization") == [f"Bearer {SECRET}"]


async def test_refused_readably_in_http2(world: World) -> None:
    await world.allow(access=closed())
    peer = await client(world)
    status, fields, body = await peer.answer(await peer.ask(path="/x"))
    assert (status, fields["content-type"], json.loads(body)["rule"]) == (403, "application/problem+json", "default")


async def test_method_override(world: World) -> None:
    """A header that makes servers use another method than the one that was allowed."""
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,), methods=("GET", "POST"))))
    assert (await world.get())[0] == 200
    for field in ("X-HTTP-Method-Override: DELETE\r\n", "x-method-override: PUT\r\n", "X-Http-Method: DELETE\r\n"):
        status, fields, _ = await world.get(fields=field)
        assert (status, fields["x-hypeman-egress"]) == (403, "method_override")
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,))))
    assert (await world.get(fields="X-HTTP-Method-Override: DELETE\r\n"))[0] == 200


async def test_in_force_from_the_next_request(world: World) -> None:
    """On the same connection, both ways."""
    wire = await world.tls()
    request = f"GET /a HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    for access, status in ((None, 200), (closed(), 403), (closed(AccessRule(action=ALLOW, hosts=(HOST,))), 200)):
        await world.allow(access=access)
        assert (await world.ask(wire, request))[0] == status


async def test_unread_connections_end_with_their_rule(world: World, origin_ca: trustme.CA) -> None:
    """A host that is allowed as a whole is passed through, unread, until its rule goes."""
    context = ssl.create_default_context()
    origin_ca.configure_trust(context)
    ours, world.guest_trust = world.guest_trust, context
    both = AccessRule(action=ALLOW, hosts=("other.test", "*.b.example.com"))
    await world.allow(access=closed(both))
    request = "GET / HTTP/1.1\r\nHost: {}\r\n\r\n"
    wires = {}
    for name in ("other.test", "a.b.example.com"):
        wires[name] = await world.tls(name)
        assert (await world.ask(wires[name], request.format(name).encode()))[0] == 200
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=("*.b.example.com",))))
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        await world.ask(wires["other.test"], request.format("other.test").encode())
    assert (await world.ask(wires["a.b.example.com"], request.format("a.b.example.com").encode()))[0] == 200
    world.guest_trust = ours
    assert (await world.get(name="other.test"))[1]["x-hypeman-egress"] == "no_rule"


async def test_until(world: World) -> None:
    """A rule that ends is read request by request, so that its end holds on open connections."""
    rule = AccessRule(action=ALLOW, hosts=("other.test",), until=datetime(2001, 1, 1, tzinfo=UTC))
    await world.allow(access=closed(rule))
    assert (await world.get(name="other.test"))[0] == 403
    rule = AccessRule(action=ALLOW, hosts=("other.test",), until=datetime(2200, 1, 1, tzinfo=UTC))
    await world.allow(access=closed(rule))
    assert (await world.get(name="other.test"))[0] == 200


async def test_observe(world: World, origin_ca: trustme.CA) -> None:
    """Nothing is refused, and records say what would be."""
    await world.allow(
        access=closed(
            AccessRule(action=ALLOW, name="reads", hosts=(HOST,), methods=("GET",), record=AccessRecord.QUERY),
            observe=True,
        )
    )
    found: list[AuditRecord] = []
    world.egress.on_audit(found.append)
    assert (await world.get("/a?b=1"))[0] == 200
    wire = await world.tls()
    assert (await world.ask(wire, f"DELETE /a?b=1 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()))[0] == 200
    context = ssl.create_default_context()
    origin_ca.configure_trust(context)
    world.guest_trust = context
    wire = await world.tls("other.test")
    assert (await world.ask(wire, b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n"))[0] == 200
    await trio.aclose_forcefully(wire.stream)
    while len(found) < 3:
        await trio.sleep(0.01)
    assert [(each.host, each.decision, each.rule, each.target) for each in found] == [
        (HOST, "allowed", "reads", "/a?b=1"),
        (HOST, "observed", "default", ""),
        ("other.test", "observed", "default", ""),
    ]


@pytest.mark.parametrize(
    ("record", "target"), [(AccessRecord.HOST, ""), (AccessRecord.PATH, "/a"), (AccessRecord.QUERY, "/a?key=1")]
)
async def test_paths_are_recorded_only_where_the_rule_says_so(world: World, record: AccessRecord, target: str) -> None:
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,), record=record)))
    assert (await world.get("/a?key=1"))[0] == 200
    [found] = await records_of(world, 1)
    assert (found.decision, found.rule, found.target) == ("allowed", "#1", target)


async def test_ports(world: World) -> None:
    """A rule's ports are matched; with it, HTTP_PROXY may name a port that is not the usual one."""
    port = world.plain.port
    head = f"GET http://{HOST}:{port}/p HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()
    for ports, status in (((world.origin.port,), 403), ((port,), 200)):
        await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,), ports=ports)))
        wire = await world.tcp()
        assert (await world.ask(wire, head))[0] == status


async def test_private_networks_closed(world: World) -> None:
    """Even those that the server is configured to allow."""
    await world.allow(access=EgressAccess(private_networks=PrivateNetworks.CLOSED))
    assert (await world.get())[1]["x-hypeman-egress"] == "address_denied"
    await world.allow(access=EgressAccess(private_networks=PrivateNetworks.OPEN))
    assert (await world.get())[0] == 200
    world.names[HOST] = ["169.254.169.254"]
    world.egress._resolver.forget()
    await world.allow(API_KEY=credential(HOST), access=EgressAccess(private_networks=PrivateNetworks.OPEN), secret="2")
    assert (await world.get())[1]["x-hypeman-egress"] == "address_denied"


# Approvals


def asking(world: World, **fields: Any) -> EgressAccess:
    return closed(AccessRule(action=AccessAction.ASK, name="writes", hosts=(HOST,), methods=("POST",)),
                  AccessRule(action=ALLOW, hosts=(HOST,)), **fields)  # fmt: skip


class Asked:
    """What an approver is asked."""

    def __init__(self, world: World) -> None:
        self.send, self.receive = trio.open_memory_channel[tuple[ApprovalNeeded, Decide]](100)
        world.egress.on_approval_needed(self.ask)

    async def ask(self, held: ApprovalNeeded, decide: Decide) -> None:
        self.send.send_nowait((held, decide))


POST = f"POST /a?key=1 HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 2\r\n\r\nok".encode()
GET = f"GET /a HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("http2", [False, True])
async def test_a_request_is_held_until_it_is_decided(world: World, allow: bool, http2: bool) -> None:
    """Only that request; its body waits with it."""
    await world.allow(access=asking(world))
    asked = Asked(world)
    found: list[AuditRecord] = []
    world.egress.on_audit(found.append)
    answers: list[tuple[int, dict[str, str], bytes]] = []
    peer = await client(world) if http2 else None
    wire = None if http2 else await world.tls()

    async def ask() -> None:
        if peer is not None:
            answers.append(await peer.answer(await peer.ask(method="POST", path="/a?key=1", body=b"ok")))
        else:
            assert wire is not None
            answers.append(await world.ask(wire, POST))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        held, decide = await asked.receive.receive()
        assert (held.instance, held.host, held.port, held.tls) == ("inst-a", HOST, world.origin.port, True)
        assert (held.method, held.path, held.rule) == ("POST", "/a", "writes")
        assert (await world.get("/b"))[0] == 200
        assert answers == [] and [request.method for request in world.origin.requests] == ["GET"]
        await decide(allow)
    status, fields, body = answers[0]
    if allow:
        assert (status, world.origin.requests[-1].body) == (200, b"ok")
        assert world.origin.requests[-1].all("authorization") == [f"Bearer {SECRET}"]
    else:
        assert (status, fields["x-hypeman-egress"], json.loads(body)["next"]) == (403, "not_approved", "never_retry")
    while len(found) < 2:
        await trio.sleep(0.01)
    assert ("POST", "approved" if allow else "held", "writes") in [
        (each.method, each.decision, each.rule) for each in found
    ]


async def test_nobody_decides(make_world: Any) -> None:
    async with make_world(timeouts=Timeouts(ask=0.3)) as world:
        await world.allow(access=asking(world))
        wire = await world.tls()
        status, fields, body = await world.ask(wire, POST)
        assert (status, fields["x-hypeman-egress"]) == (403, "approval_pending")
        assert (json.loads(body)["next"], json.loads(body)["rule"]) == ("retry_after_approval", "writes")
        assert (await world.ask(await world.tls(), GET))[0] == 200


async def test_held_requests_are_bounded_and_follow_the_rules(world: World) -> None:
    """At most 32 of an instance; other rules decide about them again; a client that went away leaves nothing behind."""
    await world.allow(access=asking(world))
    asked = Asked(world)
    wires = [await world.tls() for _ in range(33)]
    for wire in wires[:32]:
        await wire.send(POST)
    first = [await asked.receive.receive() for _ in range(32)]
    status, fields, _ = await world.ask(wires[32], POST)
    assert (status, fields["x-hypeman-egress"]) == (503, "too_many_at_once")
    found: list[AuditRecord] = []
    world.egress.on_audit(found.append)
    await trio.aclose_forcefully(wires[0].stream)
    await first[0][1](True)
    while not any(each.method == "POST" and each.decision == "approved" for each in found):
        await trio.sleep(0.01)
    other = await world.tls()
    await other.send(POST)
    await asked.receive.receive()
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,))))
    for wire in (*wires[1:32], other):
        assert (await read_response(wire))[0] == 200
    await world.allow(access=asking(world))
    for _ in range(2):  # nothing is left of those before
        again = [await world.tls() for _ in range(32)]
        for wire in again:
            await wire.send(POST)
        for _, decide in [await asked.receive.receive() for _ in range(32)]:
            await decide(True)
        for wire in again:
            assert (await read_response(wire))[0] == 200


async def test_connections_without_a_request_beside_a_held_one(world: World) -> None:
    """The request is looked for among all connections, also those that have not sent anything yet."""
    await world.allow(access=asking(world))
    asked = Asked(world)
    wire = await world.tls()
    await wire.send(POST)
    _, decide = await asked.receive.receive()
    idle = [await world.tls()]
    await decide(True)
    assert (await read_response(wire))[0] == 200
    await wire.send(POST)
    await asked.receive.receive()
    idle += [await world.tls(), await world.tcp()]
    await world.allow(access=closed(AccessRule(action=ALLOW, hosts=(HOST,))))
    assert (await read_response(wire))[0] == 200
    for each in idle[:2]:
        assert (await world.ask(each, GET))[0] == 200
