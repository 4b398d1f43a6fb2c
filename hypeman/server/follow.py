"""Log files as server-sent events: the last lines, then each new line (§3.3).

    LogStream.open(path, wanted)     finds the start by reading backwards in blocks
    async for chunk in stream        a chunk is one or more complete events

Rules:
- Each follower has its own reader: a slow client does not delay others and costs one block of
  memory, regardless of how much is printed.
- Every complete line is sent immediately as one event. Lines that are read together are sent together.
- A truncated file (copy and truncate) is read again from its beginning; a renamed one is read to its
  end, then the new file at the path from its beginning. If the file is deleted without a successor,
  the stream ends: its instance was deleted.
- The requested lines may extend into the one old file that rotation keeps (``<path>.1``).
- A line longer than MAX_LINE comes in pieces, each but the last marked with CONTINUES at its end.
- With ``positions`` the stream begins with an id, and each event has one: device and inode of the file, and the
  offset behind the line. Opened ``after`` one, a stream continues from there, in whatever file that is now; what was
  rotated away meanwhile is left out.
- Bytes that are not UTF-8 become U+FFFD. What the data cannot hold is in a comment before it, which clients of
  server-sent events skip and our command line reads: ``: bytes=<base64 of the line>``, ``: piece=<the same>``, and with
  ``times`` ``: time=<when it was written>``, as exact as the marks of ``host/log_times.py``.
- ``since`` begins with the line that was being written then. A ``run`` is what the program printed from a boot to the
  next one; without it, lines of all runs are sent.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta

import msgspec
import trio

from hypeman.errors import InvalidRequest, NotFound
from hypeman.host.log_times import Times, read_times
from hypeman.host.safe_open import open_log
from hypeman.instances.model.types import LogRun
from hypeman.server.inotify import ChangeWatch

BLOCK = 64 * 1024
MAX_LINE = 64 * 1024
CONTINUES = " … [line continues]"
BYTES, PIECE, TIME = b": bytes=", b": piece=", b": time="

_encode = msgspec.json.Encoder().encode


def encode_events(lines: bytes) -> bytes:
    """Events for ``lines``, each terminated by a newline; a CR before it is dropped.

    64 KiB of 100-byte lines take 0.2 ms (0.4 ms if lines that need no escape are searched for first).
    """
    try:
        text = lines[:-1].decode()
    except UnicodeDecodeError:
        return b"".join(_encode_any(line) for line in lines[:-1].split(b"\n"))
    return b"".join([b"data: " + _encode(line.removesuffix("\r")) + b"\n\n" for line in text.split("\n")])


def encode_each(lines: bytes, fd: int, end: int, *, positions: bool, times: Times | None) -> bytes:
    """As ``encode_events``, with ids or times; ``end`` is the offset in ``fd`` behind the last line."""
    file = os.fstat(fd)
    at = end - len(lines)
    events = []
    for line in lines[:-1].split(b"\n"):
        at += len(line) + 1
        events.append(_head(file, at, positions, times) + _encode_any(line))
    return b"".join(events)


def _head(file: os.stat_result, offset: int, positions: bool, times: Times | None) -> bytes:
    """What is sent before the data of a line, or of a piece, that ends at ``offset``."""
    head = _id_line(file, offset) if positions else b""
    if times is not None:
        written = times.time_of(offset)
        head += TIME + _render_time(file.st_mtime_ns if written is None else written) + b"\n"
    return head


def _render_time(nanoseconds: int) -> bytes:
    """RFC 3339 with nine digits of the second, so that times of lines have one width."""
    seconds, rest = divmod(nanoseconds, 10**9)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z".encode()


def _id_line(file: os.stat_result, offset: int) -> bytes:
    """The id of an event whose line ends at ``offset``: what ``Position.parse`` reads."""
    return b"id: %d-%d-%d\n" % (file.st_dev, file.st_ino, offset)


class Position(msgspec.Struct, frozen=True):
    """Where a line of a log ends."""

    device: int
    inode: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> Position:
        """Raises InvalidRequest."""
        match = re.fullmatch(r"(\d{1,19})-(\d{1,19})-(\d{1,18})", text)
        if match is None:
            raise InvalidRequest(f"after is {text!r}, which is not the id of an event")
        return cls(*map(int, match.groups()))

    def is_in(self, fd: int) -> bool:
        file = os.fstat(fd)
        return (file.st_dev, file.st_ino) == (self.device, self.inode) and self.offset <= file.st_size


def encode_piece(piece: bytes) -> bytes:
    """The event for a part of a line that continues."""
    text = piece.decode("utf-8", "replace") + CONTINUES
    return PIECE + base64.b64encode(piece) + b"\ndata: " + _encode(text) + b"\n\n"


def _encode_any(line: bytes) -> bytes:
    """The event for a line, with its bytes if they are not text."""
    line = line.removesuffix(b"\r")
    try:
        return b"data: " + _encode(line.decode()) + b"\n\n"
    except UnicodeDecodeError:
        data = _encode(line.decode("utf-8", "replace"))
        return BYTES + base64.b64encode(line) + b"\ndata: " + data + b"\n\n"


def find_tail(fd: int, lines: int, end: int | None = None) -> tuple[int, int]:
    """The offset of the last ``lines`` lines of ``fd`` before ``end``, and how many of them the file lacks."""
    position = os.fstat(fd).st_size if end is None else end
    if lines == 0:
        return position, 0
    # Skip the newline that terminates the last line.
    newlines = lines + 1 if position == 0 or os.pread(fd, 1, position - 1) == b"\n" else lines
    while position > 0:
        begin = max(0, position - BLOCK)
        block = os.pread(fd, position - begin, begin)
        found = block.count(b"\n")
        if found >= newlines:
            at = len(block)
            for _ in range(newlines):
                at = block.rfind(b"\n", 0, at)
            return begin + at + 1, 0
        newlines -= found
        position = begin
    return 0, newlines - 1


class LineCutter:
    """Splits blocks into complete lines; a partial line is buffered until it is complete, or too long."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def waiting(self) -> int:
        """Bytes of the partial line."""
        return len(self._rest)

    def feed(self, block: bytes) -> bytes:
        """The complete lines, newlines included; may be empty."""
        end = block.rfind(b"\n") + 1
        if end == 0:
            self._rest += block
            return b""
        lines, self._rest = self._rest + block[:end], block[end:]
        return lines

    def take_piece(self) -> bytes:
        """The beginning of a partial line longer than MAX_LINE, cut between characters; else nothing."""
        if len(self._rest) <= MAX_LINE:
            return b""
        end = len(self._rest)
        for back in range(1, 4):  # the last character may be incomplete
            if self._rest[-back] >= 0xC0:
                end -= back
            if self._rest[-back] & 0xC0 != 0x80:
                break
        piece, self._rest = self._rest[:end], self._rest[end:]
        return piece

    def flush(self) -> bytes:
        """The partial line as if it were complete, or nothing."""
        lines, self._rest = self._rest, b""
        return lines + b"\n" if lines else b""


