"""Packets to private networks: open by default, closed by settings or for one guest; and those of the engine."""

from __future__ import annotations

import socket
import subprocess
import sys

from msgspec.structs import replace

from hypeman.config import NetworkConfig
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, PrivateReach, Reach
from tests.network import frames
from tests.network.frames import TCP, UDP
from tests.network.hosts import guest_host
from tests.network.lab import (
    EGRESS_PORT,
    ENGINE_ALLOWED,
    ENGINE_UID,
    GATEWAY,
    HOST,
    SERVER,
    Guest,
    Lab,
    in_namespace,
    is_reset,
    lab,
)
from tests.network.outcomes import datagrams

__all__ = ["lab"]


SURROUNDINGS = ("10.9.9.9", "100.100.100.200", "168.63.129.16", "192.168.9.9", "169.254.169.254")


@in_namespace
async def test_private_networks_closed_for_one_guest(lab: Lab) -> None:
    guest = await lab.guest(reach=Reach(private=PrivateReach.CLOSED))
    for address in SURROUNDINGS:
        guest.send_udp(address, 9, b"private")
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_private_networks_opened_for_one_guest() -> None:
    """Metadata services are not among them."""
    async with lab(allow_private=False) as built:
        other = await built.guest()
        guest = await built.guest(reach=Reach(private=PrivateReach.OPEN))
        for each in (other, guest):
            for address in SURROUNDINGS:
                each.send_udp(address, 9, address.encode())
        seen = datagrams(await built.world_sees(guest))
        assert seen == [b"10.9.9.9", b"192.168.9.9", b"marker"]


@in_namespace
async def test_a_stricter_mode_cuts_what_is_open(lab: Lab) -> None:
    """Redirection is decided once for a connection; one that was direct is refused, not left direct."""
    for mode, port in ((EgressMode.ALL, 8443), (EgressMode.HTTP_HTTPS_ONLY, 443)):
        guest = await lab.guest()
        guest.send_tcp(SERVER, port)
        seen = await lab.world.expect(lambda each: each.protocol == TCP)
        reply = frames.tcp(SERVER, HOST, port, seen.source_port, frames.SYN | frames.ACK, sequence=1, ack=1001)
        lab.from_world(frames.ipv4(SERVER, HOST, TCP, reply))
        await guest.expect(lambda each: each.flags == frames.SYN | frames.ACK)
        await lab.network.set_egress(replace(guest.lease, egress_mode=mode))
        guest.send_tcp(SERVER, port, frames.ACK, sequence=1001, ack=2)
        await guest.expect_reset(port)
        await lab.network.set_egress(guest.lease)
        guest.send_tcp(SERVER, 8444)
        assert (await lab.world.expect(lambda each: each.protocol == TCP)).port == 8444


@in_namespace
async def test_egress_and_identity_hold_for_a_guest_with_limits(lab: Lab) -> None:
    """Packets that come back from the ifb pass the same rules."""
    guest = await lab.guest(egress_mode=EgressMode.ALL, upload_bps=10**6, download_bps=10**6)
    guest.send_udp(SERVER, 9, b"spoofed", source="10.100.9.9")
    guest.send_arp(GATEWAY, sender="10.100.9.9")
    guest.send_tcp(SERVER, 22)
    await guest.expect_reset(22)
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


PRIVATE = (
    "10.0.0.5",
    "10.99.255.255",
    "10.101.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.255",
    "168.63.129.16",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.1.1",
    "198.18.0.1",
)
NEXT_TO_PRIVATE = (
    "9.255.255.255",
    "11.0.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "168.63.129.15",
    "172.15.0.1",
    "172.32.0.1",
)


def _send_everything(guest: Guest, address: str) -> None:
    guest.send_udp(address, 9, b"udp")
    guest.send_udp(address, 53, b"dns")
    guest.send_tcp(address, 80)
    guest.send_tcp(address, 8080)
    guest.ping(address)
    datagram = frames.udp(guest.lease.ipv4, address, 4000, 9, b"F" * 32)
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, address, UDP, datagram[:24], fragment=0x2000))
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, address, UDP, datagram[24:], fragment=3))


