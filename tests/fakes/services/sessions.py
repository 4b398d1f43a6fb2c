"""Programs and copies in a guest, as the API's streams use them."""

from __future__ import annotations

import re

import trio

from hypeman.errors import (
    HypemanError,
    InternalError,
)
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.programs import ExecResult, ExecSession, Output
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import CopyEntry


class FakeExec(ExecSession):
    """A program that says back what it reads in capitals and ends with its stdin, or at ``exit N``."""

    key = b""
    """It keeps no programs; ``tests/cli/test_exec_kept.py`` has the real agent for that."""

    def __init__(self, request: ExecRequest) -> None:
        self.request = request
        self.sizes: list[tuple[int, int]] = []
        self.closed = False
        self._send, self._receive = trio.open_memory_channel[bytes | Output | int](100)
        match list(request.command):
            case ["echo", *words]:
                self._send.send_nowait(" ".join(words).encode() + b"\n")
                self._send.send_nowait(0)
            case ["false"]:
                self._send.send_nowait(1)
            case ["big", size]:
                self._send.send_nowait(b"x" * int(size))
                self._send.send_nowait(0)
            case ["both", out, err]:
                self._send.send_nowait(out.encode())
                self._send.send_nowait(Output(err.encode(), stderr=True))
                self._send.send_nowait(0)
            case ["dies"]:
                self._send.close()
            case ["path"]:
                raise InternalError("/var/lib/hypeman/instances/abc/overlay.raw: No space left")

    async def send_stdin(self, data: bytes) -> None:
        if self.request.command[:1] == ("sleep",):
            await trio.sleep_forever()
        await self._send.send(data.upper())
        if found := re.search(rb"exit (\d+)", data):
            await self._send.send(int(found[1]))

    async def close_stdin(self) -> None:
        await self._send.send(0)

    async def resize(self, rows: int, cols: int) -> None:
        self.sizes.append((rows, cols))
        await self._send.send(f"{rows}x{cols}\r\n".encode())

    async def receive(self) -> Output | ExecResult:
        try:
            received = await self._receive.receive()
        except trio.EndOfChannel:
            raise HypemanError("the guest has gone") from None
        if isinstance(received, int):
            return ExecResult(received)
        return received if isinstance(received, Output) else Output(received)

    async def aclose(self) -> None:
        self.closed = True


class FakeCopyIn(CopyIn):
    def __init__(self, files: dict[str, tuple[CpRequest, bytes | None]], request: CpRequest) -> None:
        self._files = files
        self._request = request
        self._data = bytearray()
        self.closed = False

    async def send(self, data: bytes) -> None:
        if self._request.guest_path == "/full":
            raise HypemanError("no space left in the guest")
        self._data += data

    async def finish(self) -> int:
        self._files.pop(self._request.guest_path, None)  # so that their order is that of the last writing
        self._files[self._request.guest_path] = (self._request, None if self._request.is_dir else bytes(self._data))
        return len(self._data)

    async def aclose(self) -> None:
        self.closed = True


class FakeCopyOut(CopyOut):
    """Yields what it is given, and raises what is an error."""

    def __init__(self, items: list[CopyEntry | bytes | HypemanError]) -> None:
        self._left = iter(items)

    async def __anext__(self) -> CopyEntry | bytes:
        await trio.lowlevel.checkpoint()
        for item in self._left:
            if isinstance(item, HypemanError):
                raise item
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        pass
