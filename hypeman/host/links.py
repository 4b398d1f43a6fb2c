"""TAPs of guests: made, opened, limited, watched, removed. The only code that touches links.

    add_tap     ioctl makes the persistent TAP, one netlink batch does all else, up comes last
    remove_tap  TAP and shaper in one batch; content if they are not there
    open_tap    a descriptor for the VMM

Each TAP has the same MAC (the gateway's) on our side, a /32 route to its guest, a permanent neighbour
entry (the host never asks by ARP, so nothing can be answered falsely) and no IPv6. The gateway's
address lies once on ``lo``, and so answers on every TAP and can be bound before the first one exists.

Only links with our prefixes are ever changed or removed, the uplink's ``forwarding`` switch and the
gateway's address on ``lo`` apart. Forwarding is switched on per interface: a host that was no router
does not become one between its other networks.
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
from hypeman.host.types import SHAPER_PREFIX, TAP_PREFIX, TokenBucket, shaper_name

R = TypeVar("R")

_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDR, _DEL_ADDR, _NEW_ROUTE, _NEW_NEIGH = 20, 21, 24, 28
_DEL_ROUTE = 25
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_EXT_MASK = 1, 3, 4, 18, 20, 29
_INFO_KIND = 1
_IFLA_GROUP = 27
_DYING_GROUP = 0x686D2D78
"""A group that links are in for the moment of their removal, and nobody else uses."""
_SKIP_STATS = 1 << 3
_IFF_UP = 1
_LOOPBACK = 1
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_LINK, _SCOPE_HOST, _UNICAST = 254, 4, 253, 254, 1
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_GROUP_LINK, _GROUP_ROUTE, _GROUP_NETCONF = 1, 7, 24
_NEW_NETCONF, _NETCONF_FORWARDING = 80, 2

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_GONE = (errno.ENODEV,)


class Tap(msgspec.Struct, frozen=True):
    """A guest's cable, complete: the same value makes the same TAP."""

    name: str
    address: str
    """The guest's."""
    mac: str
    """The guest's."""
    gateway: str
    gateway_mac: str
    mtu: int = 1500
    uid: int = 0
    """Who may open it without privilege."""
    alias: str = ""
    """Shown by ``ip link``."""
    proxy_arp: bool = False
    """Answer ARP for other guests, for guests that take the subnet for one wire."""
    download: TokenBucket | None = None
    upload: TokenBucket | None = None


class Change(enum.Enum):
    """What a watcher is told."""

    OURS = "ours"
    """A link of ours was removed or taken down, or a guest's route removed, by whomever."""
    UPLINK = "uplink"
    """A default route or another link changed: find the uplink anew."""
    FORWARDING = "forwarding"
    """Somebody switched forwarding off for some interface."""
    LOST = "lost"
    """The kernel dropped notifications: look at everything."""


class Link(msgspec.Struct, frozen=True):
    """A link of ours as it is now."""

    index: int
    up: bool


class Uplink(msgspec.Struct, frozen=True):
    """The way out. ``names`` is more than one where the default route has several next hops."""

    names: tuple[str, ...] = ()
    mtu: int = 1500
    speed: int = 0
    """Bytes per second that the link says it does; 0: it says nothing."""


class Links:
    """All changes to links. The calls run one at a time in a worker thread."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_ROUTE)
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._dying: set[str] = set()

    def close(self) -> None:
        self._netlink.close()

    async def add_tap(self, tap: Tap) -> int:
        """Make ``tap``, or make the one that exists so; its index. Where it fails half a TAP is left."""
        return await self._in_thread(self._add_tap, tap)

    async def set_limits(self, tap: Tap) -> None:
        """Make the limits of a TAP that exists those of ``tap``."""
        await self._in_thread(self._set_limits, tap)

    async def remove_taps(self, names: Iterable[str]) -> None:
        """Remove TAPs and all that belongs to them; those that are not there are no error."""
        await self.remove_links([link for name in names for link in (name, shaper_name(name))])

    async def remove_links(self, names: Iterable[str]) -> None:
        """Remove links of ours by name; those that are not there are no error.

        Callers that wait for each other share one removal: the kernel waits for its readers once for
        a group of links, but some 15 ms for each link that is removed alone.
        """
        self._dying.update(names)
        await self._in_thread(self._remove_dying)

    async def open_tap(self, name: str) -> int:
        """A descriptor for the VMM, owned by the caller. Raises HostError."""
        return await self._in_thread(_open_tap, name)

    async def set_mtu(self, names: Iterable[str], mtu: int) -> None:
        messages = [
            _link_message(index, f"set MTU of {name} to {mtu}", u32(_IFLA_MTU, mtu), tolerated=_GONE)
            for name in names
            if (index := _index(name))
        ]
        await self._in_thread(self._netlink.run, messages)

    async def set_gateway(self, address: str) -> None:
        """Put the guests' gateway on ``lo`` (once, as a /32 that is never chosen as a source towards others)."""
        await self._in_thread(self._netlink.run, _gateway_messages(address))

    async def remove_gateway(self, address: str) -> None:
        body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, _SCOPE_HOST, _LOOPBACK)
        packed = ipaddress.IPv4Address(address).packed
        message = Message(_DEL_ADDR, 0, body + attr(_IFA_LOCAL, packed), f"remove gateway {address}",
                          (errno.EADDRNOTAVAIL,))  # fmt: skip
        await self._in_thread(self._netlink.run, [message])

    async def forward(self, names: Iterable[str]) -> None:
        """Let packets that come in by ``names`` be forwarded."""
        await self._in_thread(_forward, list(names))

    async def ours(self) -> dict[str, Link]:
        """All links with a prefix of ours by name."""
        return await self._in_thread(self._ours)

    async def routed(self) -> set[str]:
        """Addresses that have a /32 route to a TAP of ours."""
        return await self._in_thread(lambda: parse_routed(_read("/proc/net/route")))

    async def can_shape(self) -> bool:
        """Whether this kernel has ifb, by which uploads are shaped. Leaves one behind for ``remove_links``."""
        return await self._in_thread(self._can_shape)

    async def watch(self) -> AsyncGenerator[set[Change], None]:
        """What happens to links and routes from the first ``anext`` on; close it with ``aclosing``."""
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

    def _set_limits(self, tap: Tap) -> None:
        index = _index(tap.name)
        if not index:
            raise HostError(f"TAP {tap.name} is not there; its limits can not be set")
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
        """All that anybody wants removed by now. Put back on failure, so that each caller hears of it."""
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
            raise HostError(f"the network can not be changed: {error}") from error


