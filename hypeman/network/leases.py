"""Leases of address, TAP name and CID. Functions that run in the caller's transaction.

They are called in the transaction that writes the instance's record, so both exist or neither.

A *pool* allocates and frees ranks 0, 1, 2…:

    next    the lowest rank never allocated; used while there is one
    freed   freed ranks, oldest first; used when ``next`` has reached the end

So a create takes two or three look-ups however full the subnet is, and an address is unused as long as
possible before another guest gets it (the old one's connections and DNS cache entries have expired by then).

The address pool belongs to one subnet and gateway. A different configuration resets it if no address
is in use, and is an error otherwise: running guests cannot be renumbered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import msgspec

from hypeman.errors import InsufficientResources, InvalidState, NotFound, PortInUse
from hypeman.network import addressing
from hypeman.network.addressing import Subnet
from hypeman.network.ports import HostSocket, all_sockets, port_changes
from hypeman.network.types import EgressMode, Lease, NetworkPlan, PortMapping, Reach
from hypeman.store import Table, Txn

_ADDRESSES = "ipv4"
_CIDS = "cid"
_MAX_CIDS = 1 << 24


class Pool(msgspec.Struct, frozen=True):
    next: int = 0
    freed: int = 0
    """Number of ranks freed so far: the key of the next freed row."""
    scope: str = ""
    """The subnet and gateway that give the ranks their meaning."""


class Freed(msgspec.Struct, frozen=True):
    rank: int


class TapOwner(msgspec.Struct, frozen=True):
    instance_id: str


class Group(msgspec.Struct, frozen=True):
    number: int
    """From 1 on. The rules of the network know groups by it."""


class PortOwner(msgspec.Struct, frozen=True):
    instance_id: str


LEASES: Table[Lease] = Table("leases", Lease)
POOLS: Table[Pool] = Table("lease_pools", Pool)
FREED: Table[Freed] = Table("lease_freed", Freed)
TAPS: Table[TapOwner] = Table("lease_taps", TapOwner)
GROUPS: Table[Group] = Table("lease_groups", Group)
"""Name of a group of guests → its number; there while a lease is in it."""
PORTS: Table[PortOwner] = Table("lease_ports", PortOwner)
"""``protocol/port/address`` of each socket of the host that is published → its instance."""

NameOf = Callable[[str], str]
"""Instance → how an error calls it."""


def take_lease(
    txn: Txn, instance_id: str, plan: NetworkPlan, subnet: Subnet, name_of: NameOf = "instance {}".format
) -> Lease:
    """Lease address, MAC, TAP name and CID for a new instance and store the lease.

    An existing lease is returned unchanged, so a repeated step allocates nothing twice.
    Raises InsufficientResources if the subnet is full, PortInUse if another instance publishes one of the ports.
    """
    found = txn.get(LEASES, instance_id)
    if found is not None:
        return found
    rank = -1
    if plan.enabled:
        check_subnet(txn, subnet)
        rank = _take(txn, _ADDRESSES, subnet.guests, f"addresses of {subnet.network}")
    lease = Lease(instance_id=instance_id, cid=addressing.cid_of(_take(txn, _CIDS, _MAX_CIDS, "vsock CIDs")))
    if plan.enabled:
        lease = msgspec.structs.replace(
            lease,
            ipv4=subnet.address(rank),
            mac=addressing.mac_of(subnet.offset(rank)),
            tap=_take_tap(txn, instance_id),
            download_bps=plan.download_bps,
            upload_bps=plan.upload_bps,
            egress_mode=plan.egress_mode,
            isolated=plan.isolated,
            groups=_join(txn, plan.groups),
            ports=plan.ports,
            reach=plan.reach,
        )
        _take_ports(txn, lease, name_of)
    txn.put(LEASES, instance_id, lease)
    return lease


def set_ports(txn: Txn, instance_id: str, ports: tuple[PortMapping, ...], name_of: NameOf) -> Lease:
    """Publish ``ports`` instead of those before. Raises PortInUse, or NotFound if there is no lease with a network."""
    before = txn.get(LEASES, instance_id)
    if before is None or not before.enabled:
        raise NotFound(f"instance {instance_id} has no network")
    lease = msgspec.structs.replace(before, ports=ports)
    gone, fresh = port_changes(before, lease)
    _drop_ports(txn, gone)
    _take_ports(txn, fresh, name_of)
    txn.put(LEASES, instance_id, lease)
    return lease


def set_reach(txn: Txn, instance_id: str, mode: EgressMode, reach: Reach) -> None:
    """A no-op if there is no lease with a network."""
    before = txn.get(LEASES, instance_id)
    if before is not None and before.enabled:
        txn.put(LEASES, instance_id, msgspec.structs.replace(before, egress_mode=mode, reach=reach))


def check_ports_free(txn: Txn, ports: Iterable[PortMapping], name_of: NameOf, *, instance_id: str = "") -> None:
    """Raise PortInUse if an instance other than ``instance_id`` publishes one of the ports."""
    for wanted in all_sockets(ports):
        prefix = f"{wanted.protocol}/{wanted.port:05}/"
        for key, owner in txn.scan(PORTS, prefix):
            other = wanted._replace(address=key.removeprefix(prefix))
            if owner.instance_id != instance_id and wanted.conflicts(other):
                raise PortInUse(f"host port {wanted} is published by {name_of(owner.instance_id)}")


def drop_lease(txn: Txn, instance_id: str, subnet: Subnet) -> None:
    """Free the lease; a no-op if there is none. Only after its TAP and rules are removed."""
    lease = txn.get(LEASES, instance_id)
    if lease is None:
        return
    txn.delete(LEASES, instance_id)
    _give_back(txn, _CIDS, addressing.cid_rank(lease.cid))
    if lease.enabled:
        txn.delete(TAPS, lease.tap)
        _drop_ports(txn, lease)
        _leave(txn, lease)
        check_subnet(txn, subnet)
        _give_back(txn, _ADDRESSES, subnet.rank(lease.ipv4))


def get_lease(txn: Txn, instance_id: str) -> Lease | None:
    return txn.get(LEASES, instance_id)


def all_leases(txn: Txn) -> list[Lease]:
    return [lease for _, lease in txn.scan(LEASES)]


def check_subnet(txn: Txn, subnet: Subnet) -> None:
    """Make ``subnet`` the one that addresses are allocated from.

    Raises InvalidState if instances still hold addresses of another subnet or gateway.
    """
    scope = f"{subnet.network} via {subnet.gateway}"
    pool = txn.get(POOLS, _ADDRESSES)
    if pool is not None and pool.scope == scope:
        return
    holders = sum(lease.enabled for lease in all_leases(txn)) if pool is not None else 0
    if pool is not None and holders:
        raise InvalidState(
            f"{holders} instances hold addresses of {pool.scope}, but {scope} is configured; "
            "set network.subnet_cidr and network.gateway back, or delete those instances first"
        )
    for key in list(txn.keys(FREED, f"{_ADDRESSES}/")):
        txn.delete(FREED, key)
    txn.put(POOLS, _ADDRESSES, Pool(scope=scope))


def _join(txn: Txn, names: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of these groups. A new one gets the lowest that is free."""
    numbers = {name: group.number for name, group in txn.scan(GROUPS)} if names else {}
    taken = set(numbers.values())
    for name in names:
        if name not in numbers:
            numbers[name] = next(number for number in count(1) if number not in taken)
            taken.add(numbers[name])
            txn.put(GROUPS, name, Group(numbers[name]))
    return tuple(sorted(numbers[name] for name in names))


