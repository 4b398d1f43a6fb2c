"""What came of packets, in the words of the README's tables."""

from __future__ import annotations

import struct
from collections.abc import Sized
from pathlib import Path

from tests.network import frames
from tests.network.frames import ICMP, TCP, UDP, Seen
from tests.network.lab import Guest, is_reset

README = Path(__file__).parents[2] / "hypeman" / "network" / "README.md"


def datagrams(seen: list[Seen]) -> list[bytes]:
    return [packet.data for packet in seen if packet.protocol == UDP]


def icmp(kind: int, data: bytes) -> bytes:
    body = struct.pack(">BBHI", kind, 0, 0, 0) + data
    return body[:2] + struct.pack(">H", frames.checksum(body)) + body[4:]


async def outcome_of(guest: Guest, outside: Sized) -> str:
    """As the tables name it; ``outside``: what arrived there, with the packet that marks the end."""
    if len(outside) > 1:
        return "direct"
    back = [seen for seen in await guest.expect_pong() if seen.protocol in (TCP, ICMP)][:-1]
    if any(seen.protocol == TCP and is_reset(seen) for seen in back):
        return "RST"
    if any(seen.protocol == TCP and seen.flags == frames.SYN | frames.ACK for seen in back):
        return "open"
    return "refused" if any(seen.protocol == ICMP and seen.flags == 3 for seen in back) else "dropped"