@in_namespace
async def test_private_networks_are_reached_by_default() -> None:
    async with lab() as built:
        guest = await built.guest()
        for address in PRIVATE:
            guest.send_udp(address, 9, b"x")
        assert [seen.destination for seen in await built.world_sees(guest)] == [*PRIVATE, SERVER]


@in_namespace
async def test_private_networks_are_closed_where_the_settings_say_so() -> None:
    """Every protocol, fragments too, in each egress mode; the addresses beside those networks stay open."""
    async with lab(allow_private=False) as built:
        for mode in EgressMode:
            guest = await built.guest(egress_mode=mode)
            for address in PRIVATE:
                _send_everything(guest, address)
            if mode is EgressMode.NONE:
                guest.send_tcp(PRIVATE[0], 8080, source_port=4711)
                refusal = await guest.expect(lambda seen: seen.protocol == TCP and seen.port == 4711)
                assert is_reset(refusal), "a client hears at once"
            assert [seen.destination for seen in await built.world_sees(guest)] == [SERVER], mode
            for address in NEXT_TO_PRIVATE:
                guest.send_udp(address, 9, b"x")
            assert [seen.destination for seen in await built.world_sees(guest)] == [*NEXT_TO_PRIVATE, SERVER], mode


@in_namespace
async def test_a_private_name_server_stays_reachable_for_names_only() -> None:
    async with lab(allow_private=False, dns_server="10.0.0.5") as built:
        guest = await built.guest()
        _send_everything(guest, "10.0.0.6")
        _send_everything(guest, "10.0.0.5")
        guest.send_tcp("10.0.0.5", 53)
        seen = await built.world_sees(guest)
        assert [(each.protocol, each.destination, each.port) for each in seen] == [
            (UDP, "10.0.0.5", 53),
            (TCP, "10.0.0.5", 53),
            (UDP, SERVER, 9),
        ]


@in_namespace
async def test_closed_private_networks_stay_closed_for_open_connections_and_after_a_flush() -> None:
    """What was let out before the setting was changed is not let out any more; the rules come back as they were."""
    async with lab() as built:
        guest = await built.guest()
        guest.send_udp("10.0.0.5", 9, b"first")
        seen = await built.world_sees(guest)
        closed = Network(
            NetworkConfig(allow_private=False), links=built.links, rules=built.rules, egress_port=EGRESS_PORT
        )
        closed._claim = built.network._claim  # as after a restart: there is one at a time
        await closed.start([guest.lease])
        answer = frames.udp("10.0.0.5", HOST, 9, seen[0].source_port, b"answer")
        built.from_world(frames.ipv4("10.0.0.5", HOST, UDP, answer))
        guest.send_udp("10.0.0.5", 9, b"second")
        assert datagrams(await built.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_what_the_engine_opens_connections_to() -> None:
    """Not to services of this host, nor to guests at ports that no ingress leads to, whatever its code does."""
    async with lab() as built:
        guest = await built.guest()
        own = built.network.subnet.gateway
        for address in ("127.0.0.1", "127.0.0.7", HOST):
            with socket.create_server((address, 9876)):
                for uid, reached in ((0, True), (ENGINE_UID, address in "".join(ENGINE_ALLOWED))):
                    assert _connects(uid, address, 9876) == reached, (uid, address)
        assert not _connects(ENGINE_UID, str(own), 22)
        with guest_host(guest) as inside, inside.serve(80), inside.serve(81):
            for entered in ((), (80,), (81, 82), ()):
                await built.network.open_to_engine(entered)
                for port in (80, 81):
                    assert _connects(ENGINE_UID, guest.lease.ipv4, port) == (port in entered), (entered, port)


def _connects(uid: int, address: str, port: int) -> bool:
    """Whether a process of that user does; only one that is not refused at once waits."""
    program = (
        f"import os, socket; os.setresuid({uid}, {uid}, {uid}); socket.create_connection(('{address}', {port}), 5)"
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 or "refused" in result.stderr, result.stderr
    return result.returncode == 0
