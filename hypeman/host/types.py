"""Names and parameters of links, nft elements and queues for guests' networks. Plain data.

They are here because links, rules and leases share them.
"""

from __future__ import annotations

import msgspec

TAP_PREFIX = "hm-"
"""Prefix of all our TAPs and of nothing else on a host: the rules drop everything for this prefix,
so a TAP without a lease reaches nothing."""

WAKE_LINK = TAP_PREFIX + "wake"
"""The TUN that addresses of instances in standby are routed to. No TAP has so short a name."""

SHAPER_PREFIX = "hmu-"
"""The ifb through which a TAP's upload is shaped. Not matched by the TAPs' prefix."""

TABLE = "hypeman"
"""Name of our nft tables, one in each family that we need."""


class TokenBucket(msgspec.Struct, frozen=True):
    """Parameters of one TBF queue."""

    rate: int
    """Bytes per second."""
    burst: int
    """Bytes that may pass at once after a pause."""
    queue: int
    """Bytes that may be queued; more is dropped, which slows a sender down."""


_ONE_TAP = ("ifname",)
_IDENTITY = ("ifname", "ether_addr", "ipv4_addr")
_SOCKET = ("ipv4_addr", "inet_service")

MAX_GROUPS = 8
"""Of one guest."""
GROUP_MAPS = tuple(f"group{slot}" for slot in range(MAX_GROUPS))
"""Maps from a TAP to one of its groups each."""

SET_TYPES = {
    "guests": _IDENTITY,
    "mediated": _ONE_TAP,
    "mode_all": _ONE_TAP,
    "redirected": ("ifname", "inet_service"),
    "neighbours": _ONE_TAP,
    **dict.fromkeys(GROUP_MAPS, _ONE_TAP),
    "members": ("ifname", "mark"),
    "ports": ("inet_proto", "inet_service"),
    "ports_at_tcp": _SOCKET,
    "ports_at_udp": _SOCKET,
    "published": ("ipv4_addr", "inet_proto", "inet_service"),
    "hairpin": ("ipv4_addr", "ipv4_addr"),
    "asleep": ("ipv4_addr",),
    "members_asleep": ("ipv4_addr", "mark"),
    "closed": _ONE_TAP,
    "openings": ("ifname", "inet_proto", "ipv4_addr", "inet_service"),
    "private_open": _ONE_TAP,
    "private_closed": _ONE_TAP,
    "entered": ("inet_service",),
}
"""nft's types of the keys of our sets and maps that change with instances and ingresses."""

INTERVAL_SETS = frozenset(("openings",))
"""Sets whose keys may be ranges: an address is ``address/prefix``, a port ``first-last``."""

MAP_TYPES = {
    **dict.fromkeys(("ports", "ports_at_tcp", "ports_at_udp"), _SOCKET),
    **dict.fromkeys(GROUP_MAPS, ("mark",)),
}
"""nft's types of the values, for those that are maps."""


class Element(msgspec.Struct, frozen=True, order=True):
    """One element of one set or map of our nft tables. ``key`` and ``value`` have one text for each of ``SET_TYPES``
    and ``MAP_TYPES``."""

    family: str
    set: str
    key: tuple[str, ...]
    value: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.family} {self.set} {' . '.join(self.key)}"


def shaper_name(tap: str) -> str:
    """The ifb that belongs to ``tap``."""
    return SHAPER_PREFIX + tap.removeprefix(TAP_PREFIX)
