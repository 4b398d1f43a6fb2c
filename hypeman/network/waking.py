"""Holds packets to instances in standby until they are back.

    hold      the address is routed to ``hm-wake``; its packets are read here, and reported
    release   the address is routed to the TAP, and the held packets are put on it; what was read in between follows.
              If there is no TAP, their senders get a TCP reset or an ICMP error

While an instance is held, its published ports stay open, and neighbours that may reach it may still do so. The CPU that
packets can cost is bounded: the kernel passes a limited rate for each address (``ruleset.py``), and ``run`` reads a
limited rate in all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hypeman.errors import HypemanError
from hypeman.host.links import Links, Tap
from hypeman.host.types import WAKE_LINK
from hypeman.host.wake_link import WakeLink, wait_sending
from hypeman.network import asleep
from hypeman.network.asleep import Arrival, Held
from hypeman.network.types import Lease

log = logging.getLogger(__name__)

BATCH = 64
"""Packets read at a time."""
PAUSE = 0.02
"""Seconds after a full batch; with BATCH, at most 3,200 packets a second are read."""
LINK_UP = 1.0
"""Seconds to wait for a guest's link; it takes milliseconds."""
LOOK = 1.0
"""Seconds without a packet after which ``run`` looks whether any address is still held."""
TIDY = 5.0
"""Seconds without a held address after which the link is removed."""

OnArrival = Callable[[str, Arrival], bool]
"""Called with the id of an instance and a packet to it; returns whether the packet is to be held."""


