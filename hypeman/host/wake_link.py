"""The TUN that addresses of instances in standby are routed to, and the way back to their TAPs.

    packet → routing → hm-wake ── read here, held ── inject ── the instance's TAP, once it is there

A packet that is read has passed all rules and translations; it is put on the TAP below them, as the frame that the
kernel would have sent. A packet that is written to the TUN comes in as if the instance had sent it, so replies to
held packets are translated back like any other. The TUN is persistent: while no server runs, packets are dropped
silently, and clients try again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from ipaddress import IPv4Address

import trio

from hypeman.host.files import HostError
from hypeman.host.types import WAKE_LINK

TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_ETHERTYPE_IPV4, _ETHERTYPE_ARP = 0x0800, 0x0806
_ARP_REQUEST, _ARP_REPLY = 1, 2
FIRST_WAIT, LONGEST_WAIT = 0.003, 0.05
"""Seconds between questions whether a guest sends; each wait is twice the one before."""
MAX_PACKET = 65536


class WakeLink:
    """An open ``hm-wake``. Its routes, switches and removal are those of ``Links``."""

    def __init__(self) -> None:
        """Create the TUN, or open the one of an earlier server. Raises HostError."""
        try:
            self._tun = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"{TUN_DEVICE} cannot be opened ({error.strerror}); load the tun module") from error
        try:
            fcntl.ioctl(self._tun, _TUNSETIFF, struct.pack("16sH22x", WAKE_LINK.encode(), _IFF_TUN | _IFF_NO_PI))
            fcntl.ioctl(self._tun, _TUNSETPERSIST, 1)
            self._out = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            os.close(self._tun)
            raise HostError(f"{WAKE_LINK} cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        """The link stays. A reader that waits gets ClosedResourceError."""
        trio.lowlevel.notify_closing(self._tun)
        os.close(self._tun)
        self._out.close()

    async def wait_packets(self, most: int) -> list[bytes]:
        """At least one packet, and up to ``most`` of those that are there."""
        await trio.lowlevel.wait_readable(self._tun)
        return self.read(most)

    def read(self, most: int) -> list[bytes]:
        """Up to ``most`` of the packets that are there. Does not block."""
        found: list[bytes] = []
        with contextlib.suppress(BlockingIOError, OSError):
            while len(found) < most:
                found.append(os.read(self._tun, MAX_PACKET))
        return found

    def inject(self, packet: bytes, *, tap: str, mac: str) -> None:
        """Send a packet on ``tap`` to ``mac``. If the queue is full it is lost, as any packet there."""
        with contextlib.suppress(OSError):
            self._out.sendto(packet, (tap, _ETHERTYPE_IPV4, 0, 0, _mac(mac)))

    def answer(self, packet: bytes) -> None:
        """Have a packet come in as if the instance that is its source had sent it."""
        with contextlib.suppress(OSError):
            os.write(self._tun, packet)


async def wait_sending(tap: str, *, address: str, mac: str, gateway: str, gateway_mac: str, seconds: float) -> bool:
    """Wait until the guest on ``tap`` answers an ARP request, at most ``seconds``; returns whether it did.

    A guest whose link has just come up receives packets a little before its kernel sends any, and what it answers
    until then is lost.
    """
    ours, theirs = _mac(gateway_mac), _mac(mac)
    asked, about = IPv4Address(address).packed, IPv4Address(gateway).packed
    kinds = struct.pack("!HHBBH", 1, _ETHERTYPE_IPV4, 6, 4, _ARP_REQUEST)
    request = theirs + ours + struct.pack("!H", _ETHERTYPE_ARP) + kinds + ours + about + bytes(6) + asked
    wanted = struct.pack("!H", _ARP_REPLY) + theirs + asked
    wait = FIRST_WAIT
    with (
        trio.socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE_ARP)) as channel,
        trio.move_on_after(seconds),
    ):
        await channel.bind((tap, _ETHERTYPE_ARP))
        while True:
            with contextlib.suppress(OSError):
                await channel.send(request)
            with trio.move_on_after(wait):
                while True:
                    frame = await channel.recv(128)
                    if frame[20:32] == wanted:
                        return True
            wait = min(wait * 2, LONGEST_WAIT)
    return False


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
