"""An exec whose program outlives its connection (``keep`` and ``resume`` of ExecRequest).

Output and input are counted from the program's start. The guest keeps output until the client has said that it has it,
and the client its input until the server has said that the program has read it; so a client that comes back loses
nothing and gets nothing twice. Everything but output and input is in text messages:

    server  {"session": KEY}                         first, of a new program
            {"input": N, "input_ended": BOOL}        first, of a resumed one: send input from N on; with "output": N
                                                     and "tty" if the client did not say how much output it has
            {"input": N}                             the program has read N bytes
            {"exitCode": N}, or with "error"         all output was sent
    client  {"received": N}                          of the output
            {"resize": {"rows": N, "cols": N}}
            {"done": true}                           it has the exit code, or gives up: the program is killed
            {"leave": true}                          it goes, and the program of an idle instance runs on; the server
                                                     closes once the program has read what was sent before,
                                                     but waits three seconds for that at most

A client sends at most 1 MiB of input that the program has not read. Its other messages may follow that input, and the
program may want one of them, ``received``, before it reads on: they are taken while the input waits.

A connection that ends without any of both leaves the program in the guest for a minute.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import trio
from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.guest.failures import GuestLost
from hypeman.guest.programs import ExecSession, Output
from hypeman.server.messages import Resize, Socket, chunks
from hypeman.telemetry import metrics

_DONE_SECONDS = 10.0
"""For the client's last message."""
_LEAVE_SECONDS = 3.0
"""For the program to read what was typed before its client left."""
_WAITING = 2 * 1024 * 1024
"""Bytes of input that wait here for the program; no more messages are taken from a client that sends more."""

_Place = Annotated[int, Meta(ge=0, lt=2**62)]


class Kept(Struct, frozen=True):
    session: str


class Resumed(Struct, frozen=True):
    input: int
    input_ended: bool
    output: int | UnsetType = UNSET
    tty: bool | UnsetType = UNSET


class InputRead(Struct, frozen=True):
    input: int


class Exit(Struct, frozen=True):
    exit_code: int = msgspec.field(name="exitCode")
    error: str | UnsetType = UNSET


class ClientMessage(Struct, frozen=True):
    received: _Place | UnsetType = UNSET
    resize: Resize | UnsetType = UNSET
    done: Literal[True] | UnsetType = UNSET
    leave: Literal[True] | UnsetType = UNSET


class KeptExec:
    """One connection of one client to a kept program."""

    def __init__(self, socket: Socket, session: ExecSession) -> None:
        self._socket = socket
        self._session = session
        self._sending = trio.Lock()
        self._done = trio.Event()
        self._input = bytearray()
        """Not handed to the program yet."""
        self._input_ended = False
        self.left = False
        """The client has gone, and wants the program to run on."""
        self._running = trio.CancelScope()
        self._wanted = True
        """False once the program takes no more input."""
        self._changed = trio.Event()
        """Of any of the above."""

    async def run(self) -> int | None:
        """The program's exit code; None if the client has ``left``, or the guest's agent was lost, which may come back
        with the program."""
        code = None
        async with trio.open_nursery() as nursery:
            self._running = nursery.cancel_scope
            nursery.start_soon(self._take_messages)
            nursery.start_soon(self._give_input)
            nursery.start_soon(self._report_input)
            code = await self._give_output()
            if code is not None:
                with trio.move_on_after(_DONE_SECONDS):
                    await self._done.wait()
            nursery.cancel_scope.cancel()
        return code

    async def _give_output(self) -> int | None:
        resumed = self._session.resumed
        if resumed is None:
            await self._tell(Kept(self._session.key.hex()))
        else:
            where = Resumed(resumed.received, resumed.input_ended)
            if resumed.output is not None:
                where = msgspec.structs.replace(where, output=resumed.output, tty=resumed.tty)
            await self._tell(where)
        try:
            while isinstance(received := await self._session.receive(), Output):
                for chunk in chunks(received.data):
                    await self._send(chunk)
                metrics.exec_bytes_sent.inc(len(received.data))
        except GuestLost:
            return None
        await self._tell(Exit(received.exit_code, received.message or UNSET))
        return received.exit_code

    async def _take_messages(self) -> None:
        try:
            while not self._done.is_set():
                message = await self._socket.receive()
                if isinstance(message, str):
                    await self._take(message)
                elif message:
                    metrics.exec_bytes_received.inc(len(message))
                    await self._queue_input(message)
                else:
                    self._input_ended = True
                    self._announce()
        except InvalidRequest:
            self._session.end()
            raise
        except HypemanError:
            pass  # the program has ended, or the guest is lost: the output shows which

    async def _queue_input(self, data: bytes) -> None:
        while self._wanted and len(self._input) >= _WAITING:
            await self._changed.wait()
        if self._wanted:
            self._input += data
            self._announce()

    async def _give_input(self) -> None:
        try:
            while True:
                if self._input:
                    data, self._input = bytes(self._input), bytearray()
                    self._announce()
                    await self._session.send_stdin(data)
                elif self._input_ended:
                    await self._session.close_stdin()
                    return
                elif self.left:
                    return
                else:
                    await self._changed.wait()
        except HypemanError:
            pass  # the program has ended or closed its stdin, or the guest is lost: the output shows which
        finally:
            self._wanted = False
            self._announce()
            if self.left:
                self._running.cancel()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _take(self, text: str) -> None:
        try:
            message = msgspec.json.decode(text, type=ClientMessage)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"bad message: {error}") from None
        if message.received is not UNSET:
            self._session.acknowledge(message.received)
        if message.resize is not UNSET:
            await self._session.resize(message.resize.rows, message.resize.cols)
        if message.leave is not UNSET:
            self.left = True
            self._session.leave()
            self._running.deadline = trio.current_time() + (_LEAVE_SECONDS if self._wanted else 0)
            self._announce()
        if message.done is not UNSET:
            self._session.end()
            self._done.set()

    async def _report_input(self) -> None:
        read = self._session.resumed.received if self._session.resumed is not None else 0
        try:
            while True:
                read = await self._session.input_taken(read)
                await self._tell(InputRead(read))
        except HypemanError:
            pass

    async def _tell(self, message: Struct) -> None:
        await self._send(msgspec.json.encode(message).decode())

    async def _send(self, message: str | bytes) -> None:
        async with self._sending:
            await self._socket.send(message)
