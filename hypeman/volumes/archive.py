"""Spools an archive from the network to an unnamed file before a worker reads it.

Spooled so that a slow sender does not occupy a worker, and limited so that it cannot fill the host's disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hypeman.errors import InvalidRequest
from hypeman.host.files import HostError
from hypeman.units import format_size


@asynccontextmanager
async def spooled(chunks: AsyncIterable[bytes], directory: Path, *, limit: int) -> AsyncIterator[int]:
    """A descriptor of a file with all ``chunks``, on the file system of ``directory``; deleted when the block ends.

    Raises InvalidRequest ``archive_too_large`` above ``limit`` bytes, HostError if the disk is full.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            if total > limit:
                raise InvalidRequest(f"the archive is larger than {format_size(limit)}", code="archive_too_large")
            try:
                await trio.to_thread.run_sync(_write, file.fileno(), chunk)
            except OSError as error:
                raise HostError(f"the archive cannot be stored: {error.strerror}") from error
        yield file.fileno()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
