"""The journal of a build: its events in a file, one JSON object per line, from the first to the last.

Followers read the file from its start, each with a descriptor of its own, and are woken when it grows; so a late one
sees the same as an early one, and a slow one costs no memory. After a crash the last line may be incomplete: it is cut
off when the journal is opened again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio
from msgspec import UNSET, Raw, UnsetType

from hypeman.builds.progress import PlainText, SolveStatus, parse_status
from hypeman.builds.types import BuildEvent, BuildEventType, BuildStatus
from hypeman.images.blobs import write_all

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
"""Of a journal; further output of the build is not kept, but its end is."""
HEARTBEAT_SECONDS = 30.0
_READ = 256 << 10
_encode = msgspec.json.Encoder().encode


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a journal."""

    at: datetime
    log: str | UnsetType = UNSET
    status: BuildStatus | UnsetType = UNSET
    progress: Raw | UnsetType = UNSET


_decode = msgspec.json.Decoder(Entry).decode


class Journal:
    """The journal of one build that is not over. A full disk costs lines, not the build."""

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Opens or creates the file. Blocking."""
        self._path = path
        self._now = now
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.size = _cut_torn_line(self._fd)
        """Bytes, of whole lines."""
        os.lseek(self._fd, self.size, os.SEEK_SET)
        self._full = self.size > MAX_BYTES
        self.closed = False
        self._grown = trio.Event()

    def log(self, text: str) -> None:
        """A line of the server's own."""
        self._append(Entry(self._now(), log=text))

    def status(self, status: BuildStatus) -> None:
        self._append(Entry(self._now(), status=status), always=True)

    def progress(self, line: bytes) -> None:
        """An update of BuildKit, valid JSON on one line."""
        self._append(Entry(self._now(), progress=Raw(line)))

    def _append(self, entry: Entry, *, always: bool = False) -> None:
        """Small writes to the page cache: not worth a thread each."""
        if self.closed:
            return
        if self._full and not always:
            return
        data = _encode(entry) + b"\n"
        if not self._full and self.size + len(data) > MAX_BYTES:
            self._full = True
            data = _encode(Entry(self._now(), log=f"[more than {MAX_BYTES >> 20} MB of output: not kept]")) + b"\n"
        try:
            write_all(self._fd, data)
        except OSError as error:
            log.warning("%s misses lines: %s", self._path, error.strerror)
            os.ftruncate(self._fd, self.size)  # part of the line may be there
            os.lseek(self._fd, self.size, os.SEEK_SET)
            return
        self.size += len(data)
        self._wake()

    def _wake(self) -> None:
        grown, self._grown = self._grown, trio.Event()
        grown.set()

    @property
    def grown(self) -> trio.Event:
        """Set with the next entry, or when the journal is closed."""
        return self._grown

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            self.closed = True
            os.close(self._fd)
            self._wake()


class BuildEvents:
    """Events of a build from its start; with ``follow``, until it is over. ``live`` finds its open journal."""

    def __init__(
        self,
        path: Path,
        live: Callable[[], Journal | None],
        final: Callable[[], BuildStatus | None],
        *,
        follow: bool,
        progress: bool,
    ) -> None:
        """``final``: the status of a build that is over. ``progress``: updates as BuildKit sends them, not as lines."""
        self._path = path
        self._live = live
        self._final = final
        self._follow = follow
        self._progress = progress
        self._text = PlainText()
        self._events = self._read()

    def __aiter__(self) -> AsyncIterator[BuildEvent]:
        return self

    async def __anext__(self) -> BuildEvent:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        await self._events.aclose()

    async def _read(self) -> AsyncGenerator[BuildEvent]:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            offset, rest, last = 0, b"", datetime.now(UTC)
            reported: BuildStatus | None = None
            while True:
                journal = self._live()
                grown = journal.grown if journal is not None else None
                most = _READ if journal is None else min(_READ, journal.size - offset)  # no part of a line
                data = await trio.to_thread.run_sync(os.pread, fd, most, offset)
                if data:
                    offset += len(data)
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        entry = _decode(line)
                        last = entry.at
                        if isinstance(entry.status, BuildStatus):
                            reported = entry.status
                        for event in self._events_of(entry):
                            yield event
                    continue
                if grown is None or not self._follow:
                    break
                with trio.move_on_after(HEARTBEAT_SECONDS) as waiting:
                    await grown.wait()
                if waiting.cancelled_caught:
                    yield BuildEvent(type=BuildEventType.HEARTBEAT, timestamp=datetime.now(UTC))
            for text in self._text.flush():
                yield BuildEvent(type=BuildEventType.LOG, timestamp=last, content=text)
            final = self._final()
            if self._follow and final is not None and reported is not final:
                yield BuildEvent(type=BuildEventType.STATUS, timestamp=last, status=final)
        finally:
            os.close(fd)

    def _events_of(self, entry: Entry) -> list[BuildEvent]:
        if isinstance(entry.status, BuildStatus):
            if not self._follow:
                return []  # the contract: existing lines, then the end
            return [BuildEvent(type=BuildEventType.STATUS, timestamp=entry.at, status=entry.status)]
        if isinstance(entry.log, str):
            return [BuildEvent(type=BuildEventType.LOG, timestamp=entry.at, content=entry.log)]
        if isinstance(entry.progress, Raw):
            if self._progress:
                return [BuildEvent(type=BuildEventType.PROGRESS, timestamp=entry.at, progress=entry.progress)]
            status = parse_status(bytes(entry.progress))
            lines = self._text.feed(status) if isinstance(status, SolveStatus) else []
            return [BuildEvent(type=BuildEventType.LOG, timestamp=entry.at, content=line) for line in lines]
        return []


def _cut_torn_line(fd: int) -> int:
    """Cut off what follows the last end of a line; returns the size."""
    size = os.fstat(fd).st_size
    end = size
    while end:
        begin = max(0, end - _READ)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end != size:
        os.ftruncate(fd, end)
    return end
