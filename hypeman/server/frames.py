"""Frames of a WebSocket without extensions, as its server reads and writes them (RFC 6455 §5). Pure.

    bytes → Decoder → messages, whole and unmasked, and control frames, in their order
    payload → head_of → the bytes before it

A payload is unmasked once, from the bytes received into those that the application gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hypeman._native.wsmask import unmasked

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
NORMAL, PROTOCOL_ERROR, INVALID_TEXT, TOO_BIG = 1000, 1002, 1007, 1009
_CONTINUED = 0
_FINAL, _RESERVED, _OPCODE, _MASKED, _LENGTH = 0x80, 0x70, 0x0F, 0x80, 0x7F
_LARGEST_CONTROL = 125
_HEAD_OF_16_BITS, _HEAD_OF_64_BITS = 126, 127
_KEY = 4
_MAX_PARTS = 1024
"""Pieces of a message before they are put together: one of a byte takes 34 bytes of memory."""
_CODES = (range(1000, 1004), range(1007, 1015), range(3000, 5000))
"""Those that may be sent (§7.4)."""


class Violation(Exception):
    """The client broke the protocol; ``code`` is for the close frame (§7.4.1)."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Control(NamedTuple):
    """A CLOSE, PING or PONG frame."""

    kind: int
    payload: bytes


Received = str | bytes | Control
"""A TEXT or BINARY message, or a control frame."""


class _Head(NamedTuple):
    final: bool
    opcode: int
    length: int
    payload_at: int


class Decoder:
    """Gets bytes as they arrive, and holds at most one message of ``limit`` bytes that is not complete."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread = b""
        """The beginning of a frame's head, or of a control frame."""
        self._kind = _CONTINUED
        """Of the message that is not complete."""
        self._parts: list[bytes] = []
        self._size = 0
        """Bytes of the message that were announced."""
        self._final = False
        """The frame under way is the message's last."""
        self._left = 0
        """Bytes of its payload that have not arrived."""
        self._key = b""
        self._unmasked = 0
        """Bytes of it that have."""

    def feed(self, data: bytes) -> Iterator[Received]:
        """What ``data`` completes; take all of it before the next call. Raises Violation."""
        if self._unread:
            data, self._unread = self._unread + data, b""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                at = self._take_payload(data, at)
            else:
                head = self._read_head(data, at)
                if head is None or (head.opcode >= CLOSE and head.payload_at + head.length > end):
                    self._unread = data[at:]
                    return
                key, at = data[head.payload_at - _KEY : head.payload_at], head.payload_at
                if head.opcode >= CLOSE:
                    at += head.length
                    yield Control(head.opcode, unmasked(data, head.payload_at, at, key, 0))
                    continue
                self._begin(head, key)
            if not self._left and self._final:
                yield self._whole()

    def _read_head(self, data: bytes, at: int) -> _Head | None:
        """The head of the frame at ``at`` if all of it is there. Raises Violation."""
        if len(data) < at + 2:
            return None
        first, second = data[at], data[at + 1]
        opcode, length, final = first & _OPCODE, second & _LENGTH, bool(first & _FINAL)
        payload_at = at + 2 + _KEY
        control = opcode >= CLOSE
        if first & _RESERVED or not second & _MASKED or opcode not in (_CONTINUED, TEXT, BINARY, CLOSE, PING, PONG):
            raise Violation(PROTOCOL_ERROR)
        if control and (not final or length > _LARGEST_CONTROL):
            raise Violation(PROTOCOL_ERROR)
        if not control and (opcode == _CONTINUED) != (self._kind != _CONTINUED):
            raise Violation(PROTOCOL_ERROR)
        if length >= _HEAD_OF_16_BITS:
            size = 2 if length == _HEAD_OF_16_BITS else 8
            payload_at += size
            if len(data) < payload_at:
                return None
            length = int.from_bytes(data[at + 2 : at + 2 + size])
            if length < (_HEAD_OF_16_BITS if size == 2 else 2**16) or length >= 2**63:  # not in its shortest form
                raise Violation(PROTOCOL_ERROR)
        return _Head(final, opcode, length, payload_at) if len(data) >= payload_at else None

    def _begin(self, head: _Head, key: bytes) -> None:
        if head.opcode != _CONTINUED:
            self._kind, self._size = head.opcode, 0
        self._size += head.length
        if self._size > self._limit:
            raise Violation(TOO_BIG)
        self._final, self._left, self._key, self._unmasked = head.final, head.length, key, 0

    def _take_payload(self, data: bytes, at: int) -> int:
        """Take what is there of the payload under way; returns where it ends."""
        end = min(at + self._left, len(data))
        self._parts.append(unmasked(data, at, end, self._key, self._unmasked))
        if len(self._parts) == _MAX_PARTS:
            self._parts = [b"".join(self._parts)]
        self._left -= end - at
        self._unmasked += end - at
        return end

    def _whole(self) -> str | bytes:
        """The message, whose last frame has ended. Raises Violation."""
        whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        kind, self._kind, self._parts = self._kind, _CONTINUED, []
        try:
            return whole.decode("utf-8") if kind == TEXT else whole
        except UnicodeDecodeError:
            raise Violation(INVALID_TEXT) from None


def head_of(kind: int, length: int) -> bytes:
    """The head of a whole, unmasked frame with ``length`` bytes of payload."""
    if length < _HEAD_OF_16_BITS:
        return bytes((_FINAL | kind, length))
    if length < 2**16:
        return bytes((_FINAL | kind, _HEAD_OF_16_BITS)) + length.to_bytes(2)
    return bytes((_FINAL | kind, _HEAD_OF_64_BITS)) + length.to_bytes(8)


def close_answer(payload: bytes) -> bytes:
    """The payload of the close frame that answers one with ``payload`` (§5.5.1)."""
    if not payload:
        return b""
    code = int.from_bytes(payload[:2])
    if len(payload) == 1 or not any(code in codes for codes in _CODES):
        return PROTOCOL_ERROR.to_bytes(2)
    try:
        payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        return INVALID_TEXT.to_bytes(2)
    return payload
