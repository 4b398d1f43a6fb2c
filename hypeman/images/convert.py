"""The server side of the worker (``worker.py``): starts it, passes archives to it and waits for the results.

Workers take turns: after one second of work a worker yields to those waiting, so an archive that takes an hour
delays others by one second at a time.

The worker lives as long as the ``async with`` block: on an early exit (error, cancelled pull) it is killed
and reaped before the block ends.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import trio

from hypeman.errors import InternalError, InvalidRequest
from hypeman.host.descriptors import passing
from hypeman.host.processes import own_environment
from hypeman.images import worker
from hypeman.images.worker import (
    Applied,
    Done,
    Failed,
    Fill,
    Finish,
    Layer,
    Link,
    Member,
    Progress,
    Report,
    Request,
    Sort,
    Sorted,
    Turn,
    Yield,
)

log = logging.getLogger(__name__)

MAX_VOLUME_ENTRIES = 1_000_000
MAX_MEMBERS = 20_000
"""Limit of files and links in an image archive."""

R = TypeVar("R", Applied, Done, Sorted)

_decode_report = msgspec.json.Decoder(Report).decode


class ConversionFailed(InternalError):
    """The conversion failed; there is no result."""

    def __init__(self, message: str, *, blame_image: bool, too_large: bool = False) -> None:
        """``blame_image``: the archive is at fault, not this host. ``too_large``: it exceeds a limit."""
        super().__init__(message)
        self.blame_image = blame_image
        self.too_large = too_large


class Conversion:
    """A running worker. It works only while holding one of the ``turns`` shared by all workers."""

    def __init__(self, link: trio.socket.SocketType, errors: int, turns: trio.CapacityLimiter) -> None:
        self._link = link
        self._errors = errors
        self._turns = turns
        self.bytes = 0
        """Bytes unpacked so far."""
        self.members: list[Member] = []
        self.links: list[Link] = []

    async def apply(self, layer: Layer, blob: int) -> None:
        """Apply ``layer``, read from the open file ``blob``, on top of the previous ones.

        Raises ConversionFailed.
        """
        await self._run(layer, [blob], Applied)

    async def finish(self) -> Done:
        """Write the rest of the disk and flush it."""
        return await self._run(Finish(), [], Done)

    async def sort(self, sort: Sort, archive: int, plain: int) -> Sorted:
        """Collect ``members`` and ``links``."""
        return await self._run(sort, [archive, plain], Sorted)

    async def send(self, message: Request, files: list[int]) -> None:
        try:
            await self._link.sendmsg([msgspec.json.encode(message)], passing(files))
        except OSError:
            await self._next_report(Done)  # it has exited: its last message has the reason

    async def _run(self, message: Request, files: list[int], kind: type[R]) -> R:
        """Run one request in the worker, taking turns with other workers."""
        while True:
            # The limiter is fair: first come, first served.
            async with self._turns:
                await self.send(message, files)
                report = await self._next_report(kind)
            if not isinstance(report, Yield):
                return report
            message, files = Turn(), []

    async def _next_report(self, kind: type[R]) -> R | Yield:
        while True:
            try:
                data = await self._link.recv(worker.MAX_MESSAGE)
            except OSError:
                data = b""
            if not data:
                output = os.pread(self._errors, 20_000, 0).decode(errors="replace").strip()
                log.error("the image worker ended unexpectedly: %s", output or "it was killed")
                raise ConversionFailed(
                    "the conversion ended unexpectedly; the server's log has the details", blame_image=False
                )
            report = _decode_report(data)
            if isinstance(report, Failed):
                raise ConversionFailed(report.message, blame_image=report.blame_image, too_large=report.too_large)
            if len(self.members) + len(self.links) > MAX_MEMBERS:
                raise ConversionFailed("the worker reports more files than were asked for", blame_image=False)
            if isinstance(report, Progress):
                self.bytes = report.bytes
            elif isinstance(report, Member):
                self.members.append(report)
            elif isinstance(report, Link):
                self.links.append(report)
            elif isinstance(report, kind | Yield):
                return report


@asynccontextmanager
async def running_worker(turns: trio.CapacityLimiter) -> AsyncIterator[Conversion]:
    """A new, idle worker."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors = os.memfd_create("image-worker-errors")
    process = None
    try:
        with theirs:
            process = await trio.lowlevel.open_process(
                worker.argv(theirs.fileno()), pass_fds=(theirs.fileno(),), env=own_environment(),
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True,
            )  # fmt: skip
        yield Conversion(trio.socket.from_stdlib_socket(ours), errors, turns)
    finally:
        ours.close()
        if process is not None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        os.close(errors)


async def fill_volume(turns: trio.CapacityLimiter, archive: int, disk: int, *, max_bytes: int) -> None:
    """Unpack an archive (tar, also compressed with gzip or zstd) into the empty ext4 file system ``disk``.

    Both are open files; ``disk`` may be readable and writable. Raises InvalidRequest, with the code
    ``archive_too_large`` if it does not fit, and InternalError if this host fails.
    """
    try:
        async with running_worker(turns) as conversion:
            await conversion.send(Fill(max_bytes, MAX_VOLUME_ENTRIES), [disk])
            await conversion.apply(Layer("the archive", ""), archive)
            await conversion.finish()
    except ConversionFailed as error:
        if not error.blame_image:
            raise
        code = "archive_too_large" if error.too_large else "invalid_request"
        raise InvalidRequest(error.message, code=code) from None
