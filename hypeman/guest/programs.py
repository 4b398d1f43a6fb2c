"""A program that runs in a guest: its input, output and result."""

from __future__ import annotations

from types import TracebackType

import msgspec
import trio

from hypeman.errors import InvalidRequest
from hypeman.guest.channel import Channel, Session
from hypeman.guest.protocol import Resumed


class Output(msgspec.Struct, frozen=True):
    """Output of a program; with a terminal everything is standard output."""

    data: bytes
    stderr: bool = False


class ExecResult(msgspec.Struct, frozen=True):
    """A program's result: 128 + signal if killed, 124 on timeout, 127 not found, 126 not executable."""

    exit_code: int
    signal: int = 0
    timed_out: bool = False
    message: str = ""
    """Reason if it could not be started."""


class ExecSession:
    """A program running in the guest. Use as an async context manager; leaving it kills what still runs, or, if it
    is kept, leaves it to be resumed within a minute."""

    def __init__(self, channel: Channel, session: Session, key: bytes = b"", received: int = 0) -> None:
        """``received``: bytes of a kept program's output before those that follow."""
        self._channel = channel
        self._session = session
        self.key = key
        """Of a kept program: the argument of ``GuestClient.resume``. Else empty."""
        self._received = self._given = received
        self._ends = self._stays = False

    @property
    def resumed(self) -> Resumed | None:
        """Of a resumed program: how much of its input the guest has."""
        return self._session.resumed

    def acknowledge(self, received: int) -> None:
        """The client of a kept program has ``received`` bytes of its output since its start. Raises InvalidRequest if
        it cannot have so many."""
        if received > self._given:
            raise InvalidRequest(f"received is {received}, but only {self._given} bytes were sent")
        if received > self._received:
            self._channel.grant(self._session.id, received - self._received)
            self._received = received

    async def input_taken(self, above: int) -> int:
        """Wait until a kept program has read more than ``above`` bytes of its input; returns how many it has."""
        while (taken := self._channel.taken(self._session.id)) <= above:
            await self._session.wait()
        return taken

    def end(self) -> None:
        """A kept program is not to be resumed: ``aclose`` kills it."""
        self._ends = True

    def leave(self) -> None:
        """``aclose`` leaves the program of an idle instance running, without a time within which it must be resumed."""
        self._stays = True

    async def send_stdin(self, data: bytes) -> None:
        """Waits while the program does not read. No-op if the program has ended."""
        await self._session.send(data)

    async def close_stdin(self) -> None:
        """Send end of file; with a terminal, Ctrl-D."""
        self._channel.send_end(self._session.id)
        await trio.lowlevel.checkpoint()

    async def resize(self, rows: int, cols: int) -> None:
        """At most 65535 each."""
        self._channel.resize(self._session.id, min(rows, 65535), min(cols, 65535))
        await trio.lowlevel.checkpoint()

    async def signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        self._channel.signal(self._session.id, number)
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Output | ExecResult:
        """The next output; after the last, always the result. Raises GuestLost."""
        chunk = await self._session.receive()
        if chunk is not None:
            self._given += len(chunk.data)
            return Output(chunk.data, chunk.stderr)
        ended = self._session.ended
        assert ended is not None
        return ExecResult(ended.exit_code, ended.signal, ended.timed_out, ended.message)

    async def aclose(self) -> None:
        self._close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> ExecSession:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._channel.close(self._session, detach=bool(self.key) and not self._ends, stays=self._stays)
