"""Creates, opens, limits, watches and removes guests' TAPs. The only code that changes links.

    add_tap     an ioctl creates the persistent TAP, one netlink batch does the rest, link up last
    remove_tap  TAP and shaper in one batch; a no-op if they are missing
    open_tap    a descriptor for the VMM

Each TAP has the same MAC (the gateway's) on our side, a /32 route to its guest, a permanent neighbour
entry (the host sends no ARP requests, so replies cannot be spoofed) and no IPv6. The gateway's address
is on ``lo``, so it answers on every TAP and can be bound before the first one exists.

Only links with our prefixes are ever changed or removed, except for the uplink's ``forwarding`` switch and
the gateway's address on ``lo``. Forwarding is enabled per interface, so that the host does not start
routing between its other networks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from hypeman.host import qdiscs
from hypeman.host.files import HostError
from hypeman.host.netlink import (
    CREATE,
    EXCL,
    NETLINK_ROUTE,
    REPLACE,
    Message,
    Monitor,
    Netlink,
    NetlinkError,
    Packet,
    attr,
    attributes,
    nested,
    text,
    u32,
)
from hypeman.host.safe_open import open_regular
from hypeman.host.types import SHAPER_PREFIX, TAP_PREFIX, WAKE_LINK, TokenBucket, shaper_name

R = TypeVar("R")

_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDR, _DEL_ADDR, _NEW_ROUTE, _NEW_NEIGH = 20, 21, 24, 28
_DEL_ROUTE = 25
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_EXT_MASK = 1, 3, 4, 18, 20, 29
_INFO_KIND = 1
_IFLA_GROUP = 27
_DYING_GROUP = 0x686D2D78
"""The group that links are put into while being removed; nothing else uses it."""
_SKIP_STATS = 1 << 3
_IFF_UP = 1
_LOOPBACK = 1
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_LINK, _SCOPE_HOST, _SCOPE_NOWHERE, _UNICAST = 254, 4, 253, 254, 255, 1
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_GROUP_LINK, _GROUP_ROUTE, _GROUP_NETCONF = 1, 7, 24
_NEW_NETCONF, _NETCONF_FORWARDING = 80, 2

_RUN = Path("/run/hypeman")

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_GONE = (errno.ENODEV,)
_STRICT, _OFF = "1", "0"
"""Of ``rp_filter``: off while a guest's address is routed elsewhere, since the loose mode drops all that arrives on an
interface without an address of its own. The rules check a guest's packets in any case."""


class Tap(msgspec.Struct, frozen=True):
    """Complete description of a guest's TAP: the same value creates the same TAP."""

    name: str
    address: str
    """The guest's."""
    mac: str
    """The guest's."""
    gateway: str
    gateway_mac: str
    mtu: int = 1500
    uid: int = 0
    """User that may open it without privileges."""
    alias: str = ""
    """Shown by ``ip link``."""
    proxy_arp: bool = False
    """Proxy ARP for other guests, for guests that treat the subnet as on-link."""
    routed: bool = True
    """False: the guest's address is still routed to WAKE_LINK; ``route_to_tap`` follows."""
    route_loopback: bool = False
    """Whether packets of the host from 127.0.0.0/8 may be routed to the guest, for ports published there."""
    download: TokenBucket | None = None
    upload: TokenBucket | None = None


class Change(enum.Enum):
    """What a watcher reports."""

    OURS = "ours"
    """One of our links was removed or set down, or a guest's route removed, by us or others."""
    UPLINK = "uplink"
    """A default route or another link changed: find the uplink again."""
    FORWARDING = "forwarding"
    """Forwarding was disabled on some interface."""
    ROUTER = "router"
    """Forwarding was enabled on some interface, by us or others."""
    LOST = "lost"
    """The kernel dropped notifications: recheck everything."""


class Link(msgspec.Struct, frozen=True):
    """Current state of one of our links."""

    index: int
    up: bool


