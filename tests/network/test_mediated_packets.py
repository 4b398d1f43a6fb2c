"""Packets of guests with egress policies: what is mediated, refused or passed in each mode."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import trio
from msgspec.structs import replace

from hypeman.network.types import EgressMode, Reach
from tests.network import frames
from tests.network.frames import ICMP, TCP, UDP
from tests.network.lab import (
    EGRESS_PORT,
    GATEWAY,
    HOST,
    OFFERED,
    SERVER,
    Guest,
    Lab,
    in_namespace,
    lab,
)
from tests.network.outcomes import README, datagrams, outcome_of

__all__ = ["lab"]


async def _original_destination(listener: socket.socket) -> tuple[str, int]:
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(listener)
    connection, _ = listener.accept()
    with connection:
        port, address = struct.unpack("!2xH4s8x", connection.getsockopt(socket.SOL_IP, 80, 16))
        return socket.inet_ntoa(address), port


async def _shake_hands(guest: Guest, to: str, port: int, source_port: int) -> int:
    """Open a connection; the server's next sequence number."""
    guest.send_tcp(to, port, source_port=source_port)
    opened = await guest.expect(lambda seen: seen.protocol == TCP and seen.port == source_port)
    assert (opened.flags, opened.source) == (frames.SYN | frames.ACK, to)
    guest.send_tcp(to, port, frames.ACK, source_port=source_port, sequence=1001, ack=opened.sequence + 1)
    return opened.sequence + 1


async def _check_web_is_mediated(lab: Lab, guest: Guest) -> None:
    with lab.listen(GATEWAY, EGRESS_PORT) as proxy:
        for number, port in enumerate((80, 443)):
            await _shake_hands(guest, SERVER, port, 5000 + number)
            assert await _original_destination(proxy) == (SERVER, port)


@in_namespace
async def test_mode_all_mediates_the_web_and_refuses_all_other_tcp(lab: Lab) -> None:
    guest = await lab.mediated(EgressMode.ALL)
    await _check_web_is_mediated(lab, guest)
    for port in (22, 53, 8443):
        guest.send_tcp(SERVER, port)
        await guest.expect_reset(port)
    assert [packet.protocol for packet in await lab.world_sees(guest)] == [UDP]


@in_namespace
async def test_mode_http_https_only_lets_other_ports_pass(lab: Lab) -> None:
    guest = await lab.mediated(EgressMode.HTTP_HTTPS_ONLY)
    await _check_web_is_mediated(lab, guest)
    guest.send_tcp(SERVER, 8443)
    passed = await lab.world.expect(lambda seen: seen.protocol == TCP)
    assert (passed.port, passed.source) == (8443, HOST)


@in_namespace
async def test_redirected_ports(lab: Lab) -> None:
    """They end in the proxy as 80 and 443 do, for that guest alone; those of other guests stay theirs."""
    for number, (mode, closed) in enumerate(((EgressMode.HTTP_HTTPS_ONLY, False), (EgressMode.ALL, True))):
        guest = await lab.guest(egress_mode=mode, reach=Reach(redirected=(5432,), closed=closed))
        with lab.listen(GATEWAY, EGRESS_PORT) as proxy:
            await _shake_hands(guest, SERVER, 5432, 6000 + number)
            assert await _original_destination(proxy) == (SERVER, 5432)
    other = await lab.mediated(EgressMode.HTTP_HTTPS_ONLY)
    other.send_tcp(SERVER, 5432)
    assert (await lab.world.expect(lambda seen: seen.protocol == TCP)).port == 5432
    reach = Reach(redirected=(5432,))
    guest = await lab.guest(isolated=False, egress_mode=EgressMode.HTTP_HTTPS_ONLY, reach=reach)
    peer = await lab.guest(isolated=False)
    guest.send_tcp(peer.lease.ipv4, 5432)
    assert (await peer.expect(lambda seen: seen.protocol == TCP)).port == 5432


@in_namespace
async def test_without_a_proxy_the_web_is_refused_and_not_passed(lab: Lab) -> None:
    """Nobody listens on the proxy's port: a reset, never a direct connection."""
    guest = await lab.mediated()
    guest.send_tcp(SERVER, 443)
    await guest.expect_reset(443)
    assert [packet.protocol for packet in await lab.world_sees(guest)] == [UDP]


@in_namespace
async def test_quic_is_refused_at_once_and_dns_passes(lab: Lab) -> None:
    for mode in (EgressMode.ALL, EgressMode.HTTP_HTTPS_ONLY):
        guest = await lab.mediated(mode)
        guest.send_udp(SERVER, 443, b"quic")
        refusal = await guest.expect(lambda seen: seen.protocol == ICMP)
        assert refusal.flags == 3 and refusal.data[1] == 3  # port unreachable: the client falls back
        guest.send_udp(SERVER, 53, b"query")
        passed = await lab.world.receive_until(lambda seen: seen.protocol == UDP)
        assert datagrams(passed) == [b"query"]


