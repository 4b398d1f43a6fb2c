"""Holds ports of the host for guests: a bound socket for each, so that no other program can take the port.

The kernel translates packets to a published port before it looks for sockets, where it can: IPv4, and coming in by an
interface that forwards. Sockets that can receive something else (``relayed``) are served by a relay.

    open      listening, with a filter that drops what the kernel should have translated: it came while the rules were
              flushed; connections survive that, new ones try again
    closed    bound only: a TCP connection to an instance without VM is refused

The holder of a port that cannot be bound is looked for in /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from hypeman.errors import InvalidRequest, PortInUse
from hypeman.host.files import HostError

_SO_ATTACH_FILTER = 26
_IP_FREEBIND = 15
_LOAD_INTERFACE = struct.pack("=HBBI", 0x20, 0, 0, 0xFFFFF000 + 8)  # BPF_LD | BPF_W | BPF_ABS of SKF_AD_IFINDEX
_KEEP = struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)  # BPF_RET | BPF_K, all bytes
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)
_MAX_INTERFACES = 250
"""A jump of the filter has 8 bits. Of more interfaces the rest is not filtered."""
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_BACKLOG = 128
_LISTEN = "0A"


class PortHold:
    """One held port of one address; closed at first."""

    def __init__(self, bound: socket.socket, *, relayed: bool) -> None:
        self.socket = bound
        self.relayed = relayed
        self._is_tcp = bound.type == socket.SOCK_STREAM
        self._is_open = False
        self._is_ipv6 = bound.family == socket.AF_INET6
        _attach_filter(bound, _DROP)

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def open(self, forwarding: Sequence[int] = ()) -> None:
        """Idempotent. ``forwarding``: indices of interfaces whose packets the kernel translates."""
        self._filter(forwarding)
        if self._is_open:
            return
        if self._is_tcp:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.listen(_BACKLOG if self.relayed else 0)
        self._is_open = True

    def close(self) -> None:
        """Idempotent; the port stays bound."""
        if not self._is_open:
            return
        _attach_filter(self.socket, _DROP)
        if self._is_tcp:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RD)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._is_open = False

    def release(self) -> None:
        self.socket.close()

    def _filter(self, forwarding: Sequence[int]) -> None:
        if not self.relayed:
            return
        _attach_filter(self.socket, _KEEP if self._is_ipv6 else render_filter(forwarding))


def hold_port(
    protocol: str, address: str, port: int, *, relayed: bool = False, absent: bool = False, shared: bool = False
) -> PortHold:
    """Bind ``port`` (0: a free one) of ``address``. Blocking if the port is in use.

    ``absent``: also if the host does not have the address at present. ``shared``: also if a socket of ours that is
    shared, too, has the port on one of the addresses. Raises PortInUse, which names the holder,
    InvalidRequest if this is not an address of the host, or HostError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    bound: socket.socket | None = None
    try:
        bound = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if absent:
            bound.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind == socket.SOCK_STREAM:  # not hindered by connections of a former server that linger in TIME_WAIT
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
        hold = PortHold(bound, relayed=relayed)
        hold.open()  # only a listening socket is in the way of all others
        hold.close()
        return hold
    except OSError as error:
        if bound is not None:
            bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"host port {port}/{protocol} is in use by {find_holder(protocol, port)}") from None
        if error.errno in _NO_FAMILY:
            raise InvalidRequest(f"{address} is not an address of this host", code="invalid_ports") from None
        raise HostError(f"host port {port}/{protocol} of {address} cannot be bound: {error.strerror}") from error


def find_holder(protocol: str, port: int, proc: Path = Path("/proc")) -> str:
    """``nginx (process 812)``, or "another program". Blocking: reads the descriptors of all processes."""
    inodes = {
        f"socket:[{fields[9]}]"
        for suffix in ("", "6")
        for fields in _table(proc / "net" / (protocol + suffix))
        if int(fields[1].rpartition(":")[2], 16) == port and (protocol == "udp" or fields[3] == _LISTEN)
    }
    for process in proc.iterdir() if inodes else ():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if any(_link(entry.path) in inodes for entry in os.scandir(process / "fd")):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return "another program"


def _table(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()[1:]]
    except OSError:
        return []


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def render_filter(interfaces: Sequence[int]) -> bytes:
    """A classic BPF program that drops packets that came in by one of ``interfaces``."""
    known = sorted(set(interfaces))[:_MAX_INTERFACES]
    tests = b"".join(
        struct.pack("=HBBI", 0x15, len(known) - number, 0, index)  # BPF_JMP | BPF_JEQ | BPF_K, to the end
        for number, index in enumerate(known)
    )
    return _LOAD_INTERFACE + tests + _KEEP + _DROP


def _attach_filter(receiver: socket.socket, instructions: bytes) -> None:
    program = ctypes.create_string_buffer(instructions, len(instructions))
    fprog = struct.pack("HP", len(instructions) // 8, ctypes.addressof(program))
    receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
