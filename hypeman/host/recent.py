"""A view of the host that is taken at most once per second, however many ask for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

FRESH_SECONDS = 1.0


class Recent(Generic[T]):
    """The result of ``scan`` if it began at most ``seconds`` ago; else a new scan, shared by all who wait for it.

    A caller that is cancelled while it scans leaves the scan to the next one; a scan that fails fails its caller.
    """

    def __init__(self, scan: Callable[[], Awaitable[T]], seconds: float = FRESH_SECONDS) -> None:
        self._scan = scan
        self._seconds = seconds
        self._began = -inf
        self._result: T | None = None
        self._lock = trio.Lock()

    async def get(self) -> T:
        """A result that is at most ``seconds`` old, or newer than this call."""
        asked = trio.current_time()
        if self._result is not None and asked - self._began <= self._seconds:
            return self._result
        async with self._lock:
            if self._result is None or (self._began < asked and asked - self._began > self._seconds):
                await self._refresh()
            assert self._result is not None
            return self._result

    async def get_new(self) -> T:
        """The result of a scan that begins now, for decisions that change the host."""
        async with self._lock:
            return await self._refresh()

    async def _refresh(self) -> T:
        began = trio.current_time()
        self._result = await self._scan()
        self._began = began
        return self._result
