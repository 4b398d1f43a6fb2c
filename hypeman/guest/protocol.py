"""The host side of the guest protocol: bytes to events and calls to bytes, without I/O.

    greet ──▶ GREETING ──the guest's answer──▶ OPEN ──▶ frames of up to 128 sessions
                 │ everything before the answer is discarded: it is left over from an earlier connection

Twin of ``ext/guest_agent/protocol.h``, which defines the layout. Rules:

- A session begins with ``open`` and ends with the guest's Ended, or with ``close``; ids are never reused
  on a connection. That of a kept program ends with ``close`` or ``detach`` only.
- Each side may have WINDOW bytes in flight per session until the other grants more, so at most that is
  buffered per session, and a slow reader stalls only its own session.
- A guest that violates a rule causes a ProtocolError, and the connection is unusable from then on. A guest
  cannot make us allocate more than a frame and its windows.
"""

from __future__ import annotations

import enum
import hmac
import secrets
import struct
import zlib

import msgspec

from hypeman.guest.fields import Fields, FieldWriter, MalformedFields, Tag
from hypeman.guest.types import GuestEvent, parse_event

PROTOCOL_VERSION = 1
SYNC_MAGIC = b"HYPEMAN\x01"
ACK_MAGIC = b"HYPEMAN\x02"
MAX_PAYLOAD = 32768
WINDOW = 524288
MAX_SESSIONS = 128
MAX_REQUEST = 262144
KEY_BYTES = 16
MAIN_KEY = b"hypeman-program!"
"""Of the program of an idle instance: with its end the instance ends."""
KEPT_BYTES = 131072
MAX_STALE = 64 * 1024 * 1024
"""More leftover bytes than any queue between guest and host can hold."""

AGENT_PORT_NAME = "hypeman.agent"
"""Name of the virtio-serial port that the agent looks for."""
LOG_PORT_NAME = "hypeman.log"
"""Virtio-serial port for the program's output, if the VMM has one; otherwise it goes to the console."""
AGENT_VSOCK_PORT = 1024
"""Vsock port on which the agent dials the host (CID 2) if there is no such port."""

_HEADER = struct.Struct("<4sBBHI")
_TRAILER_BYTES = 4
_FLUSH = bytes(_HEADER.size + MAX_PAYLOAD + _TRAILER_BYTES)
_ACK = struct.Struct("<8s16s16sHHI")
_FLAG_MORE = 1
_FLAG_END = 2
_FLAG_STAYS = 4
_ACK_FLAG_NO_AGENT = 1
_ACK_FLAG_KEEPS = 2


class FrameType(enum.IntEnum):
    OPEN = 1
    DATA = 2
    STDERR = 3
    CREDIT = 4
    SIGNAL = 5
    RESIZE = 6
    CLOSE = 7
    EXIT = 8
    EVENT = 9
    EVENT_ACK = 10
    DETACH = 11
    RESUMED = 12


class Op(enum.IntEnum):
    """Operation of a session."""

    EXEC = 1
    STAT = 2
    COPY_TO = 3
    COPY_FROM = 4
    SHUTDOWN = 5
    CLOCK = 6
    IDENTITY = 7
    MOUNT = 8
    UNMOUNT = 9
    MEMORY = 10
    METRICS = 11
    FREEZE = 12
    THAW = 13
    PING = 14
    RESUME = 15
    WARM = 16


class ProtocolError(Exception):
    """The guest violated the protocol; its connection is unusable."""


class Greeted(msgspec.Struct, frozen=True):
    """The guest has answered and is authenticated; sessions may be opened."""

    no_agent: bool
    keeps: bool
    """The agent keeps programs whose connection is lost."""


class Data(msgspec.Struct, frozen=True):
    """Output or part of a reply. ``grant`` as many bytes once consumed."""

    session: int
    data: bytes
    stderr: bool


class Credit(msgspec.Struct, frozen=True):
    """More may be sent in a session."""

    session: int


class Resumed(msgspec.Struct, frozen=True):
    """A kept program continues in this session; its input may be sent from now on."""

    session: int
    received: int
    """Bytes of input that the guest has."""
    input_ended: bool
    output: int | None = None
    """Bytes of output before those that follow; None if the host said how many its client has."""
    tty: bool = False
    """Only if ``output`` is not None."""


class Ended(msgspec.Struct, frozen=True):
    """The last event of a session."""

    session: int
    exit_code: int
    signal: int
    timed_out: bool
    message: str


class Told(msgspec.Struct, frozen=True):
    """The guest reported an event (repeated after each greeting) and waits for ``acknowledge``."""

    kind: int
    event: GuestEvent | None


ProtocolEvent = Greeted | Data | Credit | Resumed | Ended | Told


class _Session:
    __slots__ = ("allowance", "awaits_resumption", "credit", "ended", "kept", "sent")

    def __init__(self, *, kept: bool, resumed: bool) -> None:
        self.kept = kept
        self.ended = False
        self.sent = 0
        """Bytes of input sent, ever."""
        self.awaits_resumption = resumed
        self.credit = 0 if resumed else WINDOW
        """Bytes that we may still send."""
        self.allowance = WINDOW
        """Bytes that the guest may still send."""