class Lines(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines of a log are wanted, and with what beside them."""

    tail: int
    """At most so many from before."""
    since: datetime | None = None
    run: LogRun | None = None
    follow: bool = False
    positions: bool = False
    times: bool = False
    after: str = ""
    """An id; then none of the above but ``follow`` and ``times`` has an effect."""


class _Page(msgspec.Struct):
    """One file of a log, open, and the requested part of it."""

    fd: int
    times: Times
    begin: int
    end: int

    @classmethod
    def open(cls, path: str) -> _Page:
        """Raises OSError."""
        fd = open_log(path, os.O_RDONLY)
        return cls(fd, read_times(path), 0, os.fstat(fd).st_size)


_Place = tuple[int, int]
"""Number of a page, and an offset in it."""


def _pages(path: str, wanted: Lines) -> list[_Page]:
    """The old file, if it has any of the lines, and the current one. Raises OSError, NotFound, InvalidRequest."""
    after = Position.parse(wanted.after) if wanted.after else None
    pages = [_Page.open(path)]
    try:
        if after is not None and after.is_in(pages[0].fd):
            pages[0].begin = after.offset
            return pages
        with suppress(OSError):
            old = _Page.open(path + ".1")
            if os.path.sameopenfile(old.fd, pages[0].fd):  # renamed since it was opened: one file, with its times
                _close([pages.pop()])
            pages.insert(0, old)
        if after is not None:
            pages[0].begin = after.offset if after.is_in(pages[0].fd) else 0
            return pages
        return _cut(pages, wanted)
    except BaseException:
        _close(pages)
        raise


def _cut(pages: list[_Page], wanted: Lines) -> list[_Page]:
    begin, end = _span(pages, wanted.run)
    if wanted.since is not None:
        begin = max(begin, _begin_since(pages, wanted.since))
    begin = min(max(begin, _begin_tail(pages, wanted.tail, end)), end)  # a run may have ended before ``since``
    _close([page for number, page in enumerate(pages) if not begin[0] <= number <= end[0]])
    pages[begin[0]].begin, pages[end[0]].end = begin[1], end[1]
    return pages[begin[0] : end[0] + 1]


def _span(pages: list[_Page], run: LogRun | None) -> tuple[_Place, _Place]:
    """Where a run begins and ends. Raises NotFound."""
    first, last = (0, 0), (len(pages) - 1, pages[-1].end)
    runs = [(number, offset) for number, page in enumerate(pages) for offset in page.times.runs()]
    match run:
        case LogRun.CURRENT:
            return (runs[-1] if runs else first), last
        case LogRun.PREVIOUS:
            if not runs or max(runs) == first:
                raise NotFound("the log has no previous run", code="run_not_found")
            return (runs[-2] if len(runs) > 1 else first), runs[-1]
    return first, last


def _begin_since(pages: list[_Page], since: datetime) -> _Place:
    moment = round(since.timestamp() * 1e9)
    for number in reversed(range(len(pages))):
        page = pages[number]
        if os.fstat(page.fd).st_mtime_ns < moment:
            return number, page.end
        if (offset := page.times.begin_since(moment)) is not None:
            return number, _line_start(page.fd, offset)
    return 0, 0


def _line_start(fd: int, offset: int) -> int:
    """Where the line around ``offset`` begins; a line longer than a block is cut there."""
    block = os.pread(fd, min(BLOCK, offset), max(0, offset - BLOCK))
    found = block.rfind(b"\n")
    return offset if found < 0 and offset > BLOCK else offset - len(block) + found + 1


def _begin_tail(pages: list[_Page], lines: int, end: _Place) -> _Place:
    for number in reversed(range(end[0] + 1)):
        page = pages[number]
        offset, lines = find_tail(page.fd, lines, end[1] if number == end[0] else page.end)
        if not lines:
            return number, offset
    return 0, 0


def _close(pages: list[_Page]) -> None:
    for page in pages:
        os.close(page.fd)


class LogStream:
    """The events of one log file. Close it, or iterate to the end."""

    def __init__(self, path: str, pages: list[_Page], watch: ChangeWatch | None, wanted: Lines) -> None:
        """``pages`` are one or two; they are closed with the stream."""
        self._path = path
        self._positions = wanted.positions or bool(wanted.after)
        self._times = pages[0].times if wanted.times else None
        self._fd, self._offset = pages[0].fd, pages[0].begin
        self._next = pages[1] if len(pages) > 1 else None
        """The file to continue with after this one."""
        self._watch = watch
        self._stop_at = pages[-1].end
        """End offset without a watch: later output is not read, or a busy guest could keep the stream open forever."""
        self._cutter = LineCutter()
        self._caught_up = False
        self._begun = not self._positions
        self._ended = False

    @classmethod
    async def open(cls, path: str, wanted: Lines) -> LogStream:
        """Raises OSError (usually FileNotFoundError) before anything is sent, NotFound and InvalidRequest."""
        return await trio.to_thread.run_sync(cls._open, path, wanted)

    @classmethod
    def _open(cls, path: str, wanted: Lines) -> LogStream:
        follows = wanted.follow and wanted.run is not LogRun.PREVIOUS
        watch = ChangeWatch(path) if follows else None  # before the first read, so that no change is missed
        try:
            return cls(path, _pages(path, wanted), watch, wanted)
        except BaseException:
            if watch is not None:
                watch.close()
            raise

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._begun:
            self._begun = True
            await trio.lowlevel.checkpoint()
            return self._id() + b"\n"  # where to continue if nothing comes
        while not self._ended:
            block = await self._read()
            lines = self._cutter.feed(block) if block else self._turn_page()
            events = self._encode(lines) if lines else b""
            if piece := self._cutter.take_piece():
                events += self._piece_head() + encode_piece(piece)
            if events:
                return events
        self.close()
        await trio.lowlevel.checkpoint()
        raise StopAsyncIteration

    def _encode(self, lines: bytes) -> bytes:
        if not self._positions and self._times is None:
            return encode_events(lines)
        # A partial line that was flushed may be of the file before this one: then it ends where this one begins.
        end = self._offset - self._cutter.waiting
        return encode_each(lines, self._fd, end, positions=self._positions, times=self._times)

    def _id(self) -> bytes:
        return _id_line(os.fstat(self._fd), self._offset - self._cutter.waiting)

    def _piece_head(self) -> bytes:
        return _head(os.fstat(self._fd), self._offset - self._cutter.waiting, self._positions, self._times)

    async def _read(self) -> bytes:
        """The next block; empty if there is none even after waiting.

        History may not be cached and is read in a thread; recent output is in the page cache.
        """
        if not self._caught_up:
            size = BLOCK if self._watch or self._next else min(BLOCK, self._stop_at - self._offset)
            block = await trio.to_thread.run_sync(os.pread, self._fd, size, self._offset)
            self._caught_up = not block and self._next is None
            if self._caught_up and self._times is not None:
                self._times = Times()  # what comes now is behind all marks: followers need not hold them
        else:
            block = os.pread(self._fd, BLOCK, self._offset)
            if not block and self._watch is not None and self._next is None and self._is_unchanged():
                await self._watch.wait_change()
                block = os.pread(self._fd, BLOCK, self._offset)
        self._offset += len(block)
        return block

    def _is_unchanged(self) -> bool:
        """Whether this is still the file at the path, and fully read."""
        here = os.fstat(self._fd)
        try:
            there = os.stat(self._path)
        except OSError:
            return here.st_nlink > 0  # in the middle of a rotation, or deleted
        return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev) and here.st_size == self._offset

    def _turn_page(self) -> bytes:
        """At the end of the file, find the next one. Returns a partial line that will not be completed."""
        if self._next is not None:
            os.close(self._fd)
            self._fd, self._offset = self._next.fd, self._next.begin
            self._times, self._next = None if self._times is None else self._next.times, None
            return self._cutter.flush()
        if self._watch is None:
            self._ended = True
            return self._cutter.flush()
        here = os.fstat(self._fd)
        if here.st_size < self._offset:
            self._offset = 0
            return self._cutter.flush()
        try:
            fd = open_log(self._path, os.O_RDONLY)
        except OSError:
            self._ended = here.st_nlink == 0
            return self._cutter.flush() if self._ended else b""
        if os.path.sameopenfile(fd, self._fd):
            os.close(fd)
        else:
            # First read the renamed file once more: its writer may have been in the middle of a line.
            self._next = _Page(fd, Times(), 0, 0)
            self._watch.watch_file()
        return b""

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._fd, self._next.fd if self._next else -1):
            if fd >= 0:
                os.close(fd)
        self._fd, self._next, self._ended = -1, None, True
        if self._watch is not None:
            self._watch.close()

    def __del__(self) -> None:
        self.close()


class UsedStream:
    """A stream during which something else is held: ``stack`` is closed with it."""

    def __init__(self, stream: LogStream, stack: AsyncExitStack) -> None:
        self._stream = stream
        self._stack = stack

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await self._stream.__anext__()

    async def aclose(self) -> None:
        await self._stream.aclose()
        await self._stack.aclose()