class Uplink(msgspec.Struct, frozen=True):
    """The host's uplink. ``names`` has several entries if the default route has several next hops."""

    names: tuple[str, ...] = ()
    mtu: int = 1500
    speed: int = 0
    """Link speed in bytes per second as reported by the driver; 0: not reported."""


class Links:
    """All changes to links. The calls run one at a time in a worker thread."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_ROUTE)
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._dying: set[str] = set()

    def close(self) -> None:
        self._netlink.close()

    async def add_tap(self, tap: Tap) -> int:
        """Create ``tap`` or update the existing one; returns its index. A failure may leave a partial TAP."""
        return await self._in_thread(self._add_tap, tap)

    async def set_limits(self, tap: Tap) -> None:
        """Set the limits of an existing TAP to those of ``tap``."""
        await self._in_thread(self._set_limits, tap)

    async def remove_taps(self, names: Iterable[str]) -> None:
        """Remove TAPs and everything that belongs to them; missing ones are no error."""
        await self.remove_links([link for name in names for link in (name, shaper_name(name))])

    async def remove_links(self, names: Iterable[str]) -> None:
        """Remove our links by name; missing ones are no error.

        Concurrent callers share one removal: the kernel waits for its RCU readers once for a group
        of links, but about 15 ms for each link that is removed alone.
        """
        self._dying.update(names)
        await self._in_thread(self._remove_dying)

    async def open_tap(self, name: str) -> int:
        """A descriptor for the VMM, owned by the caller. Raises HostError."""
        return await self._in_thread(_open_tap, name)

    async def set_up_wake_link(self, mtu: int) -> None:
        """Set up WAKE_LINK, which exists."""
        await self._in_thread(self._set_up_wake_link, mtu)

    async def route_to_wake_link(self, addresses: Iterable[str], gateway: str) -> None:
        """Route guests' addresses to WAKE_LINK, also if they are routed to their TAPs."""
        await self._in_thread(self._route_to_wake_link, list(addresses), gateway)

    async def unroute_from_wake_link(self, addresses: Iterable[str]) -> None:
        """Remove the routes of ``addresses`` to WAKE_LINK, and no others; missing ones are no error."""
        await self._in_thread(self._unroute, list(addresses))

    async def route_to_tap(self, tap: Tap) -> None:
        """Route a guest's address to its TAP, which exists."""
        await self._in_thread(self._route_to_tap, tap)

    async def loosen(self, name: str) -> None:
        """Accept a guest's packets from its TAP while its address is routed elsewhere; a no-op without the TAP."""
        await self._in_thread(_loosen, name)

    async def set_mtu(self, names: Iterable[str], mtu: int) -> None:
        messages = [
            _link_message(index, f"set MTU of {name} to {mtu}", u32(_IFLA_MTU, mtu), tolerated=_GONE)
            for name in names
            if (index := _index(name))
        ]
        await self._in_thread(self._netlink.run, messages)

    async def set_gateway(self, address: str) -> None:
        """Put the guests' gateway on ``lo`` (once, as a /32 that is never selected as source address for others)."""
        await self._in_thread(self._netlink.run, _gateway_messages(address))

    async def remove_gateway(self, address: str) -> None:
        body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, _SCOPE_HOST, _LOOPBACK)
        packed = ipaddress.IPv4Address(address).packed
        message = Message(_DEL_ADDR, 0, body + attr(_IFA_LOCAL, packed), f"remove gateway {address}",
                          (errno.EADDRNOTAVAIL,))  # fmt: skip
        await self._in_thread(self._netlink.run, [message])

    async def forward(self, names: Iterable[str]) -> None:
        """Enable forwarding of packets that arrive on ``names``."""
        await self._in_thread(_forward, list(names))

    async def stop_forwarding(self) -> None:
        """Disable it again on the interfaces, TAPs apart, where ``forward`` of this or an earlier process enabled it;
        not if the host has become a router by other means since."""
        await self._in_thread(_stop_forwarding)

    async def forwarding(self) -> dict[str, int]:
        """Interfaces, TAPs and lo apart, that forward what comes in: name → index."""
        return await self._in_thread(_forwarding)

    async def ours(self) -> dict[str, Link]:
        """All links with our prefixes, by name."""
        return await self._in_thread(self._ours)

    async def routed(self) -> set[str]:
        """Addresses that have a /32 route to one of our TAPs."""
        return await self._in_thread(lambda: parse_routed(_read("/proc/net/route")))

    async def can_shape(self) -> bool:
        """Whether this kernel has ifb, which shapes uploads. Leaves one behind for ``remove_links``."""
        return await self._in_thread(self._can_shape)

    async def watch(self) -> AsyncGenerator[set[Change], None]:
        """Yields changes to links and routes from the first ``anext`` on; close it with ``aclosing``."""
        monitor = Monitor(NETLINK_ROUTE, (_GROUP_LINK, _GROUP_ROUTE, _GROUP_NETCONF))
        try:
            while True:
                yield await monitor.receive(_change, Change.LOST)
        finally:
            monitor.close()

    # In the worker thread

    def _add_tap(self, tap: Tap) -> int:
        index = _index(tap.name)
        if not index:
            _make_tap(tap.name, tap.uid)
            index = _index(tap.name)
        _set_switches(tap)
        self._netlink.run([*_gateway_messages(tap.gateway), *_tap_messages(tap, index)])
        if tap.download or tap.upload:
            self._set_limits(tap)
        self._netlink.run([_link_message(index, f"bring {tap.name} up", up=True), *_way_messages(tap, index)])
        return index

    def _set_up_wake_link(self, mtu: int) -> None:
        for key, value in {
            f"ipv6/conf/{WAKE_LINK}/disable_ipv6": "1",
            f"ipv4/conf/{WAKE_LINK}/rp_filter": _OFF,
            f"ipv4/conf/{WAKE_LINK}/forwarding": "1",
            f"ipv4/conf/{WAKE_LINK}/send_redirects": "0",
            f"ipv4/conf/{WAKE_LINK}/accept_redirects": "0",
            f"ipv4/conf/{WAKE_LINK}/route_localnet": "1",
        }.items():
            _write_switch(key, value)
        index = _index(WAKE_LINK)
        self._netlink.run([_link_message(index, f"bring {WAKE_LINK} up", u32(_IFLA_MTU, mtu), up=True)])

    def _route_to_wake_link(self, addresses: list[str], gateway: str) -> None:
        index = _index(WAKE_LINK)
        self._netlink.run([_route_message(address, gateway, index, WAKE_LINK) for address in addresses])

    def _unroute(self, addresses: list[str]) -> None:
        index = _index(WAKE_LINK)
        if not index:
            return
        header = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, _TABLE_MAIN, 0, _SCOPE_NOWHERE, 0, 0)
        self._netlink.run(
            [
                Message(
                    _DEL_ROUTE,
                    0,
                    header + attr(_RTA_DST, ipaddress.IPv4Address(address).packed) + u32(_RTA_OIF, index),
                    f"remove the route of {address} to {WAKE_LINK}",
                    (errno.ESRCH,),
                )
                for address in addresses
            ]
        )

    def _route_to_tap(self, tap: Tap) -> None:
        index = _index(tap.name)
        if not index:
            raise HostError(f"TAP {tap.name} is not there")
        self._netlink.run([_route_message(tap.address, tap.gateway, index, tap.name)])
        _write_switch(f"ipv4/conf/{tap.name}/rp_filter", _STRICT)

    def _set_limits(self, tap: Tap) -> None:
        index = _index(tap.name)
        if not index:
            raise HostError(f"TAP {tap.name} is not there; its limits cannot be set")
        messages = qdiscs.download_messages(tap.name, index, tap.download)
        shaper = shaper_name(tap.name)
        if tap.upload:
            if not _index(shaper):
                self._netlink.run([_shaper_message(shaper)])
                _write_switch(f"ipv6/conf/{shaper}/disable_ipv6", "1")
            number = _index(shaper)
            messages.append(_link_message(number, f"bring {shaper} up", up=True))
            messages += qdiscs.upload_messages(tap.name, index, number, tap.upload)
        elif number := _index(shaper):
            messages += qdiscs.unlimited_upload_messages(tap.name, index)
            messages.append(_delete_message(shaper, number))
        self._netlink.run(messages)

    def _remove_dying(self) -> None:
        """Remove all queued links. They are queued again on failure, so that each caller gets the error."""
        names, self._dying = self._dying, set()
        found = [(name, index) for name in sorted(names) if (index := _index(name))]
        if not found:
            return
        mark = u32(_IFLA_GROUP, _DYING_GROUP)
        marked = [_link_message(index, f"remove {name}", mark, tolerated=_GONE) for name, index in found]
        try:
            self._netlink.run([*marked, _delete_group_message()])
        except BaseException:
            self._dying |= names
            raise

    def _can_shape(self) -> bool:
        try:
            self._netlink.run([_shaper_message(SHAPER_PREFIX + "probe")])
        except NetlinkError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False
            raise
        return True

    def _ours(self) -> dict[str, Link]:
        body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + u32(_IFLA_EXT_MASK, _SKIP_STATS)
        answers = self._netlink.dump(Message(_GET_LINK, 0, body, "list links"))
        links = map(_link_of, answers)
        return {name: link for name, link in links if name.startswith((TAP_PREFIX, SHAPER_PREFIX))}

    async def _in_thread(self, function: Callable[..., R], *arguments: object) -> R:
        try:
            return await trio.to_thread.run_sync(function, *arguments, limiter=self._one_at_a_time)
        except OSError as error:
            raise HostError(f"the network cannot be changed: {error}") from error


