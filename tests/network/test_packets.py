"""Every rule by packets: the one that it must stop is sent and does not arrive, its legal neighbour does."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sized
from pathlib import Path

import trio
from msgspec.structs import replace

from hypeman.config import NetworkConfig
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, Opening, PortMapping, PrivateReach, Reach
from tests.network import frames
from tests.network.frames import ARP, ICMP, IPV4, IPV6, TCP, UDP, Seen
from tests.network.hosts import guest_host
from tests.network.lab import (
    EGRESS_PORT,
    ENGINE_ALLOWED,
    ENGINE_UID,
    GATEWAY,
    GATEWAY_MAC,
    HOST,
    OFFERED,
    SERVER,
    Guest,
    Lab,
    in_namespace,
    is_reset,
    lab,
    plug_in,
    sh,
    wait_until,
)


def _datagrams(seen: list[Seen]) -> list[bytes]:
    return [each.data for each in seen if each.protocol == UDP]


# Identity


@in_namespace
async def test_a_guest_reaches_the_world_under_the_hosts_address(lab: Lab) -> None:
    guest = await lab.guest()
    (seen,) = await lab.world_sees(guest)
    assert (seen.source, seen.destination, seen.port) == (HOST, SERVER, 9)


@in_namespace
async def test_the_worlds_answer_reaches_the_guest(lab: Lab) -> None:
    guest = await lab.guest()
    (seen,) = await lab.world_sees(guest)
    answer = frames.udp(SERVER, HOST, 9, seen.source_port, b"answer")
    lab.from_world(frames.ipv4(SERVER, HOST, UDP, answer))
    received = await guest.expect(lambda each: each.protocol == UDP)
    assert (received.data, received.source, received.destination) == (b"answer", SERVER, guest.lease.ipv4)


@in_namespace
async def test_a_spoofed_source_address_goes_nowhere(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    for source in (other.lease.ipv4, "10.100.9.9", SERVER, HOST, GATEWAY, "0.0.0.0"):
        guest.send_udp(SERVER, 9, b"spoofed", source=source)
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_a_spoofed_mac_goes_nowhere(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    payload = frames.udp(guest.lease.ipv4, SERVER, 4000, 9, b"spoofed")
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, payload), source_mac=other.lease.mac)
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_identity_of_another_guest_is_of_no_use_even_complete(lab: Lab) -> None:
    """MAC and address of another one agree with each other, but not with the interface."""
    guest, other = await lab.guest(), await lab.guest()
    payload = frames.udp(other.lease.ipv4, SERVER, 4000, 9, b"spoofed")
    guest.send_ipv4(frames.ipv4(other.lease.ipv4, SERVER, UDP, payload), source_mac=other.lease.mac)
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]
    assert _datagrams(await lab.world_sees(other, b"second")) == [b"second"]


@in_namespace
async def test_each_fragment_must_prove_its_sender(lab: Lab) -> None:
    """A guest cannot slip a fragment into the datagram of another one: they are looked at before defragmentation."""
    guest, other = await lab.guest(), await lab.guest()
    datagram = frames.udp(guest.lease.ipv4, SERVER, 4000, 9, b"A" * 16 + b"B" * 16)
    first, second = datagram[:24], datagram[24:]
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, first, fragment=0x2000))
    other.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, b"X" * 16, fragment=3))
    assert _datagrams(await lab.world_sees(other)) == [b"marker"]
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, second, fragment=3))
    # The kernel lets out in fragments what came in fragments.
    assert [(await lab.world.receive()).data for _ in range(2)] == [b"A" * 16, b"B" * 16]


@in_namespace
async def test_fragments_do_not_slip_past_the_ports(lab: Lab) -> None:
    """A second fragment has no port; the rules see the whole datagram."""
    guest = await lab.mediated()
    datagram = frames.udp(guest.lease.ipv4, SERVER, 4000, 443, b"Q" * 32)
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, datagram[:24], fragment=0x2000))
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, datagram[24:], fragment=3))
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_arp_with_a_forged_address_is_dropped(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    guest.send_arp(GATEWAY, sender=other.lease.ipv4)
    guest.send_arp(GATEWAY, sender_mac=other.lease.mac)
    guest.send_arp(GATEWAY, source_mac=other.lease.mac)
    guest.send_arp(GATEWAY)
    answers = [seen for seen in await guest.receive_until(lambda seen: seen.kind == ARP) if seen.kind == ARP]
    assert [(seen.source_mac, seen.source, seen.destination) for seen in answers] == [
        (GATEWAY_MAC, GATEWAY, guest.lease.ipv4)
    ]
    assert [seen for seen in await guest.expect_pong() if seen.kind == ARP] == []


@in_namespace
async def test_a_false_arp_does_not_move_another_guest(lab: Lab) -> None:
    """Gratuitous ARP for the neighbour's address: what is sent to the neighbour still arrives there."""
    guest, other = await lab.guest(), await lab.guest()
    claim = frames.arp(2, guest.lease.mac, other.lease.ipv4, GATEWAY, GATEWAY_MAC)
    guest.send_frame(frames.ethernet(GATEWAY_MAC, guest.lease.mac, ARP, claim))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"for the other", (other.lease.ipv4, 7))
    seen = await other.expect(lambda each: each.protocol == UDP)
    assert seen.data == b"for the other"
    assert _datagrams(await guest.expect_pong()) == []


