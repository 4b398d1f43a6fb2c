"""The real agent against raw bytes: golden conversations, every cut, garbage, floods, broken rules."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypeman.guest.fields import FieldWriter, Tag
from hypeman.guest.protocol import (
    MAX_PAYLOAD,
    MAX_SESSIONS,
    WINDOW,
    Connection,
    Data,
    Ended,
    FrameType,
    Op,
    ProtocolEvent,
)

from . import golden
from .conftest import Agent

FLUSH = bytes(12 + MAX_PAYLOAD + 4)
SECONDS = 20


def receive(agent: Agent, length: int) -> bytes:
    """Exactly ``length`` bytes of the agent, or what came before it fell silent."""
    data = b""
    while len(data) < length and select.select([agent.socket], [], [], SECONDS)[0]:
        chunk = agent.socket.recv(length - len(data))
        if not chunk:
            break
        data += chunk
    return data


class Host:
    """A connection on the agent's socket, driven by hand."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.connection = Connection(golden.NONCE)
        self.flush()
        self.wait(lambda events: self.connection.greeted)

    def flush(self) -> None:
        """Sends, and keeps reading meanwhile as a host always does."""
        data = memoryview(self.connection.data_to_send())
        while data:
            data = data[self.agent.socket.send(data) :]

    def events(self, timeout: float = 0.0) -> list[ProtocolEvent]:
        if not select.select([self.agent.socket], [], [], timeout)[0]:
            return []
        return self.connection.receive(self.agent.socket.recv(262144))

    def wait(self, condition: object) -> list[ProtocolEvent]:
        """All events until the condition holds for them."""
        assert callable(condition)
        got: list[ProtocolEvent] = []
        deadline = time.monotonic() + SECONDS
        while not condition(got):
            assert time.monotonic() < deadline, "the agent fell silent"
            got += self.events(0.1)
        return got

    def check(self) -> None:
        """The agent still does what it is asked for."""
        session = self.connection.open(Op.STAT, FieldWriter().text(Tag.PATH, "/"))
        self.flush()
        self.wait(lambda events: any(isinstance(event, Ended) and event.session == session for event in events))

    def send_raw(self, data: bytes) -> None:
        self.agent.socket.sendall(data)

    def frame(self, kind: int, session: int, payload: bytes = b"", flags: int = 0) -> bytes:
        self.connection._send(kind, flags, session, payload)  # type: ignore[arg-type]
        return self.connection.data_to_send()


@pytest.fixture
def host(agent: Agent) -> Iterator[Host]:
    yield Host(agent)


@pytest.mark.parametrize("name", golden.names())
def test_golden_conversations_from_the_guests_side(agent: Agent, name: str) -> None:
    """The agent says these bytes and no others. A host's pause is where it waits for what stands next."""
    agent.socket.sendall(FLUSH)
    expected = b""
    for direction, data in golden.read(golden.DIRECTORY / f"{name}.txt"):
        if direction == "<":
            expected += data
            continue
        assert receive(agent, len(expected)) == expected
        expected = b""
        agent.socket.sendall(data)
    assert receive(agent, len(expected)) == expected
    assert not select.select([agent.socket], [], [], 0.05)[0], "nothing more is said"


@pytest.mark.parametrize("name", ["copy_to", "exec_env_in_two_frames", "stat_missing"])
def test_every_cut(agent: Agent, name: str) -> None:
    """The host's bytes cut in two at every place; each time a new greeting on the same wire."""
    lines = list(golden.read(golden.DIRECTORY / f"{name}.txt"))
    sent = b"".join(data for direction, data in lines if direction == ">")
    expected = b"".join(data for direction, data in lines if direction == "<")
    for cut in range(1, len(sent)):
        agent.socket.sendall(FLUSH + sent[:cut])
        select.select([agent.socket], [], [], 0.002)  # let the first piece be taken alone
        agent.socket.sendall(sent[cut:])
        assert receive(agent, len(expected)) == expected, f"cut at {cut}"


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 13, 200, 211, 215])
def test_a_new_host_is_recognised_in_the_middle_of_an_old_frame(agent: Agent, cut: int) -> None:
    """As after a host's death on a virtio-serial port: the beginning of a frame, then the greeting of another host."""
    first = Host(agent)
    first.check()
    whole = first.frame(FrameType.DATA, 1, b"x" * 200)
    agent.socket.sendall(whole[:cut])
    Host(agent).check()


def test_a_greeting_ends_what_an_earlier_host_began(agent: Agent, host: Host, tmp_path: Path) -> None:
    before = agent.descriptors
    for _ in range(5):
        host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "sleep").text(Tag.ARG, "1000"))
    host.flush()
    host.check()
    assert agent.descriptors > before
    again = Host(agent)
    again.check()
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
    deadline = time.monotonic() + SECONDS
    while children.read_text().strip() and time.monotonic() < deadline:
        again.check()
    assert not children.read_text().strip()
    assert agent.descriptors == before


