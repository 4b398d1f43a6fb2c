"""A tar.gz from the network unpacked into a directory, safely and within a bound.

Entries that are absolute, climb with ``..`` or link out of the directory are refused, as are devices;
the sum of the sizes is bounded before anything is written. The stream is read in a worker thread
through a small pipe of chunks, so an archive of any size takes little memory.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import zlib
from collections.abc import AsyncIterable
from pathlib import Path, PurePosixPath

import trio
import trio.from_thread

from hypeman.errors import InvalidRequest
from hypeman.units import format_size

MOST_ENTRIES = 1_000_000


async def unpack(chunks: AsyncIterable[bytes], target: Path, *, limit: int) -> None:
    """Unpack the tar.gz in ``chunks`` into the empty directory ``target``.

    Raises InvalidRequest: ``archive_too_large`` above ``limit`` bytes of content, else
    ``invalid_request`` for a bad archive or an entry that is refused.
    """
    send, receive = trio.open_memory_channel[bytes](4)

    async def feed() -> None:
        async with send:
            async for chunk in chunks:
                try:
                    await send.send(chunk)
                except trio.BrokenResourceError:
                    return  # the reader has seen enough; what it found is told by itself

    failure: InvalidRequest | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        try:
            await trio.to_thread.run_sync(_unpack, _Pipe(receive), target, limit)
        except InvalidRequest as error:  # caught in here, or it would leave as a group
            failure = error
        nursery.cancel_scope.cancel()  # padding behind the archive's end interests nobody
    if failure is not None:
        raise failure


class _Pipe:
    """The chunks as a file for a thread."""

    def __init__(self, receive: trio.MemoryReceiveChannel[bytes]) -> None:
        self._receive = receive
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        wanted = size
        while wanted > 0:
            if not self._rest:
                try:
                    self._rest = trio.from_thread.run(self._receive.receive)
                except trio.EndOfChannel:
                    break
            part, self._rest = self._rest[:wanted], self._rest[wanted:]
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        trio.from_thread.run_sync(self._receive.close)


def _unpack(pipe: _Pipe, target: Path, limit: int) -> None:
    total = entries = 0
    try:
        with contextlib.closing(pipe), tarfile.open(fileobj=pipe, mode="r|gz") as archive:  # type: ignore[call-overload]
            for entry in archive:
                entries += 1
                total += entry.size
                if total > limit:
                    raise InvalidRequest(
                        f"the archive holds more than the volume's {format_size(limit)}", code="archive_too_large"
                    )
                if entries > MOST_ENTRIES:
                    raise InvalidRequest(f"the archive has more than {MOST_ENTRIES} entries", code="archive_too_large")
                _check(entry, target)
                archive.extract(_plain(entry), target, numeric_owner=True)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise InvalidRequest(f"the archive can not be unpacked: {error}") from error


def _check(entry: tarfile.TarInfo, target: Path) -> None:
    """Refuse what is no file, directory or link, or would lie or lead outside of ``target``.

    ``tarfile``'s own filters came with Python 3.11.4, and Debian 12 has 3.11.2. Nobody else writes below
    ``target``, so what is resolved here is still so when it is extracted.
    """
    if not (entry.isfile() or entry.isdir() or entry.issym() or entry.islnk()):
        raise InvalidRequest(f"the archive has a device or pipe: {entry.name[:200]!r}")
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts or not _is_below(target / path, target):
        raise InvalidRequest(f"the archive has an entry outside of it: {entry.name[:200]!r}")
    if entry.issym() and not _is_below(target / path.parent / entry.linkname, target):
        raise InvalidRequest(f"the archive has a link out of it: {entry.name[:200]!r}")
    if entry.islnk() and not _is_below(target / entry.linkname, target):
        raise InvalidRequest(f"the archive has a link out of it: {entry.name[:200]!r}")


def _is_below(path: Path, target: Path) -> bool:
    """Whether ``path`` lies in ``target`` when all links on the way are followed."""
    resolved, root = os.path.realpath(path), os.path.realpath(target)
    return resolved == root or resolved.startswith(root + "/")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry as root's own, without setuid: modes are kept, owners of another machine are not."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode &= 0o777
    return entry
