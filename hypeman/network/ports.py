"""Published ports: what a mapping means, and which mappings conflict. Pure.

A mapping is *forwarded* by the kernel where it covers IPv4 addresses (``forwards_of``, elements of the ruleset). On the
host it occupies *sockets* (``sockets_of``), one for each port and address: two mappings conflict if two of their
sockets do, and each is really bound, so that no other program takes the port and none has it.

    host_address   sockets                      forwarded
    "" (all)       0.0.0.0 and ::               from every IPv4 address; relayed from IPv6
    0.0.0.0, ::    the one                      the same, of one family
    an address     the one                      from this address; relayed if it is an IPv6 one
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from hypeman.errors import InvalidRequest
from hypeman.network.types import Lease, PortMapping

MAX_PORTS = 1024
"""Ports that one instance may publish."""
ANY_4, ANY_6 = "0.0.0.0", "::"  # noqa: S104 - that is what these ports are for
_LAST = 65535
_CODE = "invalid_ports"
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


class Forward(NamedTuple):
    """One port that the kernel forwards."""

    address: str
    """Empty: all IPv4 addresses of the host."""
    protocol: str
    host_port: int
    guest_port: int


class HostSocket(NamedTuple):
    """One port of one address of the host. The address is ``ANY_4`` or ``ANY_6`` for all of a family."""

    protocol: str
    address: str
    port: int

    def __str__(self) -> str:
        """``8080/tcp``, with the address if it is a single one."""
        where = "" if self.address in (ANY_4, ANY_6) else f"{_bracketed(self.address)}:"
        return f"{where}{self.port}/{self.protocol}"

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.address

    @property
    def place(self) -> tuple[str, int, bool]:
        """Only sockets of the same place can conflict."""
        return self.protocol, self.port, self.is_ipv6

    def conflicts(self, other: HostSocket) -> bool:
        """Whether both cannot be held at once."""
        same = self.address == other.address or bool({ANY_4, ANY_6} & {self.address, other.address})
        return same and self.place == other.place


def check_ports(ports: Sequence[PortMapping]) -> tuple[PortMapping, ...]:
    """The mappings in their normal form. Raises InvalidRequest ``invalid_ports``.

    Those that ask for a free port have ``count`` 1: free ports are not consecutive.
    """
    if sum(mapping.count for mapping in ports) > MAX_PORTS:
        raise InvalidRequest(f"an instance publishes at most {MAX_PORTS} ports", code=_CODE)
    checked: list[PortMapping] = []
    for mapping in ports:
        mapping = msgspec.structs.replace(mapping, host_address=_address(mapping.host_address))
        for what, first in (("host", mapping.host_port), ("guest", mapping.guest_port)):
            if first + mapping.count - 1 > _LAST:
                raise InvalidRequest(f"{mapping.count} {what} ports from {first} on go beyond {_LAST}", code=_CODE)
        checked += [mapping] if mapping.host_port else _one_by_one(mapping)
    _check_distinct(checked)
    return tuple(checked)


def forwards_of(mapping: PortMapping) -> Iterator[Forward]:
    """What the kernel forwards; nothing for an IPv6 address."""
    if ":" in mapping.host_address:
        return
    address = "" if mapping.host_address == ANY_4 else mapping.host_address
    for i in range(mapping.count):
        yield Forward(address, mapping.protocol.value, mapping.host_port + i, mapping.guest_port + i)


def sockets_of(mapping: PortMapping) -> Iterator[tuple[HostSocket, int]]:
    """The sockets that a mapping occupies, each with the guest's port behind it."""
    for address in (mapping.host_address,) if mapping.host_address else (ANY_4, ANY_6):
        for i in range(mapping.count):
            yield HostSocket(mapping.protocol.value, address, mapping.host_port + i), mapping.guest_port + i


def all_sockets(ports: Iterable[PortMapping]) -> dict[HostSocket, int]:
    """``sockets_of`` all of them."""
    return {socket: guest_port for mapping in ports for socket, guest_port in sockets_of(mapping)}


def reached_from_loopback(ports: Iterable[PortMapping]) -> bool:
    """Whether the kernel forwards any of them from 127.0.0.0/8."""
    return any(port.host_address in ("", ANY_4) or port.host_address.startswith("127.") for port in ports)


def port_changes(before: Lease, after: Lease) -> tuple[Lease, Lease]:
    """The two leases with only those ports that the other one does not have in the same way: what a change of ports
    ends and begins, however many ports stay."""
    old, new = set(before.ports), set(after.ports)
    gone = tuple(mapping for mapping in before.ports if mapping not in new)
    fresh = tuple(mapping for mapping in after.ports if mapping not in old)
    return msgspec.structs.replace(before, ports=gone), msgspec.structs.replace(after, ports=fresh)


def in_the_way(held: Iterable[HostSocket], wanted: Iterable[HostSocket]) -> list[HostSocket]:
    """Those of ``held`` that are not wanted and conflict with one that is."""
    places: dict[tuple[str, int, bool], list[HostSocket]] = {}
    for socket in wanted:
        places.setdefault(socket.place, []).append(socket)
    return [
        socket
        for socket in held
        if (there := places.get(socket.place)) and socket not in there and any(map(socket.conflicts, there))
    ]


def _check_distinct(ports: Sequence[PortMapping]) -> None:
    seen: dict[tuple[str, int, bool], list[HostSocket]] = {}
    for mapping in ports:
        if not mapping.host_port:
            continue
        for socket, _ in sockets_of(mapping):
            others = seen.setdefault(socket.place, [])
            if any(socket.conflicts(other) for other in others):
                raise InvalidRequest(f"host port {socket} is published twice", code=_CODE)
            others.append(socket)


def _one_by_one(mapping: PortMapping) -> list[PortMapping]:
    return [msgspec.structs.replace(mapping, guest_port=mapping.guest_port + i, count=1) for i in range(mapping.count)]


def _address(text: str) -> str:
    if not text:
        return ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidRequest(f"host_address {text[:60]!r} is not an IP address", code=_CODE) from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise InvalidRequest(f"host_address {text[:60]!r} must not have a scope", code=_CODE)
        if address.ipv4_mapped:
            address = address.ipv4_mapped
        elif address.is_link_local:  # of no interface without a scope
            raise InvalidRequest(f"host_address {text[:60]!r} is a link-local IPv6 address", code=_CODE)
    if address.is_multicast:
        raise InvalidRequest(f"host_address {text[:60]!r} is a multicast address", code=_CODE)
    if address == _BROADCAST:  # which can be bound, and is no destination of a connection
        raise InvalidRequest(f"host_address {text[:60]!r} is a broadcast address", code=_CODE)
    return str(address)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
