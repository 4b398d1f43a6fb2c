"""What packets to an instance in standby are, and which errors their senders get."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.network import asleep
from hypeman.network.asleep import Held, parse, refusal
from tests.network import frames
from tests.network.frames import ICMP, TCP, UDP

GUEST, PEER = "10.100.0.2", "192.0.2.1"


def tcp(flags: int, *, sequence: int = 1000, acknowledged: int = 0, data: bytes = b"") -> bytes:
    head = struct.pack("!HHIIBBHHH", 40000, 80, sequence, acknowledged, 5 << 4, flags, 1024, 0, 0)
    return frames.ipv4(PEER, GUEST, TCP, head + data)


def udp(data: bytes = b"hello") -> bytes:
    return frames.ipv4(PEER, GUEST, UDP, frames.udp(PEER, GUEST, 40000, 53, data))


def icmp(kind: int) -> bytes:
    return frames.ipv4(PEER, GUEST, ICMP, bytes([kind, 0, 0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("packet", "expected", "quiet"),
    [
        (tcp(0x02), "tcp from 192.0.2.1 to port 80", False),
        (tcp(0x18, data=b"x"), "tcp from 192.0.2.1 to port 80", False),
        (tcp(0x11), "tcp from 192.0.2.1 to port 80", False),
        (tcp(0x04), "tcp from 192.0.2.1 to port 80", True),
        (tcp(0x14), "tcp from 192.0.2.1 to port 80", True),
        (udp(), "udp from 192.0.2.1 to port 53", False),
        (icmp(8), "icmp from 192.0.2.1", False),
        (icmp(3), "icmp from 192.0.2.1", True),
        (icmp(11), "icmp from 192.0.2.1", True),
        (frames.ipv4(PEER, GUEST, 47, b"gre"), "other from 192.0.2.1", False),
    ],
)
def test_what_a_packet_is(packet: bytes, expected: str, quiet: bool) -> None:
    arrival = parse(packet)
    assert arrival is not None
    assert (str(arrival), arrival.destination, arrival.quiet) == (expected, GUEST, quiet)
    assert (refusal(arrival) is None) is quiet


@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    for packet in (data, b"\x45" + data, frames.ipv4(PEER, GUEST, TCP, data)):
        arrival = parse(packet)
        if arrival is not None:
            refusal(arrival)


def is_whole(packet: bytes) -> bool:
    """Whether the header's checksum is right."""
    words = struct.unpack("!10H", packet[:20])
    total = sum(words)
    return ((total & 0xFFFF) + (total >> 16)) & 0xFFFF in (0xFFFF, 0)


@pytest.mark.parametrize(
    ("packet", "flags", "sequence", "acknowledged"),
    [
        (tcp(0x02, sequence=7), 0x14, 0, 8),
        (tcp(0x02, sequence=0xFFFFFFFF), 0x14, 0, 0),
        (tcp(0x02, sequence=7, data=b"fast"), 0x14, 0, 12),
        (tcp(0x18, sequence=7, acknowledged=99, data=b"x"), 0x04, 99, 0),
    ],
)
def test_a_reset_is_one_that_the_sender_accepts(packet: bytes, flags: int, sequence: int, acknowledged: int) -> None:
    """RFC 9293, 3.10.7.1."""
    arrival = parse(packet)
    assert arrival is not None
    answer = refusal(arrival)
    assert answer is not None and is_whole(answer)
    assert answer[12:20] == socket.inet_aton(GUEST) + socket.inet_aton(PEER)
    reported = struct.unpack_from("!HHIIBB", answer, 20)
    assert reported == (80, 40000, sequence, acknowledged, 5 << 4, flags)


def test_an_unreachable_quotes_what_it_is_about() -> None:
    arrival = parse(udp())
    assert arrival is not None
    answer = refusal(arrival)
    assert answer is not None and is_whole(answer)
    assert answer[20:22] == bytes([3, 3]) and answer[28:] == udp()[:28]


def test_what_is_held_is_bounded() -> None:
    held = Held()
    packets = [parse(udp(bytes([number]))) for number in range(3)]
    for arrival in packets:
        assert arrival is not None and held.put("a", arrival)
    assert held.take("a") == packets and held.take("a") == [] and len(held) == 0
    small, large = parse(udp()), parse(udp(b"x" * 60000))
    assert small is not None and large is not None
    while held.put("a", small):
        pass
    assert len(held) == asleep.MAX_HELD and held.dropped == 1
    names = iter(range(10**6))
    while held.put(f"{next(names)}", large):
        pass
    assert held._bytes <= asleep.MAX_ALL_BYTES
    assert not held.put("another", large) and held.put("another", small)