@in_namespace
async def test_arp_does_not_reveal_the_hosts_other_addresses(lab: Lab) -> None:
    guest = await lab.guest()
    guest.send_arp(HOST)
    guest.send_arp(GATEWAY)
    first = await guest.expect(lambda seen: seen.kind == ARP)
    assert first.source == GATEWAY


@in_namespace
async def test_a_tap_without_a_lease_reaches_nothing(lab: Lab) -> None:
    """Closed before it is opened, even with a route and a plausible address."""
    guest = await lab.guest()
    stray = Guest(lab.lease(tap="hm-stray"), 0)
    stray._fd = plug_in("hm-stray")._fd
    sh(f"ip link set hm-stray address {GATEWAY_MAC} up && ip route add {stray.lease.ipv4} dev hm-stray")
    stray.send_udp(SERVER, 9, b"stray")
    stray.ping(GATEWAY)
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_a_detached_guest_is_closed_before_its_tap_goes(lab: Lab) -> None:
    """With its elements gone it is mute, though its TAP is still there."""
    from hypeman.network import ruleset

    guest, other = await lab.guest(), await lab.guest()
    await lab.rules.change(remove=ruleset.possible_elements(guest.lease))
    guest.send_udp(SERVER, 9, b"late")
    assert _datagrams(await lab.world_sees(other)) == [b"marker"]


# IPv6, DHCP, other protocols


@in_namespace
async def test_ipv6_is_closed(lab: Lab) -> None:
    """By the switch, and by the rule alone after IPv6 was switched on for all links."""
    guest = await lab.guest()
    await _ipv6_goes_nowhere(guest)
    sh(f"sysctl -qw net.ipv6.conf.{guest.lease.tap}.disable_ipv6=0")
    await wait_until(lambda: "tentative" not in sh(f"ip -6 addr show dev {guest.lease.tap}"))
    await _ipv6_goes_nowhere(guest)


async def _ipv6_goes_nowhere(guest: Guest) -> None:
    source = "fe80::1234"
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as listener:
        listener.bind(("::", OFFERED.port))
        listener.setblocking(False)
        for destination, to in (("ff02::1", "33:33:00:00:00:01"), ("fe80::ff:fe00:1", GATEWAY_MAC)):
            datagram = frames.udp6(source, destination, 4000, OFFERED.port, b"six")
            packet = frames.ipv6(source, destination, UDP, datagram)
            guest.send_frame(frames.ethernet(to, guest.lease.mac, IPV6, packet))
        # A router advertisement: a host that believed it would send its own packets to the guest.
        advert = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
        pseudo = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "ff02::1")
        total = frames.checksum(pseudo + struct.pack("!II", len(advert), 58) + advert)
        advert = advert[:2] + struct.pack("!H", total) + advert[4:]
        packet = frames.ipv6(source, "ff02::1", 58, advert)
        guest.send_frame(frames.ethernet("33:33:00:00:00:01", guest.lease.mac, IPV6, packet))
        await guest.expect_pong()
        assert sh("ip -6 route show default") == ""
        try:
            raise AssertionError(f"the host received {listener.recv(100)!r} over IPv6")
        except BlockingIOError:
            pass
        listener.sendto(b"legal", (f"::ffff:{GATEWAY}", OFFERED.port))  # the listener does listen
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(listener)
        assert listener.recv(100) == b"legal"


@in_namespace
async def test_the_host_sends_no_ipv6_to_guests(lab: Lab) -> None:
    guest = await lab.guest(upload_bps=10**6)
    sh(f"ip link set {guest.lease.tap} down && ip link set {guest.lease.tap} up")
    assert "inet6" not in sh(f"ip addr show {guest.lease.tap}")
    assert all(seen.kind != IPV6 for seen in await _ping_after_route(lab, guest))


