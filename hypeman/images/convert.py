"""The server's side of the worker (``worker.py``): starts it, hands it layers, waits for the disk.

The worker lives as long as the ``async with``: left early (an error, a cancelled pull), it is killed
and gone when the block ends.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

import hypeman
from hypeman.errors import InternalError
from hypeman.host.processes import tool_environment
from hypeman.images import worker
from hypeman.images.worker import Applied, Begin, Done, Failed, Finish, Layer, Progress, Report, Request

log = logging.getLogger(__name__)

R = TypeVar("R", Applied, Done)

_decode_report = msgspec.json.Decoder(Report).decode


class ConversionFailed(InternalError):
    """No disk was made. ``blame_image`` tells whether the image is at fault, or this host."""

    def __init__(self, message: str, *, blame_image: bool) -> None:
        super().__init__(message)
        self.blame_image = blame_image


class Conversion:
    """A running worker."""

    def __init__(self, link: trio.socket.SocketType, errors: int, on_bytes: Callable[[int], None]) -> None:
        self._link = link
        self._errors = errors
        self._on_bytes = on_bytes

    async def apply(self, layer: Layer, blob: int) -> None:
        """Apply ``layer``, whose bytes are in the open file ``blob``, on top of those before.

        Raises ConversionFailed.
        """
        await self.send(layer, [blob])
        await self._wait_for(Applied)

    async def finish(self) -> Done:
        """Write the rest of the disk and flush it."""
        await self.send(Finish(), [])
        return await self._wait_for(Done)

    async def send(self, message: Request, files: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        try:
            await self._link.sendmsg([msgspec.json.encode(message)], rights)
        except OSError:
            await self._wait_for(Done)  # it has ended: its last words say why

    async def _wait_for(self, kind: type[R]) -> R:
        while True:
            try:
                data = await self._link.recv(worker.MAX_MESSAGE)
            except OSError:
                data = b""
            if not data:
                said = os.pread(self._errors, 20_000, 0).decode(errors="replace").strip()
                log.error("the image worker ended unexpectedly: %s", said or "it was killed")
                raise ConversionFailed(
                    "the conversion ended unexpectedly, which the server's log tells more about", blame_image=False
                )
            report = _decode_report(data)
            if isinstance(report, Failed):
                raise ConversionFailed(report.message, blame_image=report.blame_image)
            if isinstance(report, Progress):
                self._on_bytes(report.bytes)
            elif isinstance(report, kind):
                return report


@asynccontextmanager
async def converting(
    disk: int, scratch: int, *, max_bytes: int, max_entries: int, uuid: str, on_bytes: Callable[[int], None]
) -> AsyncIterator[Conversion]:
    """A worker that writes into the open, empty file ``disk`` and keeps notes in ``scratch``.

    ``on_bytes(n)`` is told how many unpacked bytes it has seen.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors = os.memfd_create("image-worker-errors")
    process = None
    try:
        with theirs:
            environment = {**tool_environment(), "PYTHONPATH": str(Path(hypeman.__file__).parent.parent)}
            process = await trio.lowlevel.open_process(
                worker.argv(theirs.fileno()), pass_fds=(theirs.fileno(),), env=environment,
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True,
            )  # fmt: skip
        link = trio.socket.from_stdlib_socket(ours)
        conversion = Conversion(link, errors, on_bytes)
        await conversion.send(Begin(max_bytes, max_entries, uuid), [disk, scratch])
        yield conversion
    finally:
        ours.close()
        if process is not None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        os.close(errors)
