"""Packets to an address in standby, in a real kernel: which are held, which never come near it, and how many."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from hypeman.host.types import MAP_TYPES, SET_TYPES, Element
from hypeman.network.asleep import Arrival
from hypeman.network.types import Lease, PortMapping, Protocol
from tests.network import frames
from tests.network.frames import ICMP, SYN, TCP, UDP
from tests.network.lab import GATEWAY, HOST, SERVER, Guest, Lab, in_namespace, sh, wait_until

WEB = PortMapping(host_port=8080, guest_port=80)
NAMES = PortMapping(host_port=53, guest_port=53, protocol=Protocol.UDP)
MARKER = 4999
"""The source port of what is sent last, and must arrive."""


class Sleeping:
    """An instance in standby, and the packets to it that were reported."""

    def __init__(self, lab: Lab, lease: Lease) -> None:
        self.lab = lab
        self.lease = lease
        self.arrived: list[Arrival] = []

    def take(self, instance_id: str, arrival: Arrival) -> bool:
        assert instance_id == self.lease.instance_id
        self.arrived.append(arrival)
        return True

    def from_world(self, *, port: int = 8080, to: str = HOST, source: str = SERVER, source_port: int = 4000) -> None:
        self.lab.from_world(frames.ipv4(source, to, TCP, frames.tcp(source, to, source_port, port, SYN)))

    async def until_marker(self) -> list[str]:
        """What arrived before a legal packet that is sent now."""
        self.from_world(source_port=MARKER)
        marked = MARKER.to_bytes(2, "big")
        await wait_until(lambda: any(each.data[20:22] == marked for each in self.arrived))
        output, self.arrived = [str(each) for each in self.arrived if each.data[20:22] != marked], []
        return output


@asynccontextmanager
async def sleeping(lab: Lab, *, listens: bool = True, **lease: object) -> AsyncIterator[Sleeping]:
    async with trio.open_nursery() as nursery:
        await nursery.start(lab.network.run)
        made = lab.lease(ports=(WEB, NAMES), **lease)
        found = Sleeping(lab, made)
        await lab.network.attach(made)
        await lab.network.hold(made)
        await lab.network.detach(made)
        if listens:
            lab.network.waking.listen(found.take)
        yield found
        nursery.cancel_scope.cancel()


@in_namespace
async def test_what_reaches_it(lab: Lab) -> None:
    """By its published ports from the world and from the host, and by its address from a neighbour and the host."""
    async with sleeping(lab, isolated=False) as one:
        neighbour = await lab.guest(isolated=False)
        address = one.lease.ipv4
        lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 4000, 53, b"who?")))
        one.from_world()
        neighbour.send_tcp(address, 22)
        neighbour.send_udp(address, 7, b"echo")
        neighbour.ping(address)
        neighbour.send_tcp(HOST, 8080, source_port=4001)
        await wait_until(lambda: len(one.arrived) == 6)
        reported = await one.until_marker()
        assert sorted(reported) == sorted([
            f"udp from {SERVER} to port 53", f"tcp from {SERVER} to port 80",
            f"tcp from {neighbour.lease.ipv4} to port 22", f"udp from {neighbour.lease.ipv4} to port 7",
            f"icmp from {neighbour.lease.ipv4}", f"tcp from {neighbour.lease.ipv4} to port 80",
        ])  # fmt: skip


def scan(one: Sleeping) -> None:
    """From the world: its own address, ports that are not published, other addresses."""
    address = one.lease.ipv4
    for port in (22, 80, 8080):
        one.from_world(to=address, port=port)
    for port in (22, 80, 8081):
        one.from_world(port=port)
    one.lab.from_world(frames.ipv4(SERVER, address, ICMP, frames.echo_request()))
    one.lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 4000, 8080, b"x")))


def shout(one: Sleeping, guest: Guest) -> None:
    """Broadcast, multicast, and ARP of another guest."""
    for to in ("255.255.255.255", "10.100.255.255", "224.0.0.251"):
        guest.send_udp(to, 53, b"anyone?")
    guest.send_arp(one.lease.ipv4)
    guest.send_arp(GATEWAY, sender=one.lease.ipv4, sender_mac=one.lease.mac)


def knock(one: Sleeping, guest: Guest) -> None:
    """Of another guest, to its address."""
    guest.send_tcp(one.lease.ipv4, 22)
    guest.send_udp(one.lease.ipv4, 53, b"who?")
    guest.ping(one.lease.ipv4)


@in_namespace
async def test_scans_from_the_world_do_not_reach_it(lab: Lab) -> None:
    async with sleeping(lab) as one:
        scan(one)
        assert await one.until_marker() == []


@in_namespace
async def test_broadcast_multicast_and_arp_do_not_reach_it(lab: Lab) -> None:
    async with sleeping(lab, isolated=False) as one:
        neighbour = await lab.guest(isolated=False)
        shout(one, neighbour)
        for to in ("255.255.255.255", "192.0.2.255", "224.0.0.251"):
            lab.from_world(frames.ipv4(SERVER, to, UDP, frames.udp(SERVER, to, 53, 53, b"anyone?")))
        await neighbour.expect_pong()
        assert await one.until_marker() == []


@in_namespace
async def test_guests_that_may_not_reach_it_do_not(lab: Lab) -> None:
    """Any other guest, if the sleeping one is isolated."""
    async with sleeping(lab, isolated=True) as one:
        for stranger in (await lab.guest(isolated=True), await lab.guest(isolated=False)):
            knock(one, stranger)
            await stranger.expect_pong()
        assert await one.until_marker() == []


@in_namespace
async def test_a_guest_that_lies_does_not_reach_it(lab: Lab) -> None:
    async with sleeping(lab, isolated=False) as one:
        liar, honest = await lab.guest(isolated=False), await lab.guest(isolated=False)
        address = one.lease.ipv4
        for source in (GATEWAY, honest.lease.ipv4, SERVER, address):
            liar.send_udp(address, 53, b"who?", source=source)
            liar.ping(address, source=source)
        await liar.expect_pong()
        assert await one.until_marker() == []


@in_namespace
async def test_what_comes_before_anyone_listens_is_reported_later(lab: Lab) -> None:
    """While a server starts, or settles what its predecessor began."""
    async with sleeping(lab, listens=False) as one:
        one.from_world()
        waking = lab.network.waking
        await wait_until(lambda: len(waking.packets) == 1)
        waking.listen(one.take)
        assert [str(each) for each in one.arrived] == [f"tcp from {SERVER} to port 80"]
        assert waking.packets.take(one.lease.instance_id) == one.arrived, "it is held for the instance"


@in_namespace
async def test_a_link_that_is_deleted_is_created_again(lab: Lab) -> None:
    async with sleeping(lab) as one:
        sh("ip link delete hm-wake")
        await wait_until(lambda: f"{one.lease.ipv4} dev hm-wake" in sh("ip route"))
        assert await one.until_marker() == []


@in_namespace
async def test_a_flood_passes_at_a_bounded_rate(lab: Lab) -> None:
    """256 packets a second, after the first 512: the rest is dropped in the kernel."""
    async with sleeping(lab) as one:
        begin = time.monotonic()
        for number in range(8000):
            one.from_world(source_port=10000 + number)
            if number % 100 == 99:
                await trio.lowlevel.checkpoint()
        await wait_until(lambda: len(one.arrived) >= 512)
        await trio.sleep(0.5)  # in which those that passed are read
        allowed = 512 + 256 * (time.monotonic() - begin + 1)
        assert 512 <= len(one.arrived) <= allowed, (len(one.arrived), allowed)
        assert len(lab.network.waking.packets) == 256, "of which so many are held"


SAMPLES = {
    "ifname": "hm-guest1", "ether_addr": "02:00:00:00:00:02", "ipv4_addr": "10.100.0.2", "inet_proto": "tcp",
    "inet_service": "80", "mark": "1",
}  # fmt: skip


def _samples() -> Iterable[Element]:
    for name, types in SET_TYPES.items():
        key = tuple(SAMPLES[each] for each in types)
        if name == "openings":
            key = tuple(f"{part}/32" if kind == "ipv4_addr" else part for kind, part in zip(types, key, strict=True))
        yield Element("inet", name, key, tuple(SAMPLES[each] for each in MAP_TYPES.get(name, ())))


@in_namespace
async def test_the_kernel_takes_an_element_of_every_set(lab: Lab) -> None:
    """Else the change would be refused, and all rules loaded anew each time."""
    for element in _samples():
        await lab.rules.change(add=[element])
        assert "elements" in sh(f"nft list {'map' if element.value else 'set'} inet hypeman {element.set}"), element.set
        await lab.rules.change(remove=[element])