async def _ping_after_route(lab: Lab, guest: Guest) -> list[Seen]:
    await lab.network.attach(guest.lease)  # taking a link down loses its route; attach puts it back
    return await guest.expect_pong()


@in_namespace
async def test_dhcp_of_a_guest_reaches_no_one(lab: Lab) -> None:
    guest = await lab.guest()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind(("", 67))
        server.setblocking(False)
        guest.send_udp("255.255.255.255", 67, b"discover", source="0.0.0.0", source_port=68)
        guest.send_udp("255.255.255.255", 67, b"discover", source_port=68)
        guest.send_udp(GATEWAY, 67, b"renew", source_port=68)
        guest.send_udp(SERVER, 68, b"offer", source_port=67)
        assert _datagrams(await lab.world_sees(guest)) == [b"marker"]
        try:
            raise AssertionError(f"the host's DHCP server heard {server.recv(100)!r}")
        except BlockingIOError:
            pass


@in_namespace
async def test_vlan_tags_are_no_way_round(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    for tag in (0, 5):
        packet = frames.ipv4(other.lease.ipv4, SERVER, UDP, frames.udp(other.lease.ipv4, SERVER, 4000, 9, b"tagged"))
        tagged = struct.pack("!HH", tag, IPV4) + packet
        guest.send_frame(frames.ethernet(GATEWAY_MAC, guest.lease.mac, frames.VLAN, tagged))
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


# Guest to guest


@in_namespace
async def test_guests_do_not_reach_each_other(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    guest.send_udp(other.lease.ipv4, 9, b"hello")
    guest.ping(other.lease.ipv4)
    guest.send_tcp(other.lease.ipv4, 22)
    await guest.expect_reset(22)
    seen = await other.expect_pong()
    assert [each for each in seen if each.source == guest.lease.ipv4] == []


@in_namespace
async def test_one_willing_neighbour_is_not_enough(lab: Lab) -> None:
    willing, isolated = await lab.guest(isolated=False), await lab.guest()
    willing.send_udp(isolated.lease.ipv4, 9, b"hello")
    isolated.send_udp(willing.lease.ipv4, 9, b"hello")
    assert _datagrams(await isolated.expect_pong()) == []
    assert _datagrams(await willing.expect_pong()) == []


@in_namespace
async def test_neighbours_reach_each_other(lab: Lab) -> None:
    guest, other = await lab.guest(isolated=False), await lab.guest(isolated=False)
    guest.send_arp(other.lease.ipv4)  # a guest that takes the subnet for one wire
    answer = await guest.expect(lambda seen: seen.kind == ARP)
    assert (answer.source, answer.source_mac) == (other.lease.ipv4, GATEWAY_MAC)
    guest.send_udp(other.lease.ipv4, 9, b"hello")
    seen = await other.expect(lambda each: each.protocol == UDP)
    assert (seen.data, seen.source) == (b"hello", guest.lease.ipv4)


@in_namespace
async def test_guests_of_a_group_reach_only_each_other(lab: Lab) -> None:
    proxy = await lab.guest(isolated=False, groups=(1,))
    app = await lab.guest(isolated=False, groups=(1, 2))
    db = await lab.guest(isolated=False, groups=(2,))
    other = await lab.guest(isolated=False)
    alone = await lab.guest(groups=(1, 2))
    apart = [(proxy, db), (db, proxy), (proxy, other), (other, app), (alone, app), (app, alone)]
    for sender, receiver in apart:
        sender.send_udp(receiver.lease.ipv4, 9, b"apart")
    for sender, receiver in ((proxy, app), (app, proxy), (app, db), (db, app)):
        sender.send_udp(receiver.lease.ipv4, 9, b"together")
        seen = await receiver.expect(lambda each: each.protocol == UDP)
        assert (seen.data, seen.source) == (b"together", sender.lease.ipv4)
    for guest in (proxy, db, other, alone):
        assert _datagrams(await guest.expect_pong()) == []


@in_namespace
async def test_a_mark_that_the_host_gives_is_no_group(lab: Lab) -> None:
    """Other software may mark packets before our rules see them; what passes between guests has no mark of ours."""
    for command in (
        "table ip others",
        "chain ip others early { type filter hook prerouting priority mangle; }",
        "rule ip others early meta mark set 1",
        "chain ip others late { type filter hook postrouting priority 300; }",
        "rule ip others late meta mark 1 udp dport 9 counter drop",
    ):
        sh(f"nft 'add {command}'")
    member = await lab.guest(isolated=False, groups=(1,))
    mate = await lab.guest(isolated=False, groups=(1,))
    other = await lab.guest(isolated=False)
    other.send_udp(member.lease.ipv4, 9, b"by a mark")
    mate.send_udp(member.lease.ipv4, 9, b"by its group")
    assert (await member.expect(lambda each: each.protocol == UDP)).data == b"by its group"


@in_namespace
async def test_an_unused_guest_address_does_not_leak_to_the_world(lab: Lab) -> None:
    guest = await lab.guest()
    guest.send_udp("10.100.77.77", 9, b"leak")
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


# Guest to host


@in_namespace
async def test_the_gateway_answers_pings(lab: Lab) -> None:
    guest = await lab.guest()
    pong = (await guest.expect_pong())[-1]
    assert (pong.source, pong.source_mac) == (GATEWAY, GATEWAY_MAC)


@in_namespace
async def test_of_the_host_a_guest_reaches_only_what_is_offered(lab: Lab) -> None:
    guest = await lab.guest()
    with lab.listen("0.0.0.0", 8080), lab.listen("0.0.0.0", OFFERED.port):
        for address in (GATEWAY, HOST):
            guest.send_tcp(address, 8080)
            await guest.expect_reset(8080)
        guest.send_tcp(HOST, OFFERED.port)
        await guest.expect_reset(OFFERED.port)
        guest.send_tcp(GATEWAY, OFFERED.port)
        opened = await guest.expect(lambda seen: seen.protocol == TCP)
        assert opened.flags == frames.SYN | frames.ACK


@in_namespace
async def test_udp_ports_of_the_host_are_closed(lab: Lab) -> None:
    guest = await lab.guest()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 111))
        server.setblocking(False)
        guest.send_udp(GATEWAY, 111, b"in")
        refusal = await guest.expect(lambda seen: seen.protocol == ICMP)
        assert refusal.flags == 3
        try:
            raise AssertionError(f"the host received {server.recv(100)!r}")
        except BlockingIOError:
            pass
        server.sendto(b"out", (guest.lease.ipv4, 500))  # what the host began may be answered
        asked = await guest.expect(lambda seen: seen.protocol == UDP)
        guest.send_udp(asked.source, asked.source_port, b"answer", source_port=500)
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(server)
        assert server.recv(100) == b"answer"


