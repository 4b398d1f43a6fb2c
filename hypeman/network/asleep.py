"""Packets to instances in standby: what they are, how many are held, and how failure is reported to a peer. Pure.

    wakes    TCP (but for RST), UDP, ping and every other protocol, the next packet of an open connection included
    quiet    RST and ICMP errors: the sender waits for no answer; held only while the instance wakes for another reason

Formats: RFC 791, 792, 9293.
"""

from __future__ import annotations

import struct
from collections import deque
from ipaddress import IPv4Address

import msgspec

ICMP, TCP, UDP = 1, 6, 17
_RST, _ACK, _SYN, _FIN = 0x04, 0x10, 0x02, 0x01
_HOST_UNREACHABLE, _PORT_UNREACHABLE = 1, 3
"""Kernels report the latter to a UDP client's program, the former not."""
_ICMP_ERRORS = frozenset({3, 4, 5, 11, 12})
_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}

MAX_HELD = 256
"""Packets held for one instance."""
MAX_HELD_BYTES = 1 << 20
"""Bytes held for one instance."""
MAX_ALL_BYTES = 32 << 20
"""Bytes held for all instances."""


class Arrival(msgspec.Struct, frozen=True):
    """A packet to an instance in standby."""

    data: bytes
    source: IPv4Address
    destination: str
    protocol: int
    port: int
    """The instance's port; 0 for protocols without ports and for fragments."""
    quiet: bool

    @property
    def kind(self) -> str:
        """``tcp``, ``udp``, ``icmp`` or ``other``."""
        return _NAMES.get(self.protocol, "other")

    def __str__(self) -> str:
        return f"{self.kind} from {self.source}" + (f" to port {self.port}" if self.port else "")


def parse(data: bytes) -> Arrival | None:
    """None if it is no whole IPv4 header with what we need of the next one."""
    if len(data) < 20 or data[0] >> 4 != 4:
        return None
    start = (data[0] & 15) * 4
    fragment = (int.from_bytes(data[6:8], "big") & 0x1FFF) != 0
    protocol, rest = data[9], data[start:]
    if start < 20 or len(data) < start:
        return None
    port, quiet = 0, False
    if not fragment and protocol in (TCP, UDP) and len(rest) >= 8:
        port = int.from_bytes(rest[2:4], "big")
        quiet = protocol == TCP and len(rest) >= 14 and bool(rest[13] & _RST)
    elif not fragment and protocol == ICMP and rest:
        quiet = rest[0] in _ICMP_ERRORS
    return Arrival(data, IPv4Address(data[12:16]), str(IPv4Address(data[16:20])), protocol, port, quiet)


def refusal(arrival: Arrival) -> bytes | None:
    """What informs the sender that the instance cannot be reached: a TCP reset, or ICMP unreachable; None for
    packets that are never answered."""
    if arrival.quiet or arrival.source.is_multicast or int(arrival.source) == 0:
        return None
    start = (arrival.data[0] & 15) * 4
    if arrival.protocol == TCP and arrival.port and len(arrival.data) >= start + 20:
        return _reset(arrival, start)
    quoted = arrival.data[: start + 8]
    code = _PORT_UNREACHABLE if arrival.protocol == UDP else _HOST_UNREACHABLE
    body = struct.pack("!BBHI", 3, code, 0, 0) + quoted
    body = body[:2] + _checksum(body) + body[4:]
    return _header(arrival, ICMP, len(body)) + body


def _reset(arrival: Arrival, start: int) -> bytes:
    segment = arrival.data[start:]
    sport, dport, sequence, acknowledged = struct.unpack_from("!HHII", segment)
    flags = segment[13]
    payload = max(0, int.from_bytes(arrival.data[2:4], "big") - start - (segment[12] >> 4) * 4)
    if flags & _ACK:
        answer = struct.pack("!HHIIBBHHH", dport, sport, acknowledged, 0, 5 << 4, _RST, 0, 0, 0)
    else:
        following = (sequence + payload + bool(flags & _SYN) + bool(flags & _FIN)) & 0xFFFFFFFF
        answer = struct.pack("!HHIIBBHHH", dport, sport, 0, following, 5 << 4, _RST | _ACK, 0, 0, 0)
    destination = IPv4Address(arrival.destination)
    pseudo = destination.packed + arrival.source.packed + struct.pack("!BBH", 0, TCP, len(answer))
    return _header(arrival, TCP, len(answer)) + answer[:16] + _checksum(pseudo + answer) + answer[18:]


def _header(arrival: Arrival, protocol: int, length: int) -> bytes:
    """An IPv4 header back to the sender."""
    addresses = IPv4Address(arrival.destination).packed + arrival.source.packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, protocol, 0) + addresses
    return header[:10] + _checksum(header) + header[12:]


def _checksum(data: bytes) -> bytes:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


class Held:
    """The packets that wait for their instances, within bounds; the oldest of an instance are kept."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Arrival]] = {}
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self.dropped = 0
        """Packets for which there was no room."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(self, instance_id: str, arrival: Arrival) -> bool:
        """Whether there is room for it."""
        queue = self._queues.setdefault(instance_id, deque())
        size, mine = len(arrival.data), self._sizes.get(instance_id, 0)
        if len(queue) >= MAX_HELD or mine + size > MAX_HELD_BYTES or self._bytes + size > MAX_ALL_BYTES:
            self.dropped += 1
            return False
        queue.append(arrival)
        self._sizes[instance_id] = mine + size
        self._bytes += size
        return True

    def take(self, instance_id: str) -> list[Arrival]:
        """All packets of an instance, oldest first; they are no longer held."""
        self._bytes -= self._sizes.pop(instance_id, 0)
        return list(self._queues.pop(instance_id, ()))
