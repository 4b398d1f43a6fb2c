"""Published ports on the host's side: holds and relays of all instances. What the kernel does is in the ruleset.

claim     hold what a request asks for, and find free ports for it; nothing is recorded yet
keep      the transaction succeeded: what was claimed belongs to the instance, what it had before is released
open      the instance has a VM: serve its relays     close     it has none
forget    the instance is deleted
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from types import TracebackType

import msgspec
import trio

from hypeman.errors import HypemanError, InvalidRequest, PortInUse
from hypeman.host.port_holds import PortHold, hold_port
from hypeman.network.ports import ANY_4, HostSocket, all_sockets, in_the_way, sockets_of
from hypeman.network.relay import Relays
from hypeman.network.resolver import PORT as NAMES_PORT
from hypeman.network.types import Lease, PortMapping

log = logging.getLogger(__name__)

LOOPBACK = 1
"""Index of the interface lo, whose packets are translated when they are sent."""
_ATTEMPTS = 32
"""For a port that is free on each of the requested addresses."""


class Claim:
    """Ports held for a change that is not recorded yet; released at the end of the block unless kept."""

    def __init__(self, owner: PublishedPorts, instance_id: str) -> None:
        self.ports: tuple[PortMapping, ...] = ()
        """With the ports that were found."""
        self.held: dict[HostSocket, PortHold] = {}
        self.given_up: list[HostSocket] = []
        """Sockets of the instance that were in the way of new ones."""
        self._owner = owner
        self._instance_id = instance_id
        self._kept = False

    def keep(self, instance_id: str) -> None:
        """The change is recorded."""
        self._kept = True
        self._owner.adopt(instance_id, self)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            self._owner.abandon(self._instance_id, self)


class PublishedPorts:
    """``run`` in a nursery serves the relays."""

    def __init__(self) -> None:
        self.relays = Relays()
        self._held: dict[str, dict[HostSocket, PortHold]] = {}
        """Instance → its sockets."""
        self._forwarding: tuple[int, ...] = ()
        self._one_at_a_time = trio.CapacityLimiter(1)

    def set_forwarding(self, interfaces: Iterable[int]) -> None:
        """Indices of the interfaces that forward: what comes in by others is relayed."""
        forwarding = (LOOPBACK, *sorted(interfaces))
        if forwarding == self._forwarding:
            return
        self._forwarding = forwarding
        for held in self._held.values():
            for hold in held.values():
                if hold.is_open:
                    hold.open(forwarding)

    async def claim(self, ports: Sequence[PortMapping], *, instance_id: str = "") -> Claim:
        """Hold the sockets of ``ports`` that ``instance_id`` does not have yet; use the result in a ``with``.

        Raises PortInUse, or InvalidRequest for an address that the host does not have.
        """
        claim = Claim(self, instance_id)
        if not ports and instance_id not in self._held:
            return claim
        with trio.CancelScope(shield=True):  # milliseconds, and nothing held gets lost
            await trio.to_thread.run_sync(self._claim, claim, ports, instance_id, limiter=self._one_at_a_time)
        return claim

    async def restore(self, leases: Iterable[Lease]) -> None:
        """At server start: hold the ports of all instances. One that is taken is logged; the rules forward it
        anyway."""
        for lease in leases:
            if lease.ports:
                await trio.to_thread.run_sync(self._restore, lease)

    def adopt(self, instance_id: str, claim: Claim) -> None:
        wanted = all_sockets(claim.ports)
        held = self._held.get(instance_id, {}) | claim.held
        for socket in held.keys() - wanted.keys():
            self._release(held.pop(socket))
        if held:
            self._held[instance_id] = held
        else:
            self._held.pop(instance_id, None)

    def abandon(self, instance_id: str, claim: Claim) -> None:
        for hold in claim.held.values():
            hold.release()
        held = self._held.get(instance_id, {})
        for socket in claim.given_up:
            self._hold_again(held, socket, instance_id)

    def open(self, lease: Lease) -> None:
        """Let connections come in to the instance's relays. Idempotent."""
        held = self._held.get(lease.instance_id, {})
        for socket, guest_port in all_sockets(lease.ports).items():
            if hold := held.get(socket):
                hold.open(self._forwarding)
                if hold.relayed:
                    self.relays.open(hold, lease.instance_id, (lease.ipv4, guest_port))

    def close(self, instance_id: str) -> None:
        for hold in self._held.get(instance_id, {}).values():
            self.relays.close(hold)
            hold.close()

    def forget(self, instance_id: str) -> None:
        """Release the instance's ports; a no-op if it has none."""
        for hold in self._held.pop(instance_id, {}).values():
            self._release(hold)

    def aclose(self) -> None:
        """Release everything, for a server that ends."""
        for instance_id in list(self._held):
            self.forget(instance_id)

    def _release(self, hold: PortHold) -> None:
        self.relays.close(hold)
        hold.release()

    # In a worker thread

    def _claim(self, claim: Claim, ports: Sequence[PortMapping], instance_id: str) -> None:
        mine = self._held.get(instance_id, {})
        try:
            wanted = all_sockets(mapping for mapping in ports if mapping.host_port)
            for socket in in_the_way(mine, wanted):
                claim.given_up.append(socket)
                self._release_later(mine.pop(socket))
            claim.ports = tuple(self._claim_one(claim, mapping, mine) for mapping in ports)
        except BaseException:
            self.abandon(instance_id, claim)
            raise

    def _release_later(self, hold: PortHold) -> None:
        """From a thread: the relay is cancelled by the event loop, which closes its copy of the socket."""
        trio.from_thread.run_sync(self._release, hold)

    def _claim_one(self, claim: Claim, mapping: PortMapping, mine: dict[HostSocket, PortHold]) -> PortMapping:
        if mapping.host_port:
            self._hold_all(claim, mapping, mine)
            return mapping
        for _ in range(_ATTEMPTS):
            probe = hold_port(mapping.protocol, mapping.host_address or ANY_4, 0)
            found = msgspec.structs.replace(mapping, host_port=probe.port)
            probe.release()
            try:
                self._hold_all(claim, found, mine)
            except PortInUse:
                continue
            return found
        raise PortInUse("the host has no free port")

    def _hold_all(self, claim: Claim, mapping: PortMapping, mine: dict[HostSocket, PortHold]) -> None:
        """All sockets of a mapping, or none of them."""
        made: dict[HostSocket, PortHold] = {}
        try:
            for socket, _ in sockets_of(mapping):
                if socket in mine or socket in claim.held:
                    continue
                try:
                    made[socket] = _hold(socket)
                except InvalidRequest:
                    if mapping.host_address:
                        raise  # otherwise it is only that the host has no IPv6
        except BaseException:
            for hold in made.values():
                hold.release()
            raise
        claim.held |= made

    def _restore(self, lease: Lease) -> None:
        held = self._held.setdefault(lease.instance_id, {})
        for socket in all_sockets(lease.ports):
            self._hold_again(held, socket, lease.instance_id)

    def _hold_again(self, held: dict[HostSocket, PortHold], socket: HostSocket, instance_id: str) -> None:
        try:
            held[socket] = _hold(socket, absent=True)
        except InvalidRequest:
            pass  # no IPv6
        except HypemanError as error:
            log.error("a port that instance %s publishes cannot be held: %s", instance_id, error.message)


def _hold(socket: HostSocket, *, absent: bool = False) -> PortHold:
    """The port of the guests' name server is ours on the gateway's address, which leaves the others to a guest."""
    return hold_port(
        socket.protocol,
        socket.address,
        socket.port,
        relayed=not socket.address.startswith("127."),
        absent=absent,
        shared=socket.port == NAMES_PORT and socket.address == ANY_4,
    )
