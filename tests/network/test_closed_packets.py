"""Packets of guests that may reach only their openings: escape routes, fragments, open connections."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from hypeman.network.types import EgressMode, Opening, PortMapping, Reach
from tests.network import frames
from tests.network.frames import ICMP, TCP, UDP
from tests.network.lab import (
    EGRESS_PORT,
    GATEWAY,
    HOST,
    SERVER,
    Guest,
    Lab,
    in_namespace,
    is_reset,
    lab,
)
from tests.network.outcomes import README, icmp, outcome_of

__all__ = ["lab"]


CLOSED = Reach(
    closed=True,
    openings=(
        Opening("tcp", "203.0.113.0/24", 5432, 5433),
        Opening("udp", "203.0.113.9/32", 5353, 5353),
        Opening("tcp", "10.8.0.0/16", 22, 22),
    ),
)


def _tcp_to(port: int) -> Callable[[Guest], None]:
    return lambda guest: guest.send_tcp(SERVER, port)


def _protocol(number: int) -> Callable[[Guest], None]:
    return lambda guest: guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, number, bytes(range(64))))


ESCAPES: dict[str, tuple[Callable[[Guest], None], ...]] = {
    "TCP 80 and 443": (lambda g: g.send_tcp(SERVER, 80), lambda g: g.send_tcp(SERVER, 443)),
    "other TCP": tuple(_tcp_to(port) for port in (22, 853, 8443)),
    "QUIC": (lambda g: g.send_udp(SERVER, 443, b"quic"),),
    "names: UDP": (lambda g: g.send_udp(SERVER, 53, b"query"),),
    "names: TCP": (lambda g: g.send_tcp(SERVER, 53),),
    "other UDP": (
        lambda g: g.send_udp(SERVER, 123, b"ntp"),
        lambda g: g.send_udp(SERVER, 4500, b"vpn"),
        lambda g: g.send_udp(SERVER, 9, b"dns?", source_port=53),
    ),
    "ICMP: ping": (
        lambda g: g.ping(SERVER),
        lambda g: g.send_ipv4(frames.ipv4(g.lease.ipv4, SERVER, ICMP, icmp(13, bytes(12)))),
    ),
    "ICMP errors": (
        lambda g: g.send_ipv4(
            frames.ipv4(g.lease.ipv4, SERVER, ICMP, icmp(3, frames.ipv4(SERVER, g.lease.ipv4, TCP, bytes(20))))
        ),
    ),
    "other protocols": tuple(_protocol(number) for number in (47, 50, 132, 136)),
    "tunnels": tuple(_protocol(number) for number in (4, 41)),
    "metadata": (
        lambda g: g.send_udp("169.254.169.254", 9000, b"metadata"),
    ),
    "the host": (
        lambda g: g.send_tcp(HOST, 8080),
        lambda g: g.send_tcp(GATEWAY, 8080),
        lambda g: g.send_tcp(GATEWAY, 22),
    ),
}  # fmt: skip
"""Packets for the rows of the README's table of escape routes; the other rows have tests of their own."""


