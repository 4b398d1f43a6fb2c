"""QEMU's machine protocol, sans-IO: bytes in, messages out; no socket, no clock.

    QEMU                          we
     │  Greeting                  │     once, first
     │ ◄───────── command(...)    │
     │  Returned or Refused       │     one for each command, with its id
     │  Happened                  │     any time in between

Every message is a JSON object on a line. The codec is strict, since a VMM's output may come from a guest
that has compromised it: a line that is too long, is not JSON or is none of the four is a QmpError, after
which the codec accepts no more data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

MAX_LINE = 1024 * 1024
"""Our longest answer, query-named-block-nodes of 24 disks, has about 30 KB."""


class QmpError(Exception):
    """The peer violated the QMP protocol."""


class Greeting(msgspec.Struct, frozen=True):
    version: str


class Returned(msgspec.Struct, frozen=True):
    id: int | None
    value: Any


class Refused(msgspec.Struct, frozen=True):
    id: int | None
    error_class: str
    description: str


class Happened(msgspec.Struct, frozen=True):
    name: str
    data: dict[str, Any]


Message = Greeting | Returned | Refused | Happened


class _Version(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _VersionInfo(msgspec.Struct):
    qemu: _Version


class _Hello(msgspec.Struct):
    version: _VersionInfo


class _Error(msgspec.Struct):
    description: str = msgspec.field(name="desc")
    error_class: str = msgspec.field(name="class", default="GenericError")


class _Line(msgspec.Struct):
    hello: _Hello | msgspec.UnsetType = msgspec.field(name="QMP", default=msgspec.UNSET)
    value: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Error | msgspec.UnsetType = msgspec.UNSET
    event: str | msgspec.UnsetType = msgspec.UNSET
    data: dict[str, Any] = {}
    id: int | None = None


_decoder = msgspec.json.Decoder(_Line)


class QmpCodec:
    """One connection's worth of bytes, cut anywhere, to messages."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._buffer = bytearray()
        self._max_line = max_line
        self._greeted = False
        self._broken = False

    def receive_data(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes. Raises QmpError; then the codec is unusable."""
        if self._broken:
            raise QmpError("this connection broke before")
        self._buffer += data
        try:
            *lines, rest = self._buffer.split(b"\n")
            if any(len(line) > self._max_line for line in (*lines, rest)):
                raise QmpError(f"a line of more than {self._max_line} bytes")
            messages = [self._message(bytes(line)) for line in lines]
        except QmpError:
            self._broken = True
            self._buffer.clear()
            raise
        self._buffer = rest
        return messages

    def _message(self, text: bytes) -> Message:
        try:
            line = _decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise QmpError(f"no QMP message: {error}: {text[:100]!r}") from None
        parts = (line.hello, line.value, line.error, line.event)
        if sum(part is not msgspec.UNSET for part in parts) != 1:
            raise QmpError(f"no QMP message: {text[:100]!r}")
        if (line.hello is not msgspec.UNSET) == self._greeted:
            raise QmpError("a second greeting" if self._greeted else f"no greeting but {text[:100]!r}")
        if line.hello is not msgspec.UNSET:
            self._greeted = True
            version = line.hello.version.qemu
            return Greeting(f"{version.major}.{version.minor}.{version.micro}")
        if line.event is not msgspec.UNSET:
            return Happened(line.event, line.data)
        if line.error is not msgspec.UNSET:
            return Refused(line.id, line.error.error_class, line.error.description)
        return Returned(line.id, line.value)


def command(name: str, arguments: Mapping[str, Any] | None = None, *, number: int) -> bytes:
    """One command as bytes for the wire; its answer will carry ``number`` as id."""
    body: dict[str, Any] = {"execute": name, "id": number}
    if arguments:
        body["arguments"] = arguments
    return msgspec.json.encode(body) + b"\n"
