"""Name look-ups for the data plane, with fair shares so that no instance can delay another's.

- Look-ups have dedicated threads (``THREADS``): names that never resolve do not block other worker threads.
- An instance uses at most ``SHARE`` of them. Up to ``MAX_WAITING`` more of its queries are queued; any beyond
  that are answered immediately with no address.
- Concurrent queries for the same name share one look-up.
- What a guest's own look-up was answered (``pin``) is used for its connections as long as the answer is valid.
- Answers are cached: addresses for ``KEPT`` seconds, empty answers for ``KEPT_EMPTY`` seconds, at most ``MAX_KEPT``
  names, oldest evicted first.

A look-up by the C library cannot be interrupted: it counts against the share until it returns.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

Resolve = Callable[[str], Awaitable[list[str]]]

THREADS = 64
SHARE = 8
MAX_WAITING = 256
KEPT, KEPT_EMPTY = 10.0, 2.0
MAX_PINNED = 16_384
MAX_KEPT = 4096

_threads = trio.CapacityLimiter(THREADS)


async def resolve_by_system(name: str) -> list[str]:
    """Addresses of ``name`` from the host's resolver; empty if there are none."""
    look_up = partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
    try:
        found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=_threads)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Share:
    """The share of one instance, while it has queries."""

    def __init__(self) -> None:
        self.places = trio.Semaphore(SHARE)
        self.asked = 0
        """Queries running or queued."""


class _LookUp:
    """One look-up in progress."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.addresses: list[str] = []


class Resolver:
    """Caching resolver with a limit per instance. ``resolve`` does one look-up and must not raise."""

    def __init__(self, resolve: Resolve = resolve_by_system) -> None:
        self._resolve = resolve
        self._shares: dict[str, _Share] = {}
        self._running: dict[str, _LookUp] = {}
        self._kept: dict[str, tuple[float, list[str]]] = {}
        """Name → expiry time and addresses, in the order of resolution."""
        self._pinned: dict[tuple[str, str], tuple[float, list[str]]] = {}
        """The same by instance and name."""

    async def addresses(self, instance: str, name: str) -> list[str]:
        """Addresses of ``name`` for ``instance``; empty if there are none or the instance exceeds its limit."""
        until, pinned = self._pinned.get((instance, name), (0.0, []))
        if until > trio.current_time():
            return pinned
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

    def pin(self, instance: str, name: str, addresses: Sequence[str], seconds: float) -> None:
        """``instance`` received these addresses of ``name``, valid for ``seconds``: its connections go there."""
        self._pinned.pop((instance, name), None)
        if len(self._pinned) >= MAX_PINNED:
            del self._pinned[next(iter(self._pinned))]
        self._pinned[instance, name] = (trio.current_time() + max(seconds, KEPT), list(addresses))

    def forget(self) -> None:
        """Clear the cache."""
        self._kept.clear()
        self._pinned.clear()

    async def _look_up(self, name: str) -> list[str]:
        """Checks again after waiting for a slot: another task may have started the same look-up meanwhile."""
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
