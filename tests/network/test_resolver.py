"""The guests' name server with real kernels and clients: neighbours, the world, floods, a server that is away."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from msgspec.structs import replace

from hypeman.network.resolver import MAX_QUERIES
from hypeman.network.types import EgressMode, PortMapping, Protocol, Reach
from tests.network.hosts import Host, guest_host, world_host
from tests.network.lab import GATEWAY, HOST, ROUTER, Lab, in_namespace, lab, wait_until

ELSEWHERE = "198.51.100.7"


class Upstream:
    """A name server in the world that knows one address for every name, and is slow for "slow" names."""

    def __init__(self, world: Host) -> None:
        self.asked: list[tuple[str, str]] = []
        self._udp = world.serve(53, kind=socket.SOCK_DGRAM)
        self._tcp = world.serve(53)
        for each in (self._udp, self._tcp):
            each.settimeout(None)
        for work in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=work, daemon=True).start()

    def _answer(self, query: bytes, asker: str) -> bytes:
        message = dns.message.from_wire(query)
        name = message.question[0].name
        self.asked.append((name.to_text(), asker))
        if name.to_text().startswith("slow"):
            return b""
        reply = dns.message.make_response(message)
        reply.answer.append(dns.rrset.from_text(name, 60, "IN", "A", ELSEWHERE))
        return reply.to_wire()

    def _serve_udp(self) -> None:
        while True:
            query, client = self._udp.recvfrom(600)
            if reply := self._answer(query, client[0]):
                self._udp.sendto(reply, client)

    def _serve_tcp(self) -> None:
        while True:
            client, address = self._tcp.accept()
            with client:
                length = int.from_bytes(client.recv(2), "big")
                reply = self._answer(client.recv(length), address[0])
                client.sendall(len(reply).to_bytes(2, "big") + reply)


async def ask(host: Host, name: str, kind: str = "A", *, tcp: bool = False, server: str = GATEWAY) -> list[str]:
    """The data of the answer, or the code of a refusal."""

    def run() -> list[str]:
        query = dns.message.make_query(name, kind)
        with host.make_socket(socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as client:
            client.connect((server, 53))
            wire = query.to_wire()
            client.sendall(len(wire).to_bytes(2, "big") + wire if tcp else wire)
            reply = dns.message.from_wire(client.recv(600)[2 if tcp else 0 :])
        assert reply.id == query.id
        data = [item.to_text() for rrset in reply.answer for item in rrset]
        return data or [dns.rcode.to_text(reply.rcode())]

    return await trio.to_thread.run_sync(run)


@asynccontextmanager
async def named(**config: Any) -> AsyncIterator[tuple[Lab, Host, Host, Host, Upstream]]:
    """Two guests that may reach each other and one that may not, with the names of their instances."""
    async with lab(dns_server=ROUTER, **config) as built, trio.open_nursery() as nursery:
        guests = [await built.guest(isolated=isolated) for isolated in (False, False, True)]
        names = dict(zip(("web", "db", "alone"), (guest.lease.instance_id for guest in guests), strict=True))
        by_id = {instance_id: name for name, instance_id in names.items()}
        built.network.names.use(id_of=names.get, name_of=by_id.get)
        await nursery.start(built.network.run)
        with ExitStack() as stack:
            web, db, alone = (stack.enter_context(guest_host(guest)) for guest in guests)
            yield built, web, db, alone, Upstream(stack.enter_context(world_host(built)))
        nursery.cancel_scope.cancel()


@in_namespace
async def test_guests_know_their_neighbours_the_gateway_and_the_world() -> None:
    async with named() as (lab, web, db, alone, upstream):
        for tcp in (False, True):
            assert await ask(web, "db.hypeman.local", tcp=tcp) == ["10.100.0.3"]
            assert await ask(db, "web", tcp=tcp) == ["10.100.0.2"]
            assert await ask(alone, "web.hypeman.local", tcp=tcp) == ["NXDOMAIN"]
            assert await ask(alone, "gateway.hypeman.local", tcp=tcp) == [GATEWAY]
            assert await ask(alone, "example.com", tcp=tcp) == [ELSEWHERE]
        assert {name for name, _ in upstream.asked} == {"example.com."}
        assert lab.network.guest_network(lab.lease()).dns_server == GATEWAY  # type: ignore[union-attr]


@in_namespace
async def test_names_of_a_stopped_instance_are_gone() -> None:
    async with named() as (lab, web, _, _, _):
        (lease,) = [lease for lease in lab.network._leases.values() if lease.ipv4 == "10.100.0.3"]
        await lab.network.detach(lease)
        assert await ask(web, "db.hypeman.local") == ["NXDOMAIN"]


@in_namespace
async def test_a_guest_publishes_a_name_server_of_its_own() -> None:
    """The host's addresses lead to it, the gateway's to ours."""
    async with named() as (lab, web, db, _, _):
        (lease,) = [lease for lease in lab.network._leases.values() if lease.ipv4 == "10.100.0.3"]
        ports = tuple(PortMapping(host_port=53, guest_port=53, protocol=protocol) for protocol in Protocol)
        with await lab.network.published.claim(ports, instance_id=lease.instance_id) as claim:
            claim.keep(lease.instance_id)
        await lab.network.set_ports(replace(lease, ports=ports))
        Upstream(db)
        for tcp in (False, True):
            assert await ask(web, "db.hypeman.local", server=HOST, tcp=tcp) == [ELSEWHERE]
            assert await ask(web, "db.hypeman.local", tcp=tcp) == ["10.100.0.3"]


@in_namespace
async def test_while_no_server_runs_the_upstream_server_answers() -> None:
    async with named() as (lab, web, _, _, upstream):
        lab.network.names.close()
        for tcp in (False, True):
            assert await ask(web, "example.com", tcp=tcp) == [ELSEWHERE]
        assert {asker for _, asker in upstream.asked} == {"192.0.2.1"}


@in_namespace
async def test_an_upstream_server_that_is_away_gives_a_clear_answer() -> None:
    async with lab(dns_server="192.0.2.77") as built, trio.open_nursery() as nursery:
        await nursery.start(built.network.run)
        with guest_host(await built.guest()) as guest:
            assert await ask(guest, "example.com") == ["SERVFAIL"]
        nursery.cancel_scope.cancel()


@in_namespace
async def test_a_flood_does_not_affect_other_guests() -> None:
    """Of queries that are answered here, and of those that the upstream server never answers."""
    async with named() as (lab, web, db, alone, upstream):
        resolver = lab.network.names._resolver
        assert resolver is not None
        flood = alone.make_socket(socket.SOCK_DGRAM)
        flood.connect((GATEWAY, 53))
        local = dns.message.make_query("gateway.hypeman.local", "A").to_wire()
        for _ in range(20000):
            flood.send(local)
        assert await ask(web, "db.hypeman.local") == ["10.100.0.3"]
        dropped = "nft -j list chain inet hypeman to_host_guest"
        assert '"packets": 0' not in (await trio.to_thread.run_sync(_first_counter, dropped))
        await trio.sleep(1)  # its share of packets is back
        for number in range(4 * MAX_QUERIES):
            flood.send(dns.message.make_query(f"slow{number}.example.com", "A").to_wire())
        await wait_until(lambda: sum(name.startswith("slow") for name, _ in upstream.asked) >= MAX_QUERIES)
        assert await ask(db, "example.com") == [ELSEWHERE]
        assert await ask(db, "example.com", tcp=True) == [ELSEWHERE]
        assert sum(name.startswith("slow") for name, _ in upstream.asked) == MAX_QUERIES
        await wait_until(lambda: resolver._all == 0)
        assert resolver._counts == {}
        flood.close()


def _first_counter(command: str) -> str:
    from tests.network.lab import sh

    text = sh(command)
    return text[text.index('"counter"') :][:60]


@in_namespace
async def test_connections_of_one_guest_are_bounded() -> None:
    async with named() as (lab, web, _, alone, _):
        resolver = lab.network.names._resolver
        assert resolver is not None
        idle = [await trio.to_thread.run_sync(alone.connect, GATEWAY, 53) for _ in range(12)]
        await wait_until(lambda: resolver._all == 8)
        assert await ask(web, "db.hypeman.local", tcp=True) == ["10.100.0.3"]
        for each in idle:
            each.close()
        await wait_until(lambda: resolver._all == 0)


@in_namespace
async def test_the_hosts_file_follows_the_instances() -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, "hosts")
        file.write_text("127.0.0.1\tlocalhost\n")
        has: Callable[[str], bool] = lambda text: text in file.read_text()  # noqa: E731
        async with named(hosts_file=str(file)) as (lab, _, _, _, _):
            await wait_until(lambda: has("10.100.0.3\tdb.hypeman.local\n"))
            assert has("10.100.0.4\talone.hypeman.local\n") and has("127.0.0.1\tlocalhost\n")
            (lease,) = [lease for lease in lab.network._leases.values() if lease.ipv4 == "10.100.0.3"]
            await lab.network.detach(lease)
            await wait_until(lambda: not has("db.hypeman.local"))


@in_namespace
async def test_a_port_that_is_taken_leaves_guests_with_the_upstream_server() -> None:
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taken.bind(("0.0.0.0", 53))
    async with lab(dns_server=ROUTER) as built:
        assert built.network.guest_network(built.lease()).dns_server == ROUTER  # type: ignore[union-attr]
    taken.close()


class Rules:
    """Only example.com may be looked up."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.told: list[tuple[str, str, tuple[str, ...], float]] = []

    def may_look_up(self, instance_id: str, name: str) -> bool:
        if name == "example.com":
            return True
        self.refused.append(name)
        return False

    def looked_up(self, instance_id: str, name: str, addresses: Sequence[str], seconds: float) -> None:
        self.told.append((instance_id, name, tuple(addresses), seconds))


