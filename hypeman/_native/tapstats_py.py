"""Counters of all links in one netlink dump: Python twin of ``ext/tapstats.pyx``.

RTM_GETSTATS with a filter for IFLA_STATS_LINK_64 returns only the index and twenty-odd 64-bit
counters of each link, in large datagrams. Names are not included; the caller keeps track of
the indexes. Format: include/uapi/linux/if_link.h (if_stats_msg, rtnl_link_stats64).
"""

from __future__ import annotations

import os
import socket
import struct

_GET_STATS = 94
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_LINK_64 = 1
_RECEIVE = 1 << 16
_REQUEST = struct.pack("=IHHIIBxxxII", 28, _GET_STATS, _REQUEST_DUMP, 0, 0, socket.AF_UNSPEC, 0, 1 << (_LINK_64 - 1))
_STATS = struct.Struct("=4Q")  # rx_packets, tx_packets, rx_bytes, tx_bytes


class TapStats:
    """A socket reused across sweeps. Not thread-safe."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def close(self) -> None:
        self._socket.close()

    def sweep(self) -> list[tuple[int, int, int]]:
        """(index, bytes received, bytes sent) of every link, as the host counts them. Raises OSError."""
        self._socket.send(_REQUEST)
        found: list[tuple[int, int, int]] = []
        while not parse_stats(self._socket.recv(_RECEIVE), found):
            pass
        return found


def parse_stats(data: bytes, found: list[tuple[int, int, int]]) -> bool:
    """Append the contents of one datagram to ``found``; returns whether it was the last.

    Stops at the first malformed message or attribute. Raises OSError for kernel errors.
    """
    offset = 0
    while offset + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        if length < 16 or offset + length > len(data):
            return True
        if kind in (_DONE, _ERROR):  # both carry 0 or a negative errno
            code: int = struct.unpack_from("=i", data, offset + 16)[0] if length >= 20 else 0
            if -4096 < code < 0:
                raise OSError(-code, os.strerror(-code))
            return True
        if length >= 28:
            _parse_link(data, offset, offset + length, found)
        offset += (length + 3) & ~3
    return False


def _parse_link(data: bytes, offset: int, end: int, found: list[tuple[int, int, int]]) -> None:
    (index,) = struct.unpack_from("=I", data, offset + 20)
    offset += 28
    while offset + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > end:
            return
        if kind == _LINK_64 and length >= 4 + _STATS.size:
            _, _, received, sent = _STATS.unpack_from(data, offset + 4)
            found.append((index, received, sent))
        offset += (length + 3) & ~3