@in_namespace
async def test_a_guest_without_egress_is_not_mediated(lab: Lab) -> None:
    guest = await lab.guest()
    with lab.listen(GATEWAY, EGRESS_PORT):
        guest.send_tcp(SERVER, 443)
        guest.send_udp(SERVER, 443, b"quic")
        first = await lab.world.expect(lambda seen: seen.protocol == TCP)
        assert (first.destination, first.port, first.source) == (SERVER, 443, HOST)
        second = await lab.world.expect(lambda seen: seen.protocol == UDP)
        assert second.data == b"quic"


@in_namespace
async def test_mode_all_lets_no_other_protocol_pass(lab: Lab) -> None:
    """Each of the 256 numbers but UDP and ICMP; without the mode they pass (the numbers that mean an IPv4 payload)."""
    guest = await lab.mediated(EgressMode.ALL)
    others = [number for number in range(256) if number not in (ICMP, UDP)]
    for number in others:
        guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, number, bytes(range(64))))
    assert [seen.protocol for seen in await lab.world_sees(guest)] == [UDP]
    await lab.network.set_egress(replace(guest.lease, egress_mode=EgressMode.HTTP_HTTPS_ONLY))
    for number in TUNNELS.values():
        guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, number, bytes(range(64))))
    assert {seen.protocol for seen in await lab.world_sees(guest)} >= {IPIP, GRE, ESP}


IPIP, GRE, ESP, SCTP, UDP_LITE = 4, 47, 50, 132, 136
TUNNELS = {"IPIP": IPIP, "GRE": GRE, "ESP": ESP}

ROWS: dict[str, tuple[Callable[[Guest], None], ...]] = {
    "world, TCP 80 and 443": (lambda g: g.send_tcp(SERVER, 80), lambda g: g.send_tcp(SERVER, 443)),
    "world, other TCP": (lambda g: g.send_tcp(SERVER, 8443),),
    "world, UDP 443": (lambda g: g.send_udp(SERVER, 443, b"quic"),),
    "world, other UDP, ICMP": (lambda g: g.send_udp(SERVER, 53, b"query"), lambda g: g.ping(SERVER)),
    "world, every other protocol": (lambda g: g.send_ipv4(frames.ipv4(g.lease.ipv4, SERVER, GRE, bytes(range(64)))),),
    "the proxy's port on the gateway": (lambda g: g.send_tcp(GATEWAY, EGRESS_PORT),),
    "gateway: ping, ports offered to guests": (lambda g: g.send_tcp(GATEWAY, OFFERED.port),),
    "gateway and host: everything else": (lambda g: g.send_tcp(HOST, 8080), lambda g: g.send_tcp(GATEWAY, 8080)),
    "169.254.0.0/16": (lambda g: g.send_udp("169.254.169.254", 9000, b"metadata"),),
    "IPv6, VLAN tags, DHCP": (
        lambda g: g.send_ipv4(frames.ipv4(g.lease.ipv4, SERVER, UDP, frames.udp(g.lease.ipv4, SERVER, 68, 67))),
    ),
}
"""One packet of each kind for a row of the README's table, found by how the row begins. The rows of other
guests and of Postgres have tests of their own."""


def _table() -> dict[str, list[str]]:
    lines = README.read_text().partition("| to | without egress |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {row[0]: [cell.partition(" ")[0].strip(",:;(") for cell in row[1:]] for row in rows}


async def _outcome(lab: Lab, guest: Guest, send: Callable[[Guest], None]) -> str:
    send(guest)
    return await outcome_of(guest, await lab.world_sees(guest))


@in_namespace
async def test_the_table_of_the_readme(lab: Lab) -> None:
    """What each row says of each mode, by a packet."""
    modes = (EgressMode.NONE, EgressMode.HTTP_HTTPS_ONLY, EgressMode.ALL)
    table = _table()
    assert len(table) == len(ROWS) + 2
    with lab.listen(GATEWAY, EGRESS_PORT), lab.listen("0.0.0.0", 8080), lab.listen("0.0.0.0", OFFERED.port):
        for name, send in ((name, send) for name, packets in ROWS.items() for send in packets):
            (said,) = (cells for row, cells in table.items() if row.startswith(name))
            found = []
            for mode in modes:
                guest = await (lab.guest() if mode is EgressMode.NONE else lab.mediated(mode))
                found.append(await _outcome(lab, guest, send))
            wanted = ["open" if cell == "proxy" else cell for cell in said]
            assert found == wanted, name