class Connection:
    """One connection with one guest. Synchronous, never blocks: output is fetched with ``data_to_send``."""

    def __init__(self, nonce: bytes, *, token: bytes | None = None) -> None:
        self._nonce = nonce
        self._token = token or _new_token()
        self._mark, self._trailer = self._token[:4], self._token[4:8]
        self._greeted = False
        self._stale = 0
        self._incoming = bytearray()
        self._outgoing: list[bytes] = [_FLUSH, _render_greeting(self._token)]
        self._sessions: dict[int, _Session] = {}
        self._next_session = 1

    @property
    def greeted(self) -> bool:
        return self._greeted

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    def data_to_send(self) -> bytes:
        """Remove and return all bytes queued for sending."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    # Calls of the host

    def open(self, op: Op, fields: FieldWriter | None = None, *, kept: bool = False) -> int:
        """Open a session and return its id. ValueError: request too large; RuntimeError: no free slot.

        ``kept``: its program outlives the connection; ``grant`` what its client has.
        """
        request = bytes((op,)) + (fields.render() if fields is not None else b"")
        if len(request) > MAX_REQUEST:
            raise ValueError(f"request of {len(request)} bytes; at most {MAX_REQUEST} are possible")
        if not self._greeted or len(self._sessions) >= MAX_SESSIONS:
            raise RuntimeError("no session can be opened now")
        session = self._next_session
        self._next_session += 1
        self._sessions[session] = _Session(kept=kept, resumed=op is Op.RESUME)
        for start in range(0, len(request), MAX_PAYLOAD):
            more = _FLAG_MORE if start + MAX_PAYLOAD < len(request) else 0
            self._send(FrameType.OPEN, more, session, request[start : start + MAX_PAYLOAD])
        return session

    def window(self, session: int) -> int:
        """Bytes that may be sent in the session now; 0 also for one that has ended."""
        state = self._sessions.get(session)
        return state.credit if state is not None else 0

    def taken(self, session: int) -> int:
        """Bytes of input that the program has read, ever."""
        state = self._sessions.get(session)
        return state.sent - (WINDOW - state.credit) if state is not None else 0

    def is_open(self, session: int) -> bool:
        state = self._sessions.get(session)
        return state is not None and not state.ended

    def send(self, session: int, data: bytes) -> None:
        """Send standard input or file data: at most ``window`` bytes."""
        state = self._sessions[session]
        if len(data) > state.credit:
            raise RuntimeError("more data than the window allows")
        state.credit -= len(data)
        state.sent += len(data)
        for start in range(0, len(data), MAX_PAYLOAD):
            self._send(FrameType.DATA, 0, session, data[start : start + MAX_PAYLOAD])

    def send_end(self, session: int) -> None:
        """Signal the end of data."""
        self._send(FrameType.DATA, _FLAG_END, session, b"")

    def grant(self, session: int, count: int) -> None:
        """``count`` received bytes were consumed; the guest may send as many more."""
        state = self._sessions.get(session)
        if state is not None and not state.ended:
            state.allowance += count
            self._send(FrameType.CREDIT, 0, session, count.to_bytes(4, "little"))

    def signal(self, session: int, number: int) -> None:
        self._send(FrameType.SIGNAL, 0, session, number.to_bytes(4, "little"))

    def resize(self, session: int, rows: int, cols: int) -> None:
        self._send(FrameType.RESIZE, 0, session, struct.pack("<HH", rows, cols))

    def close(self, session: int) -> None:
        """End a session from our side: what runs in it is killed. No-op if it has ended."""
        if self._sessions.pop(session, None) is not None:
            self._send(FrameType.CLOSE, 0, session, b"")

    def detach(self, session: int, *, stays: bool = False) -> None:
        """Leave a kept session, which can be resumed for a while; with ``stays`` the program of an idle instance, for
        as long as it runs. No-op if it was closed."""
        if self._sessions.pop(session, None) is not None:
            self._send(FrameType.DETACH, _FLAG_STAYS if stays else 0, session, b"")

    def acknowledge(self, received: Told) -> None:
        self._send(FrameType.EVENT_ACK, 0, 0, bytes((received.kind,)))

    # Input from the guest

    def receive(self, data: bytes) -> list[ProtocolEvent]:
        """Parse bytes from the guest into events, in order. Raises ProtocolError."""
        self._incoming += data
        events: list[ProtocolEvent] = []
        if not self._greeted:
            greeted = self._find_answer()
            if greeted is None:
                return events
            events.append(greeted)
        position = 0
        try:
            while (end := self._frame_end(position)) is not None:
                self._take_frame(position, end, events)
                position = end
        except MalformedFields as error:
            raise ProtocolError(f"malformed message of the guest: {error}") from error
        del self._incoming[:position]
        return events

    def _find_answer(self) -> Greeted | None:
        begin = self._incoming.find(ACK_MAGIC + self._token)
        if begin < 0:
            keep = min(len(self._incoming), _ACK.size)
            self._discard(len(self._incoming) - keep)
            return None
        self._discard(begin)
        if len(self._incoming) < _ACK.size:
            return None
        answer = bytes(self._incoming[: _ACK.size])
        _, _, nonce, version, flags, crc = _ACK.unpack(answer)
        if zlib.crc32(answer[:-4]) != crc:
            raise ProtocolError("the guest's answer is damaged")
        if not hmac.compare_digest(nonce, self._nonce):
            raise ProtocolError("the peer does not know the nonce of this boot")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"the guest speaks version {version} of the protocol, we speak {PROTOCOL_VERSION}")
        del self._incoming[: _ACK.size]
        self._greeted = True
        return Greeted(no_agent=bool(flags & _ACK_FLAG_NO_AGENT), keeps=bool(flags & _ACK_FLAG_KEEPS))

    def _discard(self, count: int) -> None:
        self._stale += count
        if self._stale > MAX_STALE:
            raise ProtocolError("the guest sends bytes without end and does not answer")
        del self._incoming[:count]

    def _frame_end(self, position: int) -> int | None:
        """Where the frame at ``position`` ends, if it is complete."""
        if len(self._incoming) - position < _HEADER.size:
            return None
        mark, _, _, length, _ = _HEADER.unpack_from(self._incoming, position)
        if mark != self._mark or length > MAX_PAYLOAD:
            raise ProtocolError("garbage where a frame should begin")
        end: int = position + _HEADER.size + length + _TRAILER_BYTES
        return end if end <= len(self._incoming) else None

    def _take_frame(self, position: int, end: int, events: list[ProtocolEvent]) -> None:
        _, kind, _, _, session = _HEADER.unpack_from(self._incoming, position)
        with memoryview(self._incoming) as view:
            payload = bytes(view[position + _HEADER.size : end - _TRAILER_BYTES])
            if view[end - _TRAILER_BYTES : end] != self._trailer:
                raise ProtocolError("a frame does not end as it should")
        if kind == FrameType.EVENT:
            event = parse_event(payload)
            events.append(Told(payload[0], event))
            return
        if session == 0 or session >= self._next_session:
            raise ProtocolError(f"frame of a session {session} that was never opened")
        state = self._sessions.get(session)
        if state is None:
            return  # closed by us meanwhile
        if state.ended:
            raise ProtocolError("a frame after the end of a session")
        match kind:
            case FrameType.DATA | FrameType.STDERR:
                if not payload:
                    raise ProtocolError("a frame without data")  # consumes no window: could repeat endlessly
                if len(payload) > state.allowance:
                    raise ProtocolError("the guest sends more than it was granted")
                state.allowance -= len(payload)
                events.append(Data(session, payload, kind == FrameType.STDERR))
            case FrameType.CREDIT:
                if len(payload) != 4:
                    raise ProtocolError("a grant of the wrong size")
                state.credit += int.from_bytes(payload, "little")
                if state.credit > WINDOW:
                    raise ProtocolError("the guest grants more than was used")
                events.append(Credit(session))
            case FrameType.RESUMED:
                fields = Fields(payload)
                waiting = fields.u32(Tag.WAITING)
                if not state.awaits_resumption or waiting > WINDOW:
                    raise ProtocolError("the guest resumes what was not to be resumed")
                state.awaits_resumption = False
                state.credit = WINDOW - waiting
                state.sent = fields.u64(Tag.RECEIVED)
                output = None if fields.get(Tag.SENT) is None else fields.u64(Tag.SENT)
                ended, tty = fields.flag(Tag.INPUT_ENDED), fields.flag(Tag.TTY)
                events.append(Resumed(session, state.sent, ended, output, tty))
            case FrameType.EXIT:
                fields = Fields(payload)
                state.ended = True
                if not state.kept:
                    del self._sessions[session]
                events.append(
                    Ended(
                        session,
                        exit_code=fields.u32(Tag.EXIT_CODE),
                        signal=fields.u32(Tag.SIGNAL),
                        timed_out=fields.flag(Tag.TIMED_OUT),
                        message=fields.text(Tag.MESSAGE),
                    )
                )
            case _:
                raise ProtocolError(f"frame of unknown type {kind}")

    def _send(self, kind: FrameType, flags: int, session: int, payload: bytes) -> None:
        header = _HEADER.pack(self._mark, kind, flags, len(payload), session)
        self._outgoing += (header, payload, self._trailer)


def _render_greeting(token: bytes) -> bytes:
    hello = SYNC_MAGIC + token
    return hello + zlib.crc32(hello).to_bytes(4, "little")


def _new_token() -> bytes:
    """Random, with a trailer that cannot be confused with the zero bytes of a greeting."""
    while True:
        token = secrets.token_bytes(16)
        if token[4:8] != bytes(4):
            return token