def _leave(txn: Txn, lease: Lease) -> None:
    """Forget the groups in which ``lease``, which has been deleted, was the last one."""
    if not lease.groups:
        return
    used = {number for other in all_leases(txn) for number in other.groups}
    for name, group in list(txn.scan(GROUPS)):
        if group.number not in used:
            txn.delete(GROUPS, name)


def _take_ports(txn: Txn, lease: Lease, name_of: NameOf) -> None:
    check_ports_free(txn, lease.ports, name_of, instance_id=lease.instance_id)
    for socket in all_sockets(lease.ports):
        txn.put(PORTS, _port_key(socket), PortOwner(lease.instance_id))


def _drop_ports(txn: Txn, lease: Lease) -> None:
    for socket in all_sockets(lease.ports):
        txn.delete(PORTS, _port_key(socket))


def _port_key(socket: HostSocket) -> str:
    return f"{socket.protocol}/{socket.port:05}/{socket.address}"


def _take(txn: Txn, name: str, size: int, what: str) -> int:
    pool = txn.get(POOLS, name) or Pool()
    if pool.next < size:
        txn.put(POOLS, name, msgspec.structs.replace(pool, next=pool.next + 1))
        return pool.next
    oldest = next(txn.scan(FREED, f"{name}/"), None)
    if oldest is None:
        raise InsufficientResources(
            f"all {size} {what} are in use; delete instances or widen network.subnet_cidr",
            resource="addresses",
            amount=1,
        )
    key, freed = oldest
    txn.delete(FREED, key)
    return freed.rank


def _give_back(txn: Txn, name: str, rank: int) -> None:
    pool = txn.get(POOLS, name) or Pool()
    txn.put(FREED, f"{name}/{pool.freed:016x}", Freed(rank))
    txn.put(POOLS, name, msgspec.structs.replace(pool, freed=pool.freed + 1))


def _take_tap(txn: Txn, instance_id: str) -> str:
    for attempt in count():
        name = addressing.tap_name(instance_id, attempt=attempt)
        if txn.insert(TAPS, name, TapOwner(instance_id)):
            return name
    raise AssertionError("unreachable")