async def find_uplink(configured: str = "") -> Uplink:
    """The configured interface, else those of the best default route; no name where there is none."""
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
    """The text of a file of the kernel's; empty where it is not there or has no answer now."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _forward(names: list[str]) -> None:
    for name in names:
        switch = Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding")
        with contextlib.suppress(FileNotFoundError):  # a configured uplink that is not plugged in
            if switch.read_text().strip() != "1":
                switch.write_text("1")


def _index(name: str) -> int:
    """0 where there is no such link."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _make_tap(name: str, uid: int) -> None:
    """Until TUNSETPERSIST the TAP vanishes with our descriptor, so a crash in between leaves nothing."""
    descriptor = _attach_tap(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, uid)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def _open_tap(name: str) -> int:
    if not _index(name):
        raise HostError(f"TAP {name} is not there")  # TUNSETIFF would make one, and not a persistent one
    return _attach_tap(name)


def _attach_tap(name: str) -> int:
    try:
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        why = f"{TUN_DEVICE} can not be opened ({error.strerror}); load the tun module: modprobe tun"
        raise HostError(why) from error
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    except OSError as error:
        os.close(descriptor)
        raise HostError(f"TAP {name} can not be opened: {error.strerror}") from error
    return descriptor


def _set_switches(tap: Tap) -> None:
    """Before the link comes up, so that not even a router solicitation leaves it."""
    settings = {
        f"ipv6/conf/{tap.name}/disable_ipv6": "1",
        f"ipv4/conf/{tap.name}/rp_filter": "1",
        f"ipv4/conf/{tap.name}/forwarding": "1",
        f"ipv4/conf/{tap.name}/accept_redirects": "0",
        f"ipv4/conf/{tap.name}/send_redirects": "0",
        f"ipv4/conf/{tap.name}/proxy_arp": "1" if tap.proxy_arp else "0",
    }
    for key, value in settings.items():
        _write_switch(key, value)


def _write_switch(key: str, value: str) -> None:
    try:
        Path("/proc/sys/net", key).write_text(value)
    except FileNotFoundError:
        if not key.startswith("ipv6/"):  # a kernel without IPv6 has nothing to close
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
    guest, gateway = (ipaddress.IPv4Address(each).packed for each in (tap.address, tap.gateway))
    route = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, _TABLE_MAIN, _PROTO_STATIC, _SCOPE_LINK, _UNICAST, 0)
    route += attr(_RTA_DST, guest) + u32(_RTA_OIF, index) + attr(_RTA_PREFSRC, gateway)
    neighbour = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
    neighbour += attr(_NDA_DST, guest) + attr(_NDA_LLADDR, _mac(tap.mac))
    return [
        Message(_NEW_ROUTE, CREATE | REPLACE, route, f"route {tap.address} to {tap.name}"),
        Message(_NEW_NEIGH, CREATE | REPLACE, neighbour, f"enter {tap.mac} as neighbour on {tap.name}"),
    ]


def _mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))


def _link_of(packet: Packet) -> tuple[str, Link]:
    index, flags = struct.unpack_from("=iI", packet.body, 4)
    names = (value for kind, value in attributes(packet.body, 16) if kind == _IFLA_IFNAME)
    return next(names, b"").rstrip(b"\0").decode(errors="replace"), Link(index, bool(flags & _IFF_UP))


def _change(packet: Packet) -> Change | None:
    """What a notification means to us; None where nothing."""
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
        # Of the many switches only this one matters, switched off alone: a new link reports all at once.
        switches = dict(attributes(packet.body, 4))
        off = len(switches) == 2 and switches.get(_NETCONF_FORWARDING) == struct.pack("=i", 0)
        return Change.FORWARDING if off else None
    return None


class NamespaceClaim:
    """Being the one server of this network namespace, from its making until ``close`` or the end of the process.

    A second one, with another data directory, would take the first one's TAPs for leftovers. It is a lock on a file
    named after the namespace's inode, in a directory of root's, so that no other user can hold it. Raises HostError.
    """

    def __init__(self, directory: Path = Path("/run/hypeman")) -> None:
        self._path = directory / f"network-{os.stat('/proc/self/ns/net').st_ino}.lock"
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
        """Idempotent. The file stays, since a lock on a name that is removed could be held twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