async def find_uplink(configured: str = "") -> Uplink:
    """The configured interface, else those of the best default route; no names if there is none."""
    return await trio.to_thread.run_sync(find_uplink_now, configured)


def parse_routed(table: str) -> set[str]:
    """Destinations of the /32 routes to our TAPs, from the text of /proc/net/route."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {
        socket.inet_ntoa(struct.pack("=I", int(row[1], 16)))
        for row in rows
        if row[0].startswith(TAP_PREFIX) and row[7] == "FFFFFFFF"
    }


def parse_default_routes(table: str) -> tuple[str, ...]:
    """Interfaces of the default route with the lowest metric, from the text of /proc/net/route."""
    candidates: dict[int, list[str]] = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000" and int(fields[3], 16) & 1:
            candidates.setdefault(int(fields[6]), []).append(fields[0])
    return tuple(dict.fromkeys(candidates[min(candidates)])) if candidates else ()


def find_uplink_now(configured: str = "") -> Uplink:
    """``find_uplink`` for code without an event loop; reads three small files."""
    names = (configured,) if configured else parse_default_routes(_read("/proc/net/route"))
    names = tuple(name for name in names if not name.startswith(TAP_PREFIX))
    mtus = [int(value) for name in names if (value := _read(f"/sys/class/net/{name}/mtu"))]
    speeds = [int(value) for name in names if (value := _read(f"/sys/class/net/{name}/speed"))]
    megabits = sum(speed for speed in speeds if speed > 0)
    return Uplink(names, min(mtus, default=1500), megabits * 1_000_000 // 8)


def _read(path: str) -> str:
    """The text of a /proc or /sys file; empty if it is missing or cannot be read now."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _forward(names: list[str]) -> None:
    for name in names:
        switch = _forwarding_switch(name)
        with contextlib.suppress(FileNotFoundError):  # the configured uplink does not exist
            if switch.read_text().strip() != "1":
                if not name.startswith(TAP_PREFIX):
                    _note_switched(name)
                switch.write_text("1")