def test_garbage_is_survived(agent: Agent) -> None:
    """Random bytes, alone and behind a valid greeting; the seed is in the message."""
    for seed in range(30):
        rng = random.Random(seed)
        host = Host(agent)
        host.send_raw(rng.randbytes(rng.randrange(1, 100_000)))
        Host(agent).check()
        assert agent.process.poll() is None, f"seed {seed}"


def test_damaged_frames_are_survived(agent: Agent) -> None:
    """Frames that are right but for one byte, at every place of the header and the fields."""
    fields = FieldWriter().text(Tag.ARG, "/bin/true").text(Tag.ENV, "A=b").flag(Tag.TTY, False)
    for place in range(16 + 1 + len(fields.render())):
        host = Host(agent)
        host.connection.open(Op.EXEC, fields)
        data = bytearray(host.connection.data_to_send())
        data[place] ^= 0x41
        host.send_raw(bytes(data))
        Host(agent).check()
    assert agent.process.poll() is None


def test_any_frame_of_any_type_is_survived(agent: Agent) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        host = Host(agent)
        host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "cat"))
        frames = b"".join(
            host.frame(
                rng.randrange(0, 14), rng.randrange(0, 4), rng.randbytes(rng.choice([0, 1, 2, 4, 40])), rng.randrange(4)
            )
            for _ in range(6)
        )
        host.send_raw(frames)
    Host(agent).check()


def test_more_sessions_than_there_are_break_the_connection(agent: Agent, host: Host) -> None:
    for _ in range(MAX_SESSIONS):
        host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "sleep").text(Tag.ARG, "1000"))
    host.flush()
    assert host.connection.session_count == MAX_SESSIONS
    host.send_raw(host.frame(FrameType.OPEN, 5000, b"\1"))
    Host(agent).check()


def test_more_data_than_granted_breaks_the_connection(agent: Agent, host: Host) -> None:
    session = host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "sleep").text(Tag.ARG, "1000"))
    for _ in range(WINDOW // MAX_PAYLOAD + 1):
        host.send_raw(host.frame(FrameType.DATA, session, bytes(MAX_PAYLOAD)))
    Host(agent).check()
    assert agent.memory < 4 * 1024 * 1024


def test_frames_without_data_break_the_connection(agent: Agent, host: Host) -> None:
    """They use up nothing of what was granted."""
    session = host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "cat"))
    host.flush()
    host.send_raw(host.frame(FrameType.DATA, session, b""))
    host.send_raw(host.frame(FrameType.DATA, session, b"lost", 2))
    assert not any(isinstance(event, Data) for event in host.events(0.5)), "what came behind it is not taken"
    Host(agent).check()


def test_an_endless_request_breaks_the_connection(agent: Agent, host: Host) -> None:
    for _ in range(20):
        host.send_raw(host.frame(FrameType.OPEN, 1, bytes([1]) + bytes(MAX_PAYLOAD - 1), 1))
    Host(agent).check()
    assert agent.memory < 4 * 1024 * 1024


def test_a_host_that_does_not_read_stops_nothing_but_itself(agent: Agent, host: Host) -> None:
    """Sixty programs that print without end into a wire without a reader: no memory, no spinning."""
    for _ in range(60):
        host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "yes"))
    host.flush()
    time.sleep(0.5)
    ticks = cpu_ticks(agent)
    time.sleep(0.5)
    assert cpu_ticks(agent) - ticks < 10, "an agent with nothing to do must sleep"
    assert agent.memory < 4 * 1024 * 1024
    host.wait(lambda events: len(events) > 100)


def cpu_ticks(agent: Agent) -> int:
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().split()
    return int(fields[13]) + int(fields[14])


def test_a_flood_of_requests(agent: Agent, host: Host) -> None:
    """Ten thousand requests, as fast as the wire takes them, each closed before it is answered."""
    for _ in range(100):
        for _ in range(100):
            session = host.connection.open(Op.METRICS)
            host.connection.close(session)
        host.flush()
        host.events()
    host.check()
    assert agent.memory < 4 * 1024 * 1024


def test_unknown_fields_refuse_the_request(agent: Agent, host: Host) -> None:
    session = host.connection.open(Op.EXEC, FieldWriter().text(Tag.ARG, "true").u8(Tag.KIND, 1))
    host.flush()
    [ended] = host.wait(lambda events: any(isinstance(event, Ended) for event in events))[-1:]
    assert isinstance(ended, Ended)
    assert (ended.session, ended.exit_code, ended.message) == (session, 126, "exec: malformed request")
