"""Fields: the encoding of requests, replies, events and the boot disk.

u16 tag, u32 length, value, concatenated, little endian. Text has a trailing NUL included in its
length, so that the guest's C can read it in place. The tags are those of
``ext/guest_agent/protocol.h``; the golden files in ``tests/golden/guest`` check both for the same bytes.

Input from a guest is untrusted: readers are strict and raise MalformedFields.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from hypeman.errors import InvalidRequest

_HEADER = struct.Struct("<HI")


class Tag(enum.IntEnum):
    """All tags; the numbers are part of the protocol."""

    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    TTY = 5
    ROWS = 6
    COLS = 7
    TIMEOUT_MS = 8
    SESSION_KEY = 9
    PATH = 10
    FOLLOW_LINKS = 11
    KIND = 12
    MODE = 13
    UID = 14
    GID = 15
    SIZE = 16
    MTIME = 17
    LINK_TARGET = 18
    EXISTS = 19
    INSTANCE_ID = 20
    HOSTNAME = 21
    NONCE = 22
    MACHINE_ID = 23
    ENTROPY = 24
    CLOCK_NS = 25
    CLOCK_DELTA_NS = 26
    MAC = 30
    ADDRESS = 31
    PREFIX = 32
    GATEWAY = 33
    DNS = 34
    MTU = 35
    VOLUME = 40
    DISK_ID = 41
    READONLY = 42
    FS_TYPE = 43
    OVERLAY_DISK_ID = 44
    VOLUME_DIR = 45
    FILES = 46
    CA = 50
    CA_PEM = 51
    CA_HASH = 52
    STOP_SIGNAL = 60
    GRACE_MS = 61
    SKIP_AGENT = 62
    CONSOLE = 63
    POWER_OFF_BY_RESET = 64
    DISK_ORDER = 65
    ROOT_FS = 66
    OVERLAY = 67
    PID1 = 68
    SHM_BYTES = 69
    PHASE = 70
    PHASE_NAME = 71
    PHASE_MS = 72
    EXIT_CODE = 73
    SIGNAL = 74
    OOM = 75
    MESSAGE = 76
    TIMED_OUT = 77
    MEMORY_TOTAL = 80
    MEMORY_AVAILABLE = 81
    LOAD_1 = 82
    LOAD_5 = 83
    LOAD_15 = 84
    UPTIME_MS = 85
    PROCESSES = 86
    HOLDER = 87
    SYSCTL = 88
    ULIMIT = 89
    IDLE = 90
    RECEIVED = 91
    WAITING = 92
    INPUT_ENDED = 93
    SENT = 94


def _word(tag: Tag) -> str:
    return tag.name.lower().replace("_", " ")


class MalformedFields(ValueError):
    """Bytes that are not fields, or a field whose value is not of its type."""


class FieldWriter:
    """Collects fields; each method returns the writer for chaining.

    Values come from user requests: one that cannot be sent raises InvalidRequest, which names it.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, tag: Tag, value: bytes) -> FieldWriter:
        self._parts.append(_HEADER.pack(tag, len(value)) + value)
        return self

    def text(self, tag: Tag, value: str) -> FieldWriter:
        try:
            encoded = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{_word(tag)} is not text: {error}") from error
        if b"\0" in encoded:
            raise InvalidRequest(f"{_word(tag)} contains a NUL character, which no program could take")
        return self.add(tag, encoded + b"\0")

    def flag(self, tag: Tag, value: bool) -> FieldWriter:
        return self.add(tag, b"\1" if value else b"\0")

    def u8(self, tag: Tag, value: int) -> FieldWriter:
        return self._integer(tag, value, 1)

    def u16(self, tag: Tag, value: int) -> FieldWriter:
        return self._integer(tag, value, 2)

    def u32(self, tag: Tag, value: int) -> FieldWriter:
        return self._integer(tag, value, 4)

    def u64(self, tag: Tag, value: int) -> FieldWriter:
        return self._integer(tag, value, 8)

    def i64(self, tag: Tag, value: int) -> FieldWriter:
        return self._integer(tag, value, 8, signed=True)

    def _integer(self, tag: Tag, value: int, size: int, *, signed: bool = False) -> FieldWriter:
        try:
            return self.add(tag, value.to_bytes(size, "little", signed=signed))
        except OverflowError:
            raise InvalidRequest(f"{_word(tag)} {value} is out of range") from None

    def nested(self, tag: Tag, fields: FieldWriter) -> FieldWriter:
        return self.add(tag, fields.render())

    def render(self) -> bytes:
        return b"".join(self._parts)


def parse_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and value of each field; the caller skips or rejects unknown tags."""
    position, end = 0, len(data)
    while position < end:
        if end - position < _HEADER.size:
            raise MalformedFields("a field's header is cut")
        tag, length = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if length > end - position:
            raise MalformedFields("a field is longer than what holds it")
        yield tag, data[position : position + length]
        position += length


class Fields:
    """The fields of one message by tag, with typed access. The last of repeated ones wins, except for ``all``."""

    def __init__(self, data: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        for tag, value in parse_fields(data):
            self._values.setdefault(tag, []).append(value)

    def all(self, tag: Tag) -> list[bytes]:
        return self._values.get(tag, [])

    def get(self, tag: Tag) -> bytes | None:
        values = self._values.get(tag)
        return values[-1] if values else None

    def text(self, tag: Tag, default: str = "") -> str:
        value = self.get(tag)
        return default if value is None else parse_text(value)

    def texts(self, tag: Tag) -> list[str]:
        return [parse_text(value) for value in self.all(tag)]

    def flag(self, tag: Tag, default: bool = False) -> bool:
        return self._integer(tag, int(default), 1, signed=False) != 0

    def u8(self, tag: Tag, default: int = 0) -> int:
        return self._integer(tag, default, 1, signed=False)

    def u32(self, tag: Tag, default: int = 0) -> int:
        return self._integer(tag, default, 4, signed=False)

    def u64(self, tag: Tag, default: int = 0) -> int:
        return self._integer(tag, default, 8, signed=False)

    def i64(self, tag: Tag, default: int = 0) -> int:
        return self._integer(tag, default, 8, signed=True)

    def _integer(self, tag: Tag, default: int, size: int, *, signed: bool) -> int:
        value = self.get(tag)
        if value is None:
            return default
        if len(value) != size:
            raise MalformedFields(f"{tag.name.lower()} has {len(value)} bytes, not {size}")
        return int.from_bytes(value, "little", signed=signed)


def parse_text(value: bytes) -> str:
    """Text from a guest; bytes that are not UTF-8 (file names) become surrogates."""
    if not value.endswith(b"\0") or value.find(b"\0") != len(value) - 1:
        raise MalformedFields("text without its NUL, or with one inside")
    return value[:-1].decode("utf-8", "surrogateescape")