def _forwarding() -> dict[str, int]:
    names = (path.name for path in Path("/proc/sys/net/ipv4/conf").iterdir())
    return {
        name: index
        for name in names
        if name not in ("all", "default", "lo") and not name.startswith((TAP_PREFIX, SHAPER_PREFIX))
        and _read(str(_forwarding_switch(name))) == "1" and (index := _index(name))
    }  # fmt: skip


def _stop_forwarding() -> None:
    note = _namespace_file(_RUN, "forwarding")
    if _read("/proc/sys/net/ipv4/conf/all/forwarding") != "1":
        for name in set(_read(str(note)).split()):
            with contextlib.suppress(FileNotFoundError):
                _forwarding_switch(name).write_text("0")
    note.unlink(missing_ok=True)


def _note_switched(name: str) -> None:
    """Before the switch is turned, so that it is turned back after a crash. Neither survives a reboot."""
    _RUN.mkdir(mode=0o755, exist_ok=True)
    descriptor = open_regular(_namespace_file(_RUN, "forwarding"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(descriptor, "a") as file:
        file.write(f"{name}\n")


def _forwarding_switch(name: str) -> Path:
    return Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding")


def _namespace_file(directory: Path, kind: str) -> Path:
    return directory / f"network-{os.stat('/proc/self/ns/net').st_ino}.{kind}"


def _index(name: str) -> int:
    """Index of the link; 0 if there is no such link."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _make_tap(name: str, uid: int) -> None:
    """Until TUNSETPERSIST the TAP disappears with our descriptor, so a crash in between leaves nothing behind."""
    descriptor = _attach_tap(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, uid)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def _open_tap(name: str) -> int:
    if not _index(name):
        raise HostError(f"TAP {name} is not there")  # TUNSETIFF would create a non-persistent one
    return _attach_tap(name)


def _attach_tap(name: str) -> int:
    try:
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        why = f"{TUN_DEVICE} cannot be opened ({error.strerror}); load the tun module: modprobe tun"
        raise HostError(why) from error
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    except OSError as error:
        os.close(descriptor)
        raise HostError(f"TAP {name} cannot be opened: {error.strerror}") from error
    return descriptor


def _set_switches(tap: Tap) -> None:
    """Set sysctls before the link comes up, so that not even a router solicitation is sent."""
    settings = {
        f"ipv6/conf/{tap.name}/disable_ipv6": "1",
        f"ipv4/conf/{tap.name}/rp_filter": _STRICT if tap.routed else _OFF,
        f"ipv4/conf/{tap.name}/forwarding": "1",
        f"ipv4/conf/{tap.name}/accept_redirects": "0",
        f"ipv4/conf/{tap.name}/send_redirects": "0",
        f"ipv4/conf/{tap.name}/proxy_arp": "1" if tap.proxy_arp else "0",
        f"ipv4/conf/{tap.name}/route_localnet": "1" if tap.route_loopback else "0",
    }
    for key, value in settings.items():
        _write_switch(key, value)


def _write_switch(key: str, value: str) -> None:
    try:
        Path("/proc/sys/net", key).write_text(value)
    except FileNotFoundError:
        if not key.startswith("ipv6/"):  # a kernel without IPv6 has no IPv6 switches
            raise


def _link_message(index: int, what: str, *parts: bytes, up: bool = False, tolerated: tuple[int, ...] = ()) -> Message:
    flags = _IFF_UP if up else 0
    header = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)
    return Message(_NEW_LINK, 0, header + b"".join(parts), what, tolerated)


def _delete_message(name: str, index: int) -> Message:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0)
    return Message(_DEL_LINK, 0, body, f"remove {name}", _GONE)


def _delete_group_message() -> Message:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + u32(_IFLA_GROUP, _DYING_GROUP)
    return Message(_DEL_LINK, 0, body, "remove links", _GONE)


def _shaper_message(name: str) -> Message:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
    body += text(_IFLA_IFNAME, name) + nested(_IFLA_LINKINFO, text(_INFO_KIND, "ifb"))
    return Message(_NEW_LINK, CREATE | EXCL, body, f"make {name}", (errno.EEXIST,))


def _gateway_messages(address: str) -> list[Message]:
    packed = ipaddress.IPv4Address(address).packed
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, _SCOPE_HOST, _LOOPBACK)
    body += attr(_IFA_LOCAL, packed) + attr(_IFA_ADDRESS, packed)
    return [
        _link_message(_LOOPBACK, "bring lo up", up=True),
        Message(_NEW_ADDR, CREATE | EXCL, body, f"add gateway {address} to lo", (errno.EEXIST,)),
    ]


def _tap_messages(tap: Tap, index: int) -> list[Message]:
    look = u32(_IFLA_MTU, tap.mtu), attr(_IFLA_ADDRESS, _mac(tap.gateway_mac)), attr(_IFLA_IFALIAS, tap.alias.encode())
    return [_link_message(index, f"set up {tap.name}", *look)]


def _way_messages(tap: Tap, index: int) -> list[Message]:
    """Route and neighbour, for a link that is up."""
    guest = ipaddress.IPv4Address(tap.address).packed
    neighbour = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
    neighbour += attr(_NDA_DST, guest) + attr(_NDA_LLADDR, _mac(tap.mac))
    way = [Message(_NEW_NEIGH, CREATE | REPLACE, neighbour, f"enter {tap.mac} as neighbour on {tap.name}")]
    return [_route_message(tap.address, tap.gateway, index, tap.name), *way] if tap.routed else way


def _route_message(address: str, gateway: str, index: int, name: str) -> Message:
    route = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, _TABLE_MAIN, _PROTO_STATIC, _SCOPE_LINK, _UNICAST, 0)
    route += attr(_RTA_DST, ipaddress.IPv4Address(address).packed) + u32(_RTA_OIF, index)
    route += attr(_RTA_PREFSRC, ipaddress.IPv4Address(gateway).packed)
    return Message(_NEW_ROUTE, CREATE | REPLACE, route, f"route {address} to {name}")


def _loosen(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net", f"ipv4/conf/{name}/rp_filter").write_text(_OFF)


def _mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))


def _link_of(packet: Packet) -> tuple[str, Link]:
    index, flags = struct.unpack_from("=iI", packet.body, 4)
    names = (value for kind, value in attributes(packet.body, 16) if kind == _IFLA_IFNAME)
    return next(names, b"").rstrip(b"\0").decode(errors="replace"), Link(index, bool(flags & _IFF_UP))


def _change(packet: Packet) -> Change | None:
    """The Change that a notification stands for; None if it is irrelevant."""
    if packet.type in (_NEW_LINK, _DEL_LINK):
        name, link = _link_of(packet)
        if not name.startswith((TAP_PREFIX, SHAPER_PREFIX)):
            return Change.UPLINK
        return Change.OURS if packet.type == _DEL_LINK or not link.up else None
    if packet.type in (_NEW_ROUTE, _DEL_ROUTE):
        length = packet.body[1]
        if length == 0:
            return Change.UPLINK
        return Change.OURS if length == 32 and packet.type == _DEL_ROUTE else None
    if packet.type == _NEW_NETCONF:
        # Only this switch matters, and only when it is reported alone: a new link reports all at once.
        switches = dict(attributes(packet.body, 4))
        if len(switches) != 2 or _NETCONF_FORWARDING not in switches:
            return None
        return Change.ROUTER if any(switches[_NETCONF_FORWARDING]) else Change.FORWARDING
    return None


class NamespaceClaim:
    """Makes this the only server in the network namespace, from creation until ``close`` or process exit.

    A second one, with another data directory, would treat the first one's TAPs as leftovers. It is a lock on a file
    named after the namespace's inode, in a root-owned directory, so that no other user can hold it. Raises HostError.
    """

    def __init__(self, directory: Path = _RUN) -> None:
        self._path = _namespace_file(directory, "lock")
        try:
            directory.mkdir(mode=0o755, exist_ok=True)
            self._descriptor = open_regular(self._path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise HostError(f"{error.filename or self._path}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise HostError("another hypeman server keeps the network of this host; stop it first") from error

    def close(self) -> None:
        """Idempotent. The file stays: if it were unlinked, two processes could each hold a lock on that name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
