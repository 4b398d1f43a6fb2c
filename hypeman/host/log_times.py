"""When the lines of a log were written, and where the runs of its program begin: marks in a file next to the log.

A VMM writes its guest's output into the log itself, not through the server. The server checks each log about once
a second (``LogTimes.note``), and notes its size with the time of the last write. So a line was written by the time of
the first mark behind it, and after the one before it.

    LOG.times     marks of 16 bytes, little-endian: the size of the log then, its highest bit set where a run begins;
                  nanoseconds since 1970

A look costs 2 µs for a quiet log, and 30 µs for one that has grown (processor time, 100 logs, on a busy machine).

Marks only help to read the log: one that is lost makes times less exact. There are at most ``MAX_MARKS``; beyond that,
every other one of the older half is dropped.
"""

from __future__ import annotations

import bisect
import os
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from hypeman.host.safe_open import open_log

SUFFIX = ".times"
MAX_MARKS = 1 << 16
"""1 MiB: 18 hours of a log that grows each second."""
_MARK = struct.Struct("<QQ")
_RUN = 1 << 63


class Mark(Struct, frozen=True):
    offset: int
    """Size of the log in bytes."""
    time: int
    """Nanoseconds since 1970."""
    begins_run: bool = False

    def packed(self) -> bytes:
        return _MARK.pack(self.offset | (_RUN if self.begins_run else 0), self.time)


class Times(Struct, frozen=True):
    """The marks of one log, by offset."""

    marks: tuple[Mark, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> Times:
        whole = content[: len(content) // _MARK.size * _MARK.size]
        return cls(tuple(Mark(at & ~_RUN, when, bool(at & _RUN)) for at, when in _MARK.iter_unpack(whole)))

    def time_of(self, end: int) -> int | None:
        """When the line that ends at offset ``end`` was written, in nanoseconds; None: after the last mark."""
        place = bisect.bisect_left(self.marks, end, key=lambda mark: mark.offset)
        return self.marks[place].time if place < len(self.marks) else None

    def begin_since(self, moment: int) -> int | None:
        """An offset up to which all was written before ``moment``; None if no mark says so."""
        return next((mark.offset for mark in reversed(self.marks) if mark.time < moment), None)

    def runs(self) -> tuple[int, ...]:
        """Where runs begin."""
        return tuple(mark.offset for mark in self.marks if mark.begins_run)

    def thinned(self) -> Times:
        """Without every other mark of the older half; the last two runs keep their beginnings."""
        half = len(self.marks) // 2
        runs = [mark for mark in self.marks if mark.begins_run][-2:]
        old = (mark for number, mark in enumerate(self.marks[:half]) if number % 2 or mark in runs)
        return Times((*old, *self.marks[half:]))


def read_times(log: Path | str) -> Times:
    """The marks of ``log``; none if they cannot be read."""
    try:
        with open(open_log(f"{log}{SUFFIX}", os.O_RDONLY), "rb") as file:
            return Times.parse(file.read())
    except OSError:
        return Times()


def begin_run(log: Path) -> None:
    """A run of the program begins. Of no effect if the last run has written nothing. Raises OSError."""
    try:
        found = log.stat()
        size, moment = found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        size, moment = 0, time.time_ns()
    last = _last_mark(log)
    if last is None or not last.begins_run or last.offset != size:
        _append(log, Mark(size, moment, begins_run=True), last)


def move_times(log: Path, to: Path) -> None:
    """The log was renamed. Raises OSError, but not if it has no marks."""
    with suppress(FileNotFoundError):
        os.replace(f"{log}{SUFFIX}", f"{to}{SUFFIX}")


class LogTimes:
    """Notes how logs grow. For one thread at a time."""

    def __init__(self) -> None:
        self._noted: dict[Path, int] = {}

    def note(self, logs: Iterable[Path]) -> Mapping[Path, int]:
        """Look at each of ``logs``, and forget all others. Returns the sizes in bytes of those that exist, also if they
        cannot be noted, as on a full disk."""
        sizes: dict[Path, int] = {}
        noted: dict[Path, int] = {}
        for log in logs:
            with suppress(OSError):
                found = log.stat()
                sizes[log] = found.st_size
                if found.st_size != self._noted.get(log):
                    last = _last_mark(log)
                    if last is None or last.offset != found.st_size:
                        _append(log, Mark(found.st_size, found.st_mtime_ns), last)
                noted[log] = found.st_size
        self._noted = noted
        return sizes


def _last_mark(log: Path) -> Mark | None:
    try:
        with open(open_log(f"{log}{SUFFIX}", os.O_RDONLY), "rb") as file:
            whole = os.fstat(file.fileno()).st_size // _MARK.size
            content = os.pread(file.fileno(), _MARK.size, (whole - 1) * _MARK.size) if whole else b""
    except OSError:
        return None
    return next(reversed(Times.parse(content).marks), None)


def _append(log: Path, mark: Mark, last: Mark | None) -> None:
    """``last``: the mark before. Raises OSError."""
    with open(open_log(f"{log}{SUFFIX}", os.O_RDWR | os.O_CREAT), "rb+", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size // _MARK.size * _MARK.size
        if last is not None and last.offset > mark.offset:  # the log was emptied: its marks are of what is gone
            end = 0
        if end >= MAX_MARKS * _MARK.size:
            content = b"".join(mark.packed() for mark in Times.parse(file.read()).thinned().marks)
            os.pwrite(file.fileno(), content, 0)
            end = len(content)
        os.pwrite(file.fileno(), mark.packed(), end)
        os.ftruncate(file.fileno(), end + _MARK.size)
