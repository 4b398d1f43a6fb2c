"""A minimal netlink client: requests, acknowledgements and notifications.

Own code and not pyroute2, because the messages are few and fixed, and attach is on the path of every
create and restore: pyroute2 takes 0.3 s and some 30 MB to import and about 1 ms a request (asyncio
inside); these lines take 0.02 ms a request, and a batch of ten is one system call.
``tests/bench/bench_network.py`` has the comparison.

    Message    type, flags and body, as data: what to ask is decided by pure functions
    Netlink    a socket that sends a batch and checks the kernel's answer to each message
    Monitor    a socket that listens to multicast groups, for Trio

Formats: netlink(7), rtnetlink(7), include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import trio

from hypeman.host.files import HostError

T = TypeVar("T")

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

REQUEST, ACK = 0x1, 0x4
ROOT, MATCH = 0x100, 0x200
DUMP = ROOT | MATCH
REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400

_ERROR, _DONE = 2, 3
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _EXT_ACK, _GET_STRICT_CHK = 1, 11, 12
_INTERRUPTED, _CAPPED, _ACK_TLVS = 0x10, 0x100, 0x200
_MESSAGE_TEXT = 1
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 20
_SO_SNDBUFFORCE = 32
_SEND = 4 << 20
"""A batch is one datagram. One change of 1,000 published ports has 0.3 MB."""


class NetlinkError(HostError):
    """The kernel refused a message with error ``errno``."""

    def __init__(self, what: str, number: int, text: str = "") -> None:
        reason = os.strerror(number) + (f" ({text})" if text else "")
        super().__init__(f"{what}: {reason}")
        self.errno = number


class Message(NamedTuple):
    """One request. ``what`` is human-readable and starts the error message."""

    type: int
    flags: int
    body: bytes
    what: str
    tolerated: tuple[int, ...] = ()
    """Error numbers that mean "already done"."""


class Packet(NamedTuple):
    """One received message."""

    type: int
    flags: int
    sequence: int
    port: int
    """Port of the requesting socket; 0 for messages the kernel sends unasked."""
    body: bytes


def attr(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attr(kind | _NESTED, b"".join(parts))


def text(kind: int, value: str) -> bytes:
    return attr(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("=I", value))


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each attribute from ``offset`` on; stops at the first malformed one."""
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def packets(data: bytes) -> Iterator[Packet]:
    """The messages of one datagram; stops at the first malformed one."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, port = _HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            return
        yield Packet(kind, flags, sequence, port, data[offset + 16 : offset + length])
        offset += (length + 3) & ~3


class Netlink:
    """A request socket. Blocking (requests take microseconds to milliseconds): call it in a worker
    thread. Its lock lets any thread use it, one batch at a time."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        with contextlib.suppress(PermissionError):  # needed for transactions of thousands of elements only
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)
        self.port: int = self._socket.getsockname()[0]
        self._sequence = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def run(self, messages: Sequence[Message]) -> None:
        """Send all in one go. The kernel carries out every message even if one before it failed;
        raises NetlinkError for the first that was refused with an error it does not tolerate."""
        with self._lock:
            for group in _groups(messages):
                self._run_group(group)

    def run_transaction(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """Like ``run``, framed by a batch's begin and end: all of it happens or nothing."""
        with self._lock:
            self._run_group(messages, begin, end)

    def dump(self, message: Message) -> list[Packet]:
        """All answers to a dump request. Raises NetlinkError."""
        with self._lock:
            for _ in range(3):  # the kernel flags a dump that something changed under: ask again
                found, interrupted = self._dump_once(message)
                if not interrupted:
                    break
            return found

    def _dump_once(self, message: Message) -> tuple[list[Packet], bool]:
        self._sequence += 1
        self._socket.send(_framed(message, self._sequence, REQUEST | DUMP))
        found: list[Packet] = []
        interrupted = False
        while True:
            for packet in packets(self._socket.recv(_RECEIVE)):
                interrupted = interrupted or bool(packet.flags & _INTERRUPTED)
                if packet.type not in (_DONE, _ERROR):
                    found.append(packet)
                    continue
                number, reason = _error(packet)
                if number:
                    raise NetlinkError(message.what, number, reason)
                return found, interrupted

    def _run_group(self, messages: Sequence[Message], begin: Message | None = None, end: Message | None = None) -> None:
        opening = self._sequence + 1
        first = opening + 1
        self._sequence = first + len(messages)
        self._socket.send(
            (_framed(begin, opening, REQUEST) if begin else b"")
            + b"".join(_framed(message, first + i, REQUEST | ACK) for i, message in enumerate(messages))
            + (_framed(end, self._sequence, REQUEST) if end else b"")
        )
        failure: NetlinkError | None = None
        waiting = len(messages)
        while waiting > 0:
            for packet in packets(self._socket.recv(_RECEIVE)):
                if packet.type != _ERROR or packet.sequence < opening:  # older: left over from a refused batch
                    continue
                number, reason = _error(packet)
                if packet.sequence == opening and number:
                    raise NetlinkError("netlink batch", number, reason)
                waiting -= 1
                message = messages[packet.sequence - first]
                if number and number not in message.tolerated and failure is None:
                    failure = NetlinkError(message.what, number, reason)
        if failure is not None:
            raise failure


class Monitor:
    """Notifications of multicast groups. Changes come in bursts (flushing rules sends a notification for
    each of them), so those within ``settle`` seconds are returned together."""

    def __init__(self, protocol: int, groups: Iterable[int], *, settle: float = 0.05) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._settle = settle

    def close(self) -> None:
        self._socket.close()

    async def receive(self, meaning: Callable[[Packet], T | None], lost: T) -> set[T]:
        """Wait for packets that mean something, and return all that they and those right behind them mean.

        ``lost`` is among it when the kernel had to drop some: recheck everything.
        """
        meanings: set[T] = set()
        while not meanings:
            await trio.lowlevel.wait_readable(self._socket)
            self._drain(meaning, lost, meanings)
        await trio.sleep(self._settle)
        self._drain(meaning, lost, meanings)
        return meanings

    def _drain(self, meaning: Callable[[Packet], T | None], lost: T, meanings: set[T]) -> None:
        while True:
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                meanings.add(lost)
                continue
            meanings.update(found for packet in packets(data) if (found := meaning(packet)) is not None)


def _framed(message: Message, sequence: int, flags: int) -> bytes:
    length = 16 + len(message.body)
    header = _HEADER.pack(length, message.type, message.flags | flags, sequence, 0)
    return header + message.body + b"\0" * (-length % 4)


def _groups(messages: Sequence[Message], size: int = 64) -> Iterator[Sequence[Message]]:
    """Parts whose acknowledgements fit the receive buffer."""
    for start in range(0, len(messages), size):
        yield messages[start : start + size]


def _error(packet: Packet) -> tuple[int, str]:
    """(errno, the kernel's own words) of an error or the end of a dump; (0, "") where all is well.

    An error quotes the request (whole or its header) between code and words, the end of a dump does not.
    """
    (code,) = struct.unpack_from("=i", packet.body)
    if not packet.flags & _ACK_TLVS:
        return -code, ""
    offset = 4
    if packet.type == _ERROR:
        (length,) = struct.unpack_from("=I", packet.body, 4)
        offset = 20 if packet.flags & _CAPPED else 4 + ((length + 3) & ~3)
    words = (value for kind, value in attributes(packet.body, offset) if kind == _MESSAGE_TEXT)
    return -code, next(words, b"").rstrip(b"\0").decode(errors="replace")