class Waking:
    """The addresses that are held. ``run`` in a nursery."""

    def __init__(self, links: Links, *, gateway: str) -> None:
        self._links = links
        self._gateway = gateway
        self._link: WakeLink | None = None
        self._held: dict[str, Lease] = {}
        """By instance."""
        self._by_address: dict[str, str] = {}
        self._passed: dict[str, Lease] = {}
        """Address → lease of an instance that was released to its TAP: packets that were read late are for it."""
        self.packets = Held()
        self._on_arrival: OnArrival | None = None
        self._changed = trio.Event()

    def close(self) -> None:
        """Close the link; its routes stay, for the next server."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def listen(self, on_arrival: OnArrival | None) -> None:
        """Report packets from now on, also those that came before; None: no longer."""
        self._on_arrival = on_arrival
        for instance_id in self._held if on_arrival is not None else ():
            for arrival in self.packets.take(instance_id):
                self._arrived(instance_id, arrival)

    def is_held(self, instance_id: str) -> bool:
        return instance_id in self._held

    def lease(self, instance_id: str) -> Lease | None:
        """The lease with which an instance is held."""
        return self._held.get(instance_id)

    def leases(self) -> list[Lease]:
        return list(self._held.values())

    @property
    def link_is_wanted(self) -> bool:
        return bool(self._held) or self._link is not None

    async def hold(self, lease: Lease, *, mtu: int) -> None:
        """Route the address to us. Idempotent. Raises HostError."""
        if self._link is None:
            self._link = await trio.to_thread.run_sync(WakeLink)
            await self._links.set_up_wake_link(mtu)
        self._held[lease.instance_id] = lease
        self._by_address[lease.ipv4] = lease.instance_id
        self._passed.pop(lease.ipv4, None)
        self._changed.set()
        await self._links.route_to_wake_link([lease.ipv4], self._gateway)

    async def release_to(self, lease: Lease, tap: Tap) -> None:
        """Let the packets of an instance pass to its TAP, those held included. Raises HostError."""
        await self._wait_sending(lease, tap)
        self._held.pop(lease.instance_id, None)
        self._by_address.pop(lease.ipv4, None)
        self._passed[lease.ipv4] = lease
        await self._links.route_to_tap(tap)  # first: the answers of the guest are valid only then
        self._pass(lease, self.packets.take(lease.instance_id))
        self._read_rest()
        self._changed.set()

    async def _wait_sending(self, lease: Lease, tap: Tap) -> None:
        try:
            sends = await wait_sending(
                tap.name,
                address=lease.ipv4,
                mac=lease.mac,
                gateway=tap.gateway,
                gateway_mac=tap.gateway_mac,
                seconds=LINK_UP,
            )
        except OSError as error:
            log.warning("cannot check whether the guest on %s sends: %s", tap.name, error)
            return
        if not sends:
            log.info("the guest on %s has not answered ARP within %g s", tap.name, LINK_UP)

    async def release(self, lease: Lease) -> None:
        """Hold the address no longer; the senders of held packets get a reset or an ICMP error."""
        self._held.pop(lease.instance_id, None)
        self._by_address.pop(lease.ipv4, None)
        self._passed.pop(lease.ipv4, None)
        self.reject(lease.instance_id)
        await self._links.unroute_from_wake_link([lease.ipv4])
        self._changed.set()

    def forget_passed(self, lease: Lease) -> None:
        """The TAP is about to be removed."""
        self._passed.pop(lease.ipv4, None)

    def reject(self, instance_id: str) -> None:
        """Tell the senders of the packets held for an instance that it cannot be reached."""
        for arrival in self.packets.take(instance_id):
            self.refuse(arrival)

    def refuse(self, arrival: Arrival) -> None:
        """Tell the sender of one packet that the instance cannot be reached."""
        answer = asleep.refusal(arrival)
        if answer is not None and self._link is not None:
            self._link.answer(answer)

    async def repair(self, mtu: int) -> None:
        """Create link and routes again if others have removed them. Raises HostError."""
        if not self._held:
            return
        routed = await self._links.routed()
        if WAKE_LINK not in await self._links.ours():
            log.error("%s was deleted by others; creating it again", WAKE_LINK)
            self.close()
            routed = set()
        for lease in self.leases():
            if lease.ipv4 not in routed:
                await self.hold(lease, mtu=mtu)

    async def run(self) -> None:
        """Read packets until cancelled."""
        while True:
            changed = self._changed
            if self._link is None:
                await changed.wait()
                self._changed = trio.Event()
                continue
            if not self._held:
                with trio.move_on_after(TIDY) as idle:
                    await changed.wait()
                if idle.cancelled_caught and not self._held:
                    await self._tidy()
                else:
                    self._changed = trio.Event()
                continue
            arrived: list[bytes] = []
            try:
                with trio.move_on_after(LOOK):
                    arrived = await self._link.wait_packets(BATCH)
            except (trio.ClosedResourceError, OSError):
                await trio.sleep(PAUSE)
                continue
            self._take(arrived)
            if len(arrived) == BATCH:
                await trio.sleep(PAUSE)

    async def _tidy(self) -> None:
        self._read_rest()
        self.close()
        try:
            await self._links.remove_links([WAKE_LINK])
        except HypemanError as error:
            log.warning("%s stays: %s", WAKE_LINK, error)

    def _read_rest(self) -> None:
        """What was routed to us before the route changed."""
        if self._link is not None:
            self._take(self._link.read(BATCH * 8))

    def _take(self, packets: list[bytes]) -> None:
        for data in packets:
            arrival = asleep.parse(data)
            if arrival is None:
                continue
            instance_id = self._by_address.get(arrival.destination)
            if instance_id is None:
                passed = self._passed.get(arrival.destination)
                if passed is not None:
                    self._pass(passed, [arrival])
            else:
                self._arrived(instance_id, arrival)

    def _arrived(self, instance_id: str, arrival: Arrival) -> None:
        if self._on_arrival is None or self._on_arrival(instance_id, arrival):
            self.packets.put(instance_id, arrival)

    def _pass(self, lease: Lease, arrivals: list[Arrival]) -> None:
        if self._link is not None:
            for arrival in arrivals:
                self._link.inject(arrival.data, tap=lease.tap, mac=lease.mac)
