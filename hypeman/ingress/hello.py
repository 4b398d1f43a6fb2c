"""Reads server name and ALPN protocols out of a TLS ClientHello that may come in any pieces. Pure.

Nothing is decided before the whole message is here: with post-quantum key shares it spans records and segments.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_HELLO = 32 << 10
"""Bytes of records."""
HANDSHAKE = 0x16
"""First byte of a TLS connection; no HTTP request begins with it."""
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_ALPN = 16


class Hello(NamedTuple):
    name: str
    """As sent; empty if there is none."""
    protocols: tuple[bytes, ...]
    """ALPN; empty if the client does not use it."""


class BadHello(Exception):
    """Not a ClientHello."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise BadHello("it ends early")
        self._at += count
        return self._data[self._at - count : self._at]

    def vector(self, width: int) -> bytes:
        """Bytes after their length, which has ``width`` bytes."""
        return self.take(int.from_bytes(self.take(width), "big"))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


def read_hello(data: bytes) -> Hello | None:
    """None if more bytes are needed. Raises BadHello."""
    message = _join(data)
    if message is None:
        if len(data) > MAX_HELLO:
            raise BadHello("it is too long")
        return None
    reader = _Reader(message)
    reader.take(2 + 32)  # version, random
    reader.vector(1)  # session
    reader.vector(2)  # cipher suites
    reader.vector(1)  # compression methods
    name, protocols = "", tuple[bytes, ...]()
    extensions = _Reader(reader.vector(2) if reader else b"")
    while extensions:
        kind = int.from_bytes(extensions.take(2), "big")
        body = _Reader(extensions.vector(2))
        if kind == _SERVER_NAME:
            name = _name(body)
        elif kind == _ALPN:
            protocols = _protocols(body)
    return Hello(name, protocols)


def _join(data: bytes) -> bytes | None:
    """The body of the handshake message that comes first, out of its records."""
    joined, at = b"", 0
    while at < len(data):
        if data[at] != HANDSHAKE or (at + 1 < len(data) and data[at + 1] != 3):
            raise BadHello("no TLS handshake")
        if at + 5 > len(data):
            return None
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        if not 0 < size <= 1 << 14:
            raise BadHello("a record of an impossible length")
        joined += data[at + 5 : at + 5 + size]
        if joined and joined[0] != _CLIENT_HELLO:
            raise BadHello("no ClientHello")
        if len(joined) >= 4 and len(joined) >= 4 + (length := int.from_bytes(joined[1:4], "big")):
            return joined[4 : 4 + length]
        at += 5 + size
    return None


def _name(body: _Reader) -> str:
    names = _Reader(body.vector(2))
    while names:
        kind, name = names.take(1), names.vector(2)
        if kind == b"\0":
            return name.decode("ascii", "replace")
    return ""


def _protocols(body: _Reader) -> tuple[bytes, ...]:
    found, listed = [], _Reader(body.vector(2))
    while listed:
        found.append(listed.vector(1))
    return tuple(found)
