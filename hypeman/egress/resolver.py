"""Name look-ups for the data plane, shared so that no instance can keep another's waiting.

- Look-ups have threads of their own (``THREADS``): names that never resolve block nobody else's worker threads.
- An instance has at most ``SHARE`` of them. Its further questions wait for its own to end, at most ``MAX_WAITING``
  of them; beyond that a question is answered at once, with no address.
- A name is looked up once at a time, whoever asks, and the answer serves all who wait for it.
- Answers are kept: addresses for ``KEPT``, that there are none for ``KEPT_EMPTY`` seconds, the oldest of ``MAX_KEPT``
  names dropped first.

A look-up by the C library cannot be interrupted: its place in the share stays taken until it returns.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio

Resolve = Callable[[str], Awaitable[list[str]]]

THREADS = 64
SHARE = 8
MAX_WAITING = 256
KEPT, KEPT_EMPTY = 10.0, 2.0
MAX_KEPT = 4096

_threads = trio.CapacityLimiter(THREADS)


async def resolve_by_system(name: str) -> list[str]:
    """Addresses of ``name`` as the host's resolver gives them; none if it has none."""
    look_up = partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
    try:
        found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=_threads)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Share:
    """Of one instance, while it has questions."""

    def __init__(self) -> None:
        self.places = trio.Semaphore(SHARE)
        self.asked = 0
        """Questions that run or wait."""


class _LookUp:
    """One name on its way."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.addresses: list[str] = []


class Resolver:
    """See above. ``resolve`` does one look-up; it raises nothing."""

    def __init__(self, resolve: Resolve = resolve_by_system) -> None:
        self._resolve = resolve
        self._shares: dict[str, _Share] = {}
        self._running: dict[str, _LookUp] = {}
        self._kept: dict[str, tuple[float, list[str]]] = {}
        """Name → until when, and its addresses; in the order in which they were found."""

    async def addresses(self, instance: str, name: str) -> list[str]:
        """Addresses of ``name``, asked for by ``instance``; none if there are none or it asks for too many."""
        if (known := self._known(name)) is not None:
            return known
        if (running := self._running.get(name)) is not None:
            await running.done.wait()
            return running.addresses
        share = self._shares.setdefault(instance, _Share())
        if share.asked >= SHARE + MAX_WAITING:
            return []
        share.asked += 1
        try:
            async with share.places:
                return await self._look_up(name)
        finally:
            share.asked -= 1
            if share.asked == 0:
                del self._shares[instance]

    def forget(self) -> None:
        """Look every name up anew from now on."""
        self._kept.clear()

    async def _look_up(self, name: str) -> list[str]:
        """Whoever waited for its place may find that somebody else has asked meanwhile."""
        if (known := self._known(name)) is not None:
            return known
        if (running := self._running.get(name)) is not None:
            await running.done.wait()
            return running.addresses
        running = self._running[name] = _LookUp()
        try:
            running.addresses = await self._resolve(name)
            self._keep(name, running.addresses)
        finally:
            del self._running[name]
            running.done.set()
        return running.addresses

    def _known(self, name: str) -> list[str] | None:
        until, addresses = self._kept.get(name, (0.0, []))
        return addresses if until > trio.current_time() else None

    def _keep(self, name: str, addresses: list[str]) -> None:
        self._kept.pop(name, None)
        if len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[name] = (trio.current_time() + (KEPT if addresses else KEPT_EMPTY), addresses)
