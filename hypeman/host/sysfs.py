"""Reading and writing below ``/sys`` without hanging the server.

A write that unbinds a driver returns when the driver has released the device, which may never happen.
So every access runs in a thread of a separate pool with a time limit. After the limit the caller
gets HostStuck, this is logged, and the thread remains until the kernel returns; until then the same
``subject`` (usually a PCI address) is refused, so that nothing is written on top of an unfinished
change, and a late one cannot affect the next owner. ``wait_returned`` returns when it has ended.

An access is shielded from cancellation up to its limit; cancellation takes effect only before it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from hypeman.host.files import HostError

log = logging.getLogger(__name__)

R = TypeVar("R")

_THREADS = 32
_MAX_READ = 1 << 16


class HostStuck(HostError):
    """The kernel did not complete a change in time; it may still complete it."""


class Sysfs:
    """A sysfs root, normally ``/sys``. Paths are relative to it."""

    def __init__(self, root: Path, *, deadline: float = 30.0) -> None:
        self.root = root
        self.deadline = deadline
        """``deadline``: seconds that one access may take."""
        self._limiter: trio.CapacityLimiter | None = None
        self._busy: dict[str, str] = {}
        """Subject → the access in progress for it."""
        self._returned = trio.Event()

    def read_link(self, path: str) -> str | None:
        """The last path component of a link's target, None if there is none. Never blocks."""
        try:
            return os.readlink(self.root / path).rpartition("/")[2]
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def is_busy(self, subject: str) -> bool:
        """A change of ``subject`` is in progress, possibly forever."""
        return subject in self._busy

    async def write(self, path: str, text: str, *, subject: str) -> None:
        """Raises HostError with the path and the kernel's reason, HostStuck on timeout."""
        await self._in_time(subject, f"writing {text!r} to {self.root / path}", lambda: self.write_now(path, text))

    async def read(self, path: str, *, subject: str) -> str | None:
        """The content without the line end; None if there is no such file."""

        def read() -> str | None:
            try:
                with open(self.root / path, "rb") as file:
                    return file.read(_MAX_READ).decode("utf-8", "replace").rstrip("\n")
            except FileNotFoundError:
                return None

        return await self._in_time(subject, f"reading {self.root / path}", read)

    async def call(self, fn: Callable[[], R], *, what: str) -> R:
        """Run something that reads a lot, under the same time limit."""
        return await self._in_time(f"{what} #{time.monotonic_ns()}", what, fn)

    def write_now(self, path: str, text: str) -> None:
        """The write itself, in the calling thread. One system call: the kernel acts on each."""
        fd = os.open(self.root / path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    async def wait_returned(self) -> None:
        """Wait until an access that was reported as stuck has returned after all."""
        await self._returned.wait()
        self._returned = trio.Event()

    async def _in_time(self, subject: str, what: str, fn: Callable[[], R]) -> R:
        await trio.lowlevel.checkpoint_if_cancelled()
        if subject in self._busy:
            raise HostStuck(f"{what}: {self._busy[subject]} has not returned yet")
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(_THREADS)
        token = trio.lowlevel.current_trio_token()
        self._busy[subject] = what
        started = time.monotonic()
        begun = threading.Lock()
        """Taken by the thread when it begins, or by us when time is up first: then it must not begin."""
        given_up = False

        def ended() -> None:
            del self._busy[subject]
            if given_up:
                log.warning("%s returned after %.0f s", what, time.monotonic() - started)
                self._returned.set()

        def work() -> R:
            if not begun.acquire(blocking=False):
                raise HostStuck(what)  # discarded: the caller has already timed out
            try:
                return fn()
            finally:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended)

        result: list[R] = []
        try:
            with trio.move_on_after(self.deadline, shield=True):
                result.append(await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter))
        except OSError as error:
            raise HostError(f"{what}: {error.strerror or error}") from error
        if not result:
            if begun.acquire(blocking=False):
                del self._busy[subject]
                raise HostStuck(f"{what}: all threads wait for the kernel")
            given_up = True
            log.error("%s has not returned for %.0f s; going on without it", what, self.deadline)
            raise HostStuck(f"{what} has not returned for {self.deadline:.0f} s")
        return result[0]
