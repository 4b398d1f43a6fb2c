"""Every rule by packets: the one that it must stop is sent and does not arrive, its legal neighbour does."""

from __future__ import annotations

import socket
import struct

import trio

from hypeman.network.types import EgressMode
from tests.network import frames
from tests.network.frames import ARP, ICMP, IPV4, IPV6, TCP, UDP, Seen
from tests.network.lab import (
    EGRESS_PORT,
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
from tests.network.outcomes import datagrams

__all__ = ["lab"]


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
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_a_spoofed_mac_goes_nowhere(lab: Lab) -> None:
    guest, other = await lab.guest(), await lab.guest()
    payload = frames.udp(guest.lease.ipv4, SERVER, 4000, 9, b"spoofed")
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, payload), source_mac=other.lease.mac)
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_identity_of_another_guest_is_of_no_use_even_complete(lab: Lab) -> None:
    """MAC and address of another one agree with each other, but not with the interface."""
    guest, other = await lab.guest(), await lab.guest()
    payload = frames.udp(other.lease.ipv4, SERVER, 4000, 9, b"spoofed")
    guest.send_ipv4(frames.ipv4(other.lease.ipv4, SERVER, UDP, payload), source_mac=other.lease.mac)
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]
    assert datagrams(await lab.world_sees(other, b"second")) == [b"second"]


@in_namespace
async def test_each_fragment_must_prove_its_sender(lab: Lab) -> None:
    """A guest cannot slip a fragment into the datagram of another one: they are looked at before defragmentation."""
    guest, other = await lab.guest(), await lab.guest()
    datagram = frames.udp(guest.lease.ipv4, SERVER, 4000, 9, b"A" * 16 + b"B" * 16)
    first, second = datagram[:24], datagram[24:]
    guest.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, first, fragment=0x2000))
    other.send_ipv4(frames.ipv4(guest.lease.ipv4, SERVER, UDP, b"X" * 16, fragment=3))
    assert datagrams(await lab.world_sees(other)) == [b"marker"]
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
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


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
    assert datagrams(await guest.expect_pong()) == []


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
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


@in_namespace
async def test_a_detached_guest_is_closed_before_its_tap_goes(lab: Lab) -> None:
    """With its elements gone it is mute, though its TAP is still there."""
    from hypeman.network import ruleset

    guest, other = await lab.guest(), await lab.guest()
    await lab.rules.change(remove=ruleset.possible_elements(guest.lease))
    guest.send_udp(SERVER, 9, b"late")
    assert datagrams(await lab.world_sees(other)) == [b"marker"]


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
        assert datagrams(await lab.world_sees(guest)) == [b"marker"]
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
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


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
    assert datagrams(await isolated.expect_pong()) == []
    assert datagrams(await willing.expect_pong()) == []


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
        assert datagrams(await guest.expect_pong()) == []


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
    assert datagrams(await lab.world_sees(guest)) == [b"marker"]


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


@in_namespace
async def test_the_world_does_not_reach_a_guest_by_itself(lab: Lab) -> None:
    guest = await lab.guest()
    packet = frames.ipv4(SERVER, guest.lease.ipv4, UDP, frames.udp(SERVER, guest.lease.ipv4, 9, 9, b"in"))
    lab.from_world(packet)
    assert datagrams(await guest.expect_pong()) == []


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
    assert datagrams(await inner.receive_until(lambda seen: seen.protocol == UDP)) == [b"marker"]


@in_namespace
async def test_a_host_without_uplink_still_serves_its_guests() -> None:
    async with lab(uplink=False) as alone:
        guest = await alone.guest()
        await guest.expect_pong()
        guest.send_tcp(SERVER, 80)  # no route: the kernel itself refuses
        refusal = await guest.expect(lambda seen: seen.protocol in (ICMP, TCP))
        assert refusal.protocol == ICMP or is_reset(refusal)