def _escapes() -> dict[str, str]:
    lines = README.read_text().partition("| escape route |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {row[0]: row[1].partition(" ")[0].strip(",:;(") for row in rows}


async def _closed_outcome(lab: Lab, guest: Guest, send: Callable[[Guest], None]) -> str:
    """As _outcome; what a guest sends to an opening marks the end."""
    send(guest)
    guest.send_udp(SERVER, 5353, b"marker")
    return await outcome_of(guest, await lab.world.receive_until(lambda seen: seen.data == b"marker"))


@in_namespace
async def test_escape_routes_of_a_closed_guest(lab: Lab) -> None:
    table = _escapes()
    with lab.listen(GATEWAY, EGRESS_PORT), lab.listen("0.0.0.0", 8080):
        for name, packets in ESCAPES.items():
            (said,) = (cell for row, cell in table.items() if row.startswith(name))
            found = []
            for send in packets:
                guest = await lab.guest(egress_mode=EgressMode.ALL, reach=CLOSED)
                found.append(await _closed_outcome(lab, guest, send))
            assert found == [said] * len(packets), (name, found)


@in_namespace
async def test_a_closed_guest_reaches_its_openings(lab: Lab) -> None:
    """Network, protocol and port must all be right; what comes back passes, what was not asked for does not."""
    guest, other = [await lab.guest(egress_mode=EgressMode.ALL, reach=each) for each in (CLOSED, Reach(closed=True))]
    for port in (5431, 5434, 22):
        guest.send_tcp(SERVER, port)
    guest.send_udp(SERVER, 5432, b"no")
    guest.send_udp("203.0.113.10", 5353, b"no")
    other.send_tcp(SERVER, 5432)
    guest.send_tcp(SERVER, 5433)
    seen = await lab.world.receive_until(lambda each: each.protocol == TCP)
    assert [(each.destination, each.port) for each in seen] == [(SERVER, 5433)]
    back = frames.tcp(SERVER, HOST, 5433, seen[0].source_port, frames.SYN | frames.ACK, sequence=1, ack=1001)
    lab.from_world(frames.ipv4(SERVER, HOST, TCP, back))
    await guest.expect(lambda each: each.flags == frames.SYN | frames.ACK)
    changed = replace(CLOSED, openings=(Opening("tcp", "203.0.0.0/16", 5432, 5440),))
    await lab.network.set_egress(replace(guest.lease, reach=changed))
    guest.send_udp(SERVER, 5353, b"no")
    guest.send_tcp(SERVER, 5439, source_port=4001)
    seen = await lab.world.receive_until(lambda each: each.protocol == TCP)
    assert [each.port for each in seen] == [5439]
    await lab.network.set_egress(replace(guest.lease, reach=Reach()))
    assert len(await lab.world_sees(guest)) == 1


@in_namespace
async def test_closing_cuts_what_is_open_both_ways(lab: Lab) -> None:
    guest = await lab.guest(egress_mode=EgressMode.HTTP_HTTPS_ONLY)
    guest.send_tcp(SERVER, 8443)
    await lab.world.expect(lambda each: each.protocol == TCP)
    guest.send_udp(SERVER, 4500, b"hello")
    seen = await lab.world.expect(lambda each: each.protocol == UDP)
    await lab.network.set_egress(replace(guest.lease, egress_mode=EgressMode.ALL, reach=CLOSED))
    guest.send_tcp(SERVER, 8443, frames.ACK, sequence=1001, ack=2)
    await guest.expect_reset(8443)
    lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 4500, seen.source_port, b"still there?")))
    assert not any(each.protocol == UDP for each in await guest.expect_pong())


@in_namespace
async def test_a_closed_guest_reaches_no_other_guest(lab: Lab) -> None:
    """Neither as a neighbour nor through a published port of the host; it can still be called itself."""
    port = PortMapping(host_port=7000, guest_port=7000)
    closed = await lab.guest(egress_mode=EgressMode.ALL, reach=CLOSED, isolated=False)
    other = await lab.guest(isolated=False, ports=(port,))
    closed.send_tcp(other.lease.ipv4, 7000)
    closed.send_tcp(HOST, 7000)
    for each in (other.lease.ipv4, HOST):
        reset = await closed.expect(is_reset)
        assert reset.source == each
    closed.send_udp("255.255.255.255", 9, b"all")
    closed.send_udp("224.0.0.251", 5353, b"mdns")
    closed.send_udp(SERVER, 5353, b"marker")
    assert [each.data for each in await lab.world.receive_until(lambda seen: seen.data == b"marker")] == [b"marker"]
    assert not any(each.protocol == TCP for each in await other.expect_pong())


@in_namespace
async def test_fragments_of_a_closed_guest(lab: Lab) -> None:
    guest = await lab.guest(egress_mode=EgressMode.ALL, reach=CLOSED)
    datagram = frames.udp(guest.lease.ipv4, SERVER, 4000, 9, bytes(2000))
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, datagram[:1000], fragment=0x2000))
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, datagram[1000:], fragment=125))
    guest.send_udp(SERVER, 5353, b"marker")
    assert [each.data for each in await lab.world.receive_until(lambda seen: seen.data == b"marker")] == [b"marker"]
