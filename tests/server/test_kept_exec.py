"""The server's side of a program that outlives its connection; ``tests/cli/test_exec_kept.py`` has a real agent."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import MockClock

from hypeman.guest.programs import ExecResult, ExecSession, Output
from hypeman.guest.protocol import Resumed
from hypeman.server.kept_exec import KeptExec


class SlowReader(ExecSession):
    """A program that reads what is typed after a second, and prints nothing."""

    key = b"k" * 16

    def __init__(self, delay: float = 1, resumed: Resumed | None = None) -> None:
        self.read = b""
        self.is_left = False
        self._resumed = resumed
        self._delay = delay

    @property
    def resumed(self) -> Resumed | None:
        return self._resumed

    def leave(self) -> None:
        self.is_left = True

    async def send_stdin(self, data: bytes) -> None:
        await trio.sleep(self._delay)
        self.read += data

    async def close_stdin(self) -> None:
        pass

    async def input_taken(self, known: int) -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def receive(self) -> Output | ExecResult:
        await trio.sleep_forever()
        raise AssertionError


class Script:
    """A socket with the messages of a client that then waits to be closed."""

    def __init__(self, *messages: str | bytes) -> None:
        self._messages = list(messages)
        self.sent: list[str | bytes] = []

    async def receive(self) -> str | bytes:
        await trio.lowlevel.checkpoint()
        if not self._messages:
            await trio.sleep_forever()
        return self._messages.pop(0)

    async def send(self, message: str | bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(message)


async def leave(session: SlowReader, *before: str | bytes) -> list[str | bytes]:
    """Returns what the client was sent."""
    socket: Any = Script(*before, '{"leave":true}')
    kept = KeptExec(socket, session)
    with trio.fail_after(10):
        assert await kept.run() is None
    assert kept.left
    assert session.is_left
    sent: list[str | bytes] = socket.sent
    return sent


async def test_what_is_typed_before_leaving_arrives(autojump_clock: MockClock) -> None:
    session = SlowReader()
    await leave(session, b"make\n", b"ls\n")
    assert session.read == b"make\nls\n"


async def test_who_has_typed_nothing_leaves_at_once(autojump_clock: MockClock) -> None:
    await leave(SlowReader())


async def test_who_has_ended_the_input_leaves_at_once(autojump_clock: MockClock) -> None:
    session = SlowReader()
    await leave(session, b"all\n", b"")
    assert session.read == b"all\n"


async def test_a_program_that_does_not_read_is_not_waited_for(autojump_clock: MockClock) -> None:
    session = SlowReader(delay=1000)
    await leave(session, b"all\n")
    assert session.read == b""


async def test_the_first_message_says_where_the_output_goes_on(autojump_clock: MockClock) -> None:
    """To a client that did not say how much it has; also if that is nothing."""
    asked = Resumed(1, 3, False, output=0, tty=False)
    sent = await leave(SlowReader(resumed=asked), b"wait")
    assert sent[0] == '{"input":3,"input_ended":false,"output":0,"tty":false}'
    sent = await leave(SlowReader(resumed=Resumed(1, 3, False)), b"wait")
    assert sent[0] == '{"input":3,"input_ended":false}'