@in_namespace
async def test_the_proxy_port_is_for_mediated_guests_alone(lab: Lab) -> None:
    plain, mediated = await lab.guest(), await lab.mediated()
    with lab.listen(GATEWAY, EGRESS_PORT):
        plain.send_tcp(GATEWAY, EGRESS_PORT)
        await plain.expect_reset(EGRESS_PORT)
        knock = frames.ipv4(SERVER, GATEWAY, TCP, frames.tcp(SERVER, GATEWAY, 4000, EGRESS_PORT, frames.SYN))
        lab.from_world(knock)
        assert [seen for seen in await lab.world_sees(plain) if seen.protocol == TCP] == []
        mediated.send_tcp(GATEWAY, EGRESS_PORT)
        opened = await mediated.expect(lambda seen: seen.protocol == TCP)
        assert opened.flags == frames.SYN | frames.ACK


# World to guest, guest to odd places


@in_namespace
async def test_the_world_does_not_reach_a_guest_by_itself(lab: Lab) -> None:
    guest = await lab.guest()
    packet = frames.ipv4(SERVER, guest.lease.ipv4, UDP, frames.udp(SERVER, guest.lease.ipv4, 9, 9, b"in"))
    lab.from_world(packet)
    assert _datagrams(await guest.expect_pong()) == []


@in_namespace
async def test_link_local_and_metadata_are_refused(lab: Lab) -> None:
    for guest in (await lab.guest(), await lab.mediated(), await lab.mediated(EgressMode.HTTP_HTTPS_ONLY)):
        for address in ("169.254.169.254", "169.254.1.1"):
            guest.send_tcp(address, 80)
            await guest.expect_reset(80)
        guest.send_udp("169.254.169.254", 53, b"dns")
        seen = await lab.world_sees(guest)
        assert [each.destination for each in seen] == [SERVER]