@in_namespace
async def test_a_closed_guest_looks_up_allowed_names_only() -> None:
    """Nothing it writes reaches the upstream server: no other name or type, no option; and no way without a server."""
    async with named() as (lab, web, _, _, upstream):
        rules = Rules()
        names = lab.network.names
        names.use(id_of=names._id_of, name_of=names._name_of, rules=rules)
        (lease,) = [lease for lease in lab.network._leases.values() if lease.ipv4 == "10.100.0.2"]
        await lab.network.set_egress(replace(lease, egress_mode=EgressMode.ALL, reach=Reach(closed=True)))
        for tcp in (False, True):
            assert await ask(web, "Example.COM", tcp=tcp) == [ELSEWHERE]
            assert await ask(web, "secret.example.com", tcp=tcp) == ["NXDOMAIN"]
            assert await ask(web, "example.com", "TXT", tcp=tcp) == ["NOERROR"]
            assert await ask(web, "example.com", "AAAA", tcp=tcp) == ["NOERROR"]
            assert await ask(web, "4.3.2.1.in-addr.arpa", "PTR", tcp=tcp) == ["NXDOMAIN"]
            assert await ask(web, "db.hypeman.local", tcp=tcp) == ["NXDOMAIN"]
            assert await ask(web, "gateway.hypeman.local", tcp=tcp) == [GATEWAY]
        assert {name for name, _ in upstream.asked} == {"example.com."}
        assert set(rules.told) == {(lease.instance_id, "example.com", (ELSEWHERE,), 60)}
        assert set(rules.refused) == {"secret.example.com", "4.3.2.1.in-addr.arpa"}
        before = len(upstream.asked)
        names.close()
        with pytest.raises(OSError):
            await ask(web, "example.com")
        assert len(upstream.asked) == before
