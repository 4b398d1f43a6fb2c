"""Ethernet frames for the tests, made and read by hand so that any field can be forged."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

BROADCAST = "ff:ff:ff:ff:ff:ff"
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
ICMP, TCP, UDP = 1, 6, 17
SYN, RST, ACK, PSH = 0x02, 0x04, 0x10, 0x08


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(destination: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac(destination) + mac(source) + struct.pack("!H", kind) + payload


def arp(operation: int, sender_mac: str, sender: str, target: str, target_mac: str = "00:00:00:00:00:00") -> bytes:
    def packed(address: str) -> bytes:
        return ipaddress.IPv4Address(address).packed

    head = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    return head + mac(sender_mac) + packed(sender) + mac(target_mac) + packed(target)


def ipv4(source: str, destination: str, protocol: int, payload: bytes, *, fragment: int = 0, number: int = 7) -> bytes:
    """``fragment`` is the flags-and-offset field: 0x2000 more follow, plus the offset in units of 8 bytes."""
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), number, fragment, 64, protocol, 0,
        ipaddress.IPv4Address(source).packed, ipaddress.IPv4Address(destination).packed,
    )  # fmt: skip
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(source: str, destination: str, source_port: int, port: int, data: bytes = b"") -> bytes:
    head = struct.pack("!HHHH", source_port, port, 8 + len(data), 0)
    total = checksum(_pseudo(source, destination, UDP, 8 + len(data)) + head + data) or 0xFFFF
    return head[:6] + struct.pack("!H", total) + data


def tcp(
    source: str, destination: str, source_port: int, port: int, flags: int, *, sequence: int = 1000, ack: int = 0,
    data: bytes = b"",
) -> bytes:  # fmt: skip
    head = struct.pack("!HHIIBBHHH", source_port, port, sequence, ack, 5 << 4, flags, 65000, 0, 0)
    total = checksum(_pseudo(source, destination, TCP, len(head) + len(data)) + head + data)
    return head[:16] + struct.pack("!H", total) + head[18:] + data


def echo_request(data: bytes = b"ping") -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    return head[:2] + struct.pack("!H", checksum(head + data)) + head[4:] + data


def ipv6(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255)
    return head + ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(destination).packed + payload


def udp6(source: str, destination: str, source_port: int, port: int, data: bytes) -> bytes:
    head = struct.pack("!HHHH", source_port, port, 8 + len(data), 0)
    pseudo = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(destination).packed
    pseudo += struct.pack("!II", 8 + len(data), UDP)
    return head[:6] + struct.pack("!H", checksum(pseudo + head + data) or 0xFFFF) + data


def _pseudo(source: str, destination: str, protocol: int, length: int) -> bytes:
    packed = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
    return packed + struct.pack("!BBH", 0, protocol, length)


class Seen(NamedTuple):
    """What one frame says; fields that it has not are 0 or empty."""

    kind: int
    source_mac: str
    source: str = ""
    destination: str = ""
    protocol: int = 0
    source_port: int = 0
    port: int = 0
    flags: int = 0
    """TCP flags, ICMP type or ARP operation."""
    data: bytes = b""
    sequence: int = 0


def read(frame: bytes) -> Seen:
    (kind,) = struct.unpack_from("!H", frame, 12)
    sender = ":".join(f"{byte:02x}" for byte in frame[6:12])
    body = frame[14:]
    if kind == ARP:
        (operation,) = struct.unpack_from("!H", body, 6)
        source, target = (str(ipaddress.IPv4Address(body[at : at + 4])) for at in (14, 24))
        return Seen(kind, sender, source, target, flags=operation, data=body[8:14])
    if kind != IPV4:
        return Seen(kind, sender, data=body)
    (length,) = struct.unpack_from("!H", body, 2)
    source, destination = (str(ipaddress.IPv4Address(body[at : at + 4])) for at in (12, 16))
    protocol, payload = body[9], body[(body[0] & 15) * 4 : length]
    seen = Seen(kind, sender, source, destination, protocol, data=payload)
    if struct.unpack_from("!H", body, 6)[0] & 0x1FFF:
        return seen
    if protocol == ICMP:
        return seen._replace(flags=payload[0])
    if protocol == UDP:
        ports = struct.unpack_from("!HH", payload)
        return seen._replace(source_port=ports[0], port=ports[1], data=payload[8:])
    if protocol == TCP:
        source_port, port, sequence, _ack, offset, flags = struct.unpack_from("!HHIIBB", payload)
        return seen._replace(
            source_port=source_port, port=port, flags=flags, sequence=sequence, data=payload[(offset >> 4) * 4 :]
        )
    return seen
