"""The sans-IO protocol alone: golden conversations, every cut, everything a hostile guest can send."""

from __future__ import annotations

import contextlib
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman.guest.fields import FieldWriter, Tag
from hypeman.guest.protocol import (
    ACK_MAGIC,
    MAX_PAYLOAD,
    MAX_SESSIONS,
    MAX_STALE,
    WINDOW,
    Connection,
    Credit,
    Data,
    Ended,
    FrameType,
    Greeted,
    Op,
    ProtocolError,
    ProtocolEvent,
    Told,
)
from hypeman.guest.types import Ready

from . import golden

TOKEN, NONCE = golden.TOKEN, golden.NONCE


def answer(token: bytes = TOKEN, nonce: bytes = NONCE, version: int = 1, flags: int = 0) -> bytes:
    body = ACK_MAGIC + token + nonce + struct.pack("<HH", version, flags)
    return body + zlib.crc32(body).to_bytes(4, "little")


def frame(kind: int, session: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("<4sBBHI", TOKEN[:4], kind, flags, len(payload), session) + payload + TOKEN[4:8]


def greeted() -> Connection:
    connection = Connection(NONCE, token=TOKEN)
    connection.data_to_send()
    assert connection.receive(answer()) == [Greeted(no_agent=False, keeps=False)]
    return connection


@pytest.mark.parametrize("name", golden.names())
def test_golden_conversations_from_the_hosts_side(name: str) -> None:
    """All that the guest says is understood, wherever the bytes are cut in two."""
    output = [data for direction, data in golden.read(golden.DIRECTORY / f"{name}.txt") if direction == "<"]
    stream = b"".join(output)

    def understand(*pieces: bytes) -> list[ProtocolEvent]:
        connection = Connection(NONCE, token=TOKEN)
        events: list[ProtocolEvent] = []
        opened = False
        for piece in pieces:
            events += connection.receive(piece)
            if connection.greeted and not opened:
                opened = True
                for _ in range(8):
                    connection.open(Op.STAT)
        return events

    ack = len(output[0])
    whole = understand(stream[:ack], stream[ack:])
    assert isinstance(whole[0], Greeted)
    for cut in range(ack, len(stream)):
        assert understand(stream[:ack], stream[ack:cut], stream[cut:]) == whole
    for cut in range(ack):
        assert understand(stream[:cut], stream[cut:ack], stream[ack:]) == whole


def test_a_request_is_cut_into_frames_and_a_giant_one_refused() -> None:
    connection = greeted()
    connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "x" * 100_000))
    sent = connection.data_to_send()
    lengths = []
    while sent:
        _, kind, flags, length, session = struct.unpack_from("<4sBBHI", sent)
        assert (kind, session) == (FrameType.OPEN, 1)
        lengths.append((length, flags))
        sent = sent[12 + length + 4 :]
    assert [flags for _, flags in lengths] == [1, 1, 1, 0]
    assert max(length for length, _ in lengths) == MAX_PAYLOAD
    with pytest.raises(ValueError, match="at most"):
        connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "x" * 300_000))


def test_stale_bytes_are_thrown_away_but_not_for_ever() -> None:
    connection = Connection(NONCE, token=TOKEN)
    stale = answer(token=b"an older token..") + frame(FrameType.DATA, 3, b"old") * 1000
    assert connection.receive(stale) == []
    assert connection.receive(stale[:7] + answer()) == [Greeted(no_agent=False, keeps=False)]
    endless = Connection(NONCE, token=TOKEN)
    with pytest.raises(ProtocolError, match="without end"):
        for _ in range(MAX_STALE // 1_000_000 + 2):
            endless.receive(bytes(1_000_000))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (answer(nonce=bytes(16)), "nonce"),
        (answer(version=2), "version"),
        (answer()[:-1] + b"\0", "damaged"),
    ],
)
def test_a_wrong_answer_is_refused(bad: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Connection(NONCE, token=TOKEN).receive(bad)


@pytest.mark.parametrize(
    "bad",
    [
        b"garbage, more than a header",
        frame(FrameType.DATA, 1)[:-1] + b"?",
        frame(FrameType.DATA, 99, b"x"),
        frame(FrameType.DATA, 0, b"x"),
        frame(77, 1),
        frame(FrameType.OPEN, 1),
        frame(FrameType.CREDIT, 1, b"\1\0\0"),
        frame(FrameType.CREDIT, 1, b"\1\0\0\0"),
        frame(FrameType.EXIT, 1, b"\1"),
        frame(FrameType.EVENT, 0),
        frame(FrameType.EVENT, 0, b"\1" + FieldWriter().add(Tag.PHASE, b"xx").render()),
        struct.pack("<4sBBHI", TOKEN[:4], FrameType.DATA, 0, MAX_PAYLOAD + 1, 1),
        frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD)) * (WINDOW // MAX_PAYLOAD) + frame(FrameType.DATA, 1, b"x"),
    ],
)
def test_a_guest_that_breaks_a_rule_is_found_out(bad: bytes) -> None:
    connection = greeted()
    connection.open(Op.STAT)
    with pytest.raises(ProtocolError):
        connection.receive(bad)