@in_namespace
async def test_only_the_uplink_leads_out(lab: Lab) -> None:
    """Another network of the host, such as a container bridge, is not for guests."""
    guest = await lab.guest()
    inner = plug_in("other0")
    sh("ip addr add 172.17.0.1/16 dev other0 && ip link set other0 up")
    sh("ip neigh add 172.17.0.2 lladdr 02:ff:00:00:00:09 dev other0")
    guest.send_udp("172.17.0.2", 9, b"in")
    refusal = await guest.expect(lambda seen: seen.protocol == ICMP)
    assert refusal.flags == 3
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"marker", ("172.17.0.2", 9))
    assert _datagrams(await inner.receive_until(lambda seen: seen.protocol == UDP)) == [b"marker"]


@in_namespace
async def test_a_host_without_uplink_still_serves_its_guests() -> None:
    async with lab(uplink=False) as alone:
        guest = await alone.guest()
        await guest.expect_pong()
        guest.send_tcp(SERVER, 80)  # no route: the kernel itself refuses
        refusal = await guest.expect(lambda seen: seen.protocol in (ICMP, TCP))
        assert refusal.protocol == ICMP or is_reset(refusal)


# Egress


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


@in_namespace
async def test_mode_all_mediates_the_web_and_refuses_all_other_tcp(lab: Lab) -> None:
    guest = await lab.mediated(EgressMode.ALL)
    with lab.listen(GATEWAY, EGRESS_PORT) as proxy:
        for number, port in enumerate((80, 443)):
            await _shake_hands(guest, SERVER, port, 5000 + number)
            assert await _original_destination(proxy) == (SERVER, port)
    for port in (22, 53, 8443):
        guest.send_tcp(SERVER, port)
        await guest.expect_reset(port)
    assert [packet.protocol for packet in await lab.world_sees(guest)] == [UDP]


@in_namespace
async def test_mode_http_https_only_lets_other_ports_pass(lab: Lab) -> None:
    guest = await lab.mediated(EgressMode.HTTP_HTTPS_ONLY)
    with lab.listen(GATEWAY, EGRESS_PORT) as proxy:
        for number, port in enumerate((80, 443)):
            await _shake_hands(guest, SERVER, port, 5000 + number)
            assert await _original_destination(proxy) == (SERVER, port)
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
        assert _datagrams(passed) == [b"query"]


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
README = Path(__file__).parents[2] / "hypeman" / "network" / "README.md"

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
    return await _what_came_of_it(guest, await lab.world_sees(guest))


async def _what_came_of_it(guest: Guest, outside: Sized) -> str:
    """As the tables name it; ``outside``: what arrived there, with the packet that marks the end."""
    if len(outside) > 1:
        return "direct"
    back = [seen for seen in await guest.expect_pong() if seen.protocol in (TCP, ICMP)][:-1]
    if any(seen.protocol == TCP and is_reset(seen) for seen in back):
        return "RST"
    if any(seen.protocol == TCP and seen.flags == frames.SYN | frames.ACK for seen in back):
        return "open"
    return "refused" if any(seen.protocol == ICMP and seen.flags == 3 for seen in back) else "dropped"


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


def _icmp(kind: int, data: bytes) -> bytes:
    body = struct.pack(">BBHI", kind, 0, 0, 0) + data
    return body[:2] + struct.pack(">H", frames.checksum(body)) + body[4:]


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
        lambda g: g.send_ipv4(frames.ipv4(g.lease.ipv4, SERVER, ICMP, _icmp(13, bytes(12)))),
    ),
    "ICMP errors": (
        lambda g: g.send_ipv4(
            frames.ipv4(g.lease.ipv4, SERVER, ICMP, _icmp(3, frames.ipv4(SERVER, g.lease.ipv4, TCP, bytes(20))))
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
    return await _what_came_of_it(guest, await lab.world.receive_until(lambda seen: seen.data == b"marker"))


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


SURROUNDINGS = ("10.9.9.9", "100.100.100.200", "168.63.129.16", "192.168.9.9", "169.254.169.254")


@in_namespace
async def test_private_networks_closed_for_one_guest(lab: Lab) -> None:
    guest = await lab.guest(reach=Reach(private=PrivateReach.CLOSED))
    for address in SURROUNDINGS:
        guest.send_udp(address, 9, b"private")
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_private_networks_opened_for_one_guest() -> None:
    """Metadata services are not among them."""
    async with lab(allow_private=False) as built:
        other = await built.guest()
        guest = await built.guest(reach=Reach(private=PrivateReach.OPEN))
        for each in (other, guest):
            for address in SURROUNDINGS:
                each.send_udp(address, 9, address.encode())
        seen = _datagrams(await built.world_sees(guest))
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
    assert _datagrams(await lab.world_sees(guest)) == [b"marker"]


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
        assert _datagrams(await built.world_sees(guest)) == [b"marker"]


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
