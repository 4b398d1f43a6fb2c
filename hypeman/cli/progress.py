"""A line on stderr that counts bytes, on terminals only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from hypeman.cli.output import size
from hypeman.text import one_line

_SECONDS = 0.2
"""Between two updates."""


class ByteCounter:
    """``add`` what was moved; ``end`` removes the line."""

    def __init__(self, what: str, total: int = 0) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._next = time.monotonic() + _SECONDS
        self._visible = sys.stderr.isatty()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._visible and now >= self._next:
            self._next = now + _SECONDS
            sys.stderr.write("\r\x1b[K" + one_line(progress_text(self._what, self._done, self._total)))
            sys.stderr.flush()

    def end(self) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def progress_text(what: str, done: int, total: int) -> str:
    """``data.tar: 40MB of 120MB``. Pure."""
    return f"{what}: {size(done)}" + (f" of {size(total)}" if total else "")


def counted(chunks: Iterator[bytes], what: str, total: int = 0) -> Iterator[bytes]:
    """``chunks`` unchanged, with progress while they are taken."""
    counter = ByteCounter(what, total)
    try:
        for chunk in chunks:
            yield chunk
            counter.add(len(chunk))
    finally:
        counter.end()
