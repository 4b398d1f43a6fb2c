"""Types of an instance's network: requests, leases, limits. Plain data.

Rates are bytes per second everywhere (the API's ``bandwidth_*`` after ``units.parse_rate``); 0 is
no limit. Names of links, rules and queues are in ``host/types.py``.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from hypeman.fields import Port

Rate = Annotated[int, Meta(ge=0)]


class EgressMode(enum.StrEnum):
    """What of a guest's own TCP is refused so that it goes through the proxy (API §2.4)."""

    NONE = "none"
    """No mediation."""
    ALL = "all"
    """Ports 80 and 443 end in the proxy, every other TCP connection is refused."""
    HTTP_HTTPS_ONLY = "http_https_only"
    """Ports 80 and 443 end in the proxy, all else passes."""


class Protocol(enum.StrEnum):
    TCP = "tcp"
    UDP = "udp"


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the host that leads to one of the guest. ``host_address`` and ``count`` are extensions."""

    host_port: Annotated[int, Meta(ge=0, le=65535, description="0: a free one, which the instance then shows")]
    guest_port: Port
    protocol: Protocol = Protocol.TCP
    host_address: Annotated[
        str, Meta(description="Extension: only on this address of the host; default: on all, IPv4 and IPv6")
    ] = ""
    count: Annotated[int, Meta(ge=1, le=1024, description="Extension: so many consecutive ports, from these on")] = 1


class Opening(msgspec.Struct, frozen=True):
    """Traffic that is let through although its guest is closed."""

    protocol: str
    """``tcp`` or ``udp``."""
    network: str
    """IPv4 address/prefix"""
    first: int
    last: int
    """Ports."""


class PrivateReach(enum.StrEnum):
    """Private networks in the host's surroundings."""

    CONFIGURED = ""
    """As for all guests."""
    OPEN = "open"
    CLOSED = "closed"


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest may reach besides the proxy."""

    closed: bool = False
    """Nothing but ``openings``, and names through the gateway; with mediation only."""
    openings: tuple[Opening, ...] = ()
    private: PrivateReach = PrivateReach.CONFIGURED
    redirected: tuple[int, ...] = ()
    """TCP ports that end in the proxy as 80 and 443 do, except to other guests; with mediation only."""


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Network settings of a create request."""

    enabled: bool = True
    """False: the instance has no interface; it still gets a CID."""
    download_bps: Rate = 0
    upload_bps: Rate = 0
    egress_mode: EgressMode = EgressMode.NONE
    isolated: bool = True
    """False: may talk with other guests that may as well."""
    groups: tuple[str, ...] = ()
    """Only with guests that share one; none: with those that have none."""
    ports: tuple[PortMapping, ...] = ()
    """Published ports, each with a host port."""
    reach: Reach = Reach()


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Network resources of one instance, held as long as its record exists."""

    instance_id: str
    cid: int
    """vsock context id, never used by two instances."""
    ipv4: str = ""
    """Empty, like ``mac`` and ``tap``, for an instance without network."""
    mac: str = ""
    tap: str = ""
    download_bps: Rate = 0
    """Outside → guest."""
    upload_bps: Rate = 0
    """Guest → outside."""
    egress_mode: EgressMode = EgressMode.NONE
    isolated: bool = True
    groups: tuple[int, ...] = ()
    """Their numbers, see ``leases``."""
    ports: tuple[PortMapping, ...] = ()
    """Published ports."""
    reach: Reach = Reach()

    @property
    def enabled(self) -> bool:
        return bool(self.tap)

    def meets(self, other: Lease) -> bool:
        """Whether the two guests may talk with each other; what closed guests reach apart."""
        if self.isolated or other.isolated:
            return False
        return not {*self.groups}.isdisjoint(other.groups) if self.groups or other.groups else True


class GuestNetwork(msgspec.Struct, frozen=True):
    """Network settings that the guest agent applies."""

    address: str
    prefix_length: int
    """Always 32: the gateway is reached directly, everything else through it."""
    gateway: str
    mac: str
    dns_server: str
    mtu: int


class HostPort(msgspec.Struct, frozen=True, order=True):
    """A port on the gateway that every guest may reach."""

    protocol: str
    """``tcp`` or ``udp``."""
    port: int
