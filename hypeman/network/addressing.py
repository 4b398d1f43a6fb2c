"""Address, MAC, TAP name and CID of an instance. Pure.

Everything that must be unique follows from one number, the *offset* of the address in the subnet:

    offset 7 of 10.100.0.0/16   →  10.100.0.7   02:00:00:00:00:07

Offsets are unique, so MACs are too, and no table is searched for a free one. The network and the
broadcast address and the gateway are never given out; the gateway's offset makes the one MAC that
the host has on every TAP, so a guest's ARP entry stays right when its TAP is created again (restore).
"""

from __future__ import annotations

import hashlib
import ipaddress

import msgspec

from hypeman.host.types import TAP_PREFIX

_MAX_TAP_LENGTH = 15
"""IFNAMSIZ without its NUL."""
_CID_BASE = 1 << 24
"""vsock CIDs are shared with every other VMM of the host, and those count up from 3."""


class Subnet(msgspec.Struct, frozen=True):
    """The guests' network and its gateway."""

    network: ipaddress.IPv4Network
    gateway: ipaddress.IPv4Address

    @classmethod
    def parse(cls, cidr: str, gateway: str = "") -> Subnet:
        """``gateway`` empty: the first address. Raises ValueError for a subnet without room for guests."""
        network = ipaddress.IPv4Network(cidr)
        if not 8 <= network.prefixlen <= 30:
            raise ValueError(f"subnet {cidr} must have a prefix of 8 to 30 bits")
        chosen = ipaddress.IPv4Address(gateway) if gateway else network[1]
        if chosen not in network or chosen in (network.network_address, network.broadcast_address):
            raise ValueError(f"gateway {chosen} is not a usable address of {network}")
        return cls(network, chosen)

    @property
    def gateway_offset(self) -> int:
        return int(self.gateway) - int(self.network.network_address)

    @property
    def gateway_mac(self) -> str:
        return mac_of(self.gateway_offset)

    @property
    def guests(self) -> int:
        """Number of addresses that can be allocated."""
        return self.network.num_addresses - 3

    def offset(self, rank: int) -> int:
        """The offset of the ``rank``-th address that can be given out, counted from 0."""
        offset = rank + 1
        return offset if offset < self.gateway_offset else offset + 1

    def rank(self, address: str) -> int:
        """The reverse of ``offset``. Raises ValueError for an address that cannot be allocated."""
        offset = int(ipaddress.IPv4Address(address)) - int(self.network.network_address)
        if not 0 < offset < self.network.num_addresses - 1 or offset == self.gateway_offset:
            raise ValueError(f"{address} is not a guest address of {self.network}")
        return offset - 1 if offset < self.gateway_offset else offset - 2

    def address(self, rank: int) -> str:
        return str(self.network[self.offset(rank)])

    def holds(self, address: str) -> bool:
        """Whether a guest may have ``address`` here."""
        try:
            self.rank(address)
        except ValueError:
            return False
        return True


def mac_of(offset: int) -> str:
    """A locally administered unicast MAC for an offset below 2^24."""
    return ":".join(f"{byte:02x}" for byte in b"\x02\x00\x00" + offset.to_bytes(3, "big"))


def cid_of(rank: int) -> int:
    return _CID_BASE + rank


def cid_rank(cid: int) -> int:
    return cid - _CID_BASE


def tap_name(instance_id: str, *, attempt: int = 0) -> str:
    """A TAP name from the instance's id, so that an undo can only meet its own, and an operator
    recognises it. ``attempt`` > 0 gives other names for ids that begin alike."""
    room = _MAX_TAP_LENGTH - len(TAP_PREFIX)
    if attempt == 0:
        return TAP_PREFIX + instance_id[: room - 1]
    digest = hashlib.blake2b(f"{attempt} {instance_id}".encode(), digest_size=8).hexdigest()
    return TAP_PREFIX + digest[: room - 1]
