"""The kernel's list of TCP connections and UDP flows over IPv4, and its events.

Our own netlink code, like the rest of ``host/``: an event costs 10 µs here. A server may get many of them, so they are
read in batches with a pause in between; what exceeds a batch waits in the socket, and if the kernel has to drop some,
the reader lists them again. Kernels create events only for connections that began while someone listened, so
the list is the truth and events say when to look. A UDP flow is open from its first packet until the kernel forgets it:
30 s after the last packet, or 2 min if both sides have sent some (``net.netfilter.nf_conntrack_udp_timeout``,
``_stream``), and up to a minute more, unless the list is read. Packets in between make no events.

Formats: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_tcp.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import NamedTuple

import trio

from hypeman.host.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    NetlinkError,
    Packet,
    attr,
    attributes,
    nested,
    packets,
    u32,
)

_SUBSYSTEM = 1 << 8
_NEW, _GET, _DELETE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_GROUPS = (1, 2, 3)  # new, update, destroy
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_TUPLE_ORIGINAL, _TUPLE_REPLY, _PROTOINFO = 1, 2, 4
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SOURCE, _DESTINATION = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_INFO_TCP, _TCP_STATE = 1, 1
_FILTER, _ORIGINAL_FLAGS, _REPLY_FLAGS, _SELECT_SOURCE = 25, 1, 2, 1

_OPEN = frozenset({2, 3, 4, 5})
"""SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT: answered, and not yet closed by both sides. A connection attempt that
has no answer is not open."""

BATCH = 1 << 20
"""Bytes read at a time."""
PAUSE = 0.2
"""Seconds between batches."""


class Connection(NamedTuple):
    """One TCP connection or UDP flow or, in an event, a change of it."""

    source: str
    source_port: int
    server: str
    """The address that answers, behind any translation."""
    port: int
    """The port that answers, behind any translation."""
    open: bool
    """Whether both sides can still use it."""
    wanted_port: int = 0
    """The port that the client asked for, before any translation."""
    udp: bool = False


class Connections:
    """Lists connections, and listens to their events once ``listen`` was called."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._socket: socket.socket | None = None

    def close(self) -> None:
        self._netlink.close()
        if self._socket is not None:
            self._socket.close()

    def listen(self) -> None:
        """From now on events are kept for ``wait_events``. Raises OSError."""
        if self._socket is not None:
            return
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        listening = socket.socket(socket.AF_NETLINK, flags, NETLINK_NETFILTER)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            listening.bind((0, 0))
            for group in _GROUPS:
                listening.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            listening.close()
            raise
        self._socket = listening

    async def list(self, server: str = "", *, client: str = "") -> Sequence[Connection]:
        """All connections, or those that ``server`` answers, or those that ``client`` began. Raises NetlinkError."""
        return await trio.to_thread.run_sync(self._list, server, client, limiter=self._one_at_a_time)

    async def wait_events(self) -> Sequence[Connection] | None:
        """The next batch of changes; None if some were dropped. Begin with ``listen``."""
        assert self._socket is not None
        await trio.lowlevel.wait_readable(self._socket)
        await trio.sleep(PAUSE)
        found: list[Connection] = []
        size = 0
        while size < BATCH:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return None
            size += len(data)
            found += (change for packet in packets(data) if (change := parse_connection(packet)) is not None)
        return found

    def _list(self, server: str, client: str) -> Sequence[Connection]:
        header = struct.pack("=BBH", socket.AF_INET, 0, 0)
        wanted = b""
        if server or client:
            address = nested(_TUPLE_IP, attr(_SOURCE, IPv4Address(server or client).packed))
            which, flags = (_TUPLE_REPLY, _REPLY_FLAGS) if server else (_TUPLE_ORIGINAL, _ORIGINAL_FLAGS)
            wanted = nested(which, address) + nested(_FILTER, u32(flags, _SELECT_SOURCE))
        try:
            answers = self._netlink.dump(Message(_GET, 0, header + wanted, "list connections"))
        except NetlinkError as error:
            if not wanted or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            answers = self._netlink.dump(Message(_GET, 0, header, "list connections"))  # a kernel without filters
        found = (connection for answer in answers if (connection := parse_connection(answer)) is not None)
        return [each for each in found if server in ("", each.server) and client in ("", each.source)]


def parse_connection(packet: Packet) -> Connection | None:
    """A TCP connection or UDP flow over IPv4 from a list or an event; None for anything else."""
    if packet.type not in (_NEW, _DELETE) or packet.body[:1] != bytes([socket.AF_INET]):
        return None
    found = dict(attributes(packet.body, 4))
    original, reply = found.get(_TUPLE_ORIGINAL), found.get(_TUPLE_REPLY)
    if original is None or reply is None:
        return None
    client = _parse_tuple(original)
    server = _parse_tuple(reply)
    if client is None or server is None:
        return None
    udp = client.protocol == socket.IPPROTO_UDP
    is_open = packet.type == _NEW and (udp or _tcp_state(found.get(_PROTOINFO, b"")) in _OPEN)
    return Connection(*client.source, *server.source, is_open, client.wanted_port, udp)


def _tcp_state(info: bytes) -> int:
    tcp = dict(attributes(info)).get(_INFO_TCP, b"")
    return int.from_bytes(dict(attributes(tcp)).get(_TCP_STATE, b""), "big")


class _Direction(NamedTuple):
    source: tuple[str, int]
    wanted_port: int
    protocol: int


def _parse_tuple(data: bytes) -> _Direction | None:
    """Source address and port of one direction, and the port at the other side, if it is TCP or UDP."""
    parts = dict(attributes(data))
    address = dict(attributes(parts.get(_TUPLE_IP, b""))).get(_SOURCE, b"")
    proto = dict(attributes(parts.get(_TUPLE_PROTO, b"")))
    protocol = int.from_bytes(proto.get(_NUMBER, b""), "big")
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP) or len(address) != 4:
        return None
    source, wanted = (int.from_bytes(proto.get(kind, b""), "big") for kind in (_SOURCE_PORT, _DESTINATION_PORT))
    return _Direction((str(IPv4Address(address)), source), wanted, protocol)