def test_frames_of_a_session_that_we_closed_are_skipped() -> None:
    connection = greeted()
    session = connection.open(Op.EXEC)
    connection.close(session)
    connection.close(session)
    late = frame(FrameType.DATA, session, b"x") + frame(FrameType.EXIT, session)
    assert connection.receive(late) == []
    assert connection.session_count == 0


def test_windows_in_both_directions() -> None:
    connection = greeted()
    session = connection.open(Op.EXEC)
    connection.send(session, bytes(WINDOW))
    assert connection.window(session) == 0
    with pytest.raises(RuntimeError):
        connection.send(session, b"x")
    assert connection.receive(frame(FrameType.CREDIT, session, (1000).to_bytes(4, "little"))) == [Credit(session)]
    assert connection.window(session) == 1000
    full = frame(FrameType.DATA, session, bytes(MAX_PAYLOAD)) * (WINDOW // MAX_PAYLOAD)
    assert sum(len(event.data) for event in connection.receive(full) if isinstance(event, Data)) == WINDOW
    connection.grant(session, 5)
    assert connection.receive(frame(FrameType.STDERR, session, b"12345")) == [Data(session, b"12345", True)]


@pytest.mark.parametrize("kind", [FrameType.DATA, FrameType.STDERR])
@pytest.mark.parametrize("flags", [0, 2])
def test_frames_without_data_are_refused(kind: FrameType, flags: int) -> None:
    """They use up no allowance, so a guest could send them without end."""
    connection = greeted()
    session = connection.open(Op.EXEC)
    with pytest.raises(ProtocolError, match="without data"):
        connection.receive(frame(kind, session, b"", flags))


def test_sessions_are_bounded_and_end() -> None:
    connection = greeted()
    for _ in range(MAX_SESSIONS):
        connection.open(Op.EXEC)
    with pytest.raises(RuntimeError):
        connection.open(Op.EXEC)
    ended = FieldWriter().u32(Tag.EXIT_CODE, 137).u32(Tag.SIGNAL, 9).flag(Tag.TIMED_OUT, False).text(Tag.MESSAGE, "m")
    assert connection.receive(frame(FrameType.EXIT, 5, ended.render())) == [Ended(5, 137, 9, False, "m")]
    assert connection.open(Op.EXEC) == MAX_SESSIONS + 1


def test_events_are_acknowledged() -> None:
    connection = greeted()
    connection.data_to_send()
    [reported] = connection.receive(frame(FrameType.EVENT, 0, b"\1"))
    assert reported == Told(1, Ready({}))
    assert isinstance(reported, Told)
    connection.acknowledge(reported)
    assert connection.data_to_send() == frame(FrameType.EVENT_ACK, 0, b"\1")
    [unknown] = connection.receive(frame(FrameType.EVENT, 0, b"\x63"))
    assert unknown == Told(0x63, None)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=10), st.booleans())
def test_any_bytes_give_events_or_a_protocol_error(pieces: list[bytes], valid_head: bool) -> None:
    connection = greeted()
    connection.open(Op.EXEC)
    try:
        for piece in pieces:
            connection.receive((TOKEN[:4] if valid_head else b"") + piece)
    except ProtocolError:
        pass


@given(st.integers(0, 255), st.integers(0, 3), st.binary(max_size=100))
def test_any_wellformed_frame_gives_events_or_a_protocol_error(kind: int, session: int, payload: bytes) -> None:
    connection = greeted()
    connection.open(Op.EXEC)
    with contextlib.suppress(ProtocolError):
        connection.receive(frame(kind, session, payload))
