"""Who uses an instance: open connections to it and from it, and sessions over the API.

Connections are those of TCP, and UDP flows where the policy has them count. They come from the kernel's events
(``host/conntrack.py``) for the addresses of instances that may enter standby; without such an instance nothing is
listened to. What an instance had open when it is first followed, as after a standby, is listed. Events that arrive
while connections are listed are applied to the list: either may be the newer of the two, and what is older is followed
by an event that is still to come. Connections of health checks are not activity: their local ports are known before
they are opened.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from ipaddress import IPv4Address

import trio

from hypeman.errors import HypemanError
from hypeman.host.conntrack import Connection, Connections
from hypeman.instances.model.policies import StandbyRules

log = logging.getLogger(__name__)

KEEP_OWN = 30.0
"""Seconds for which the local port of a health check's connection is remembered; its events come within one."""
MAX_OWN = 65536
RELIST = 5.0
"""Least seconds between two lists of all connections, when events are dropped."""

MOST_LISTED = 8
"""Instances that are listed one by one; for more, all connections are listed at once."""

_Key = tuple[str, int, str, int, bool]
"""Source, its port, the address that answers, its port, and whether it is UDP."""


class _Watched:
    def __init__(self, instance_id: str, address: str, rules: StandbyRules) -> None:
        self.instance_id = instance_id
        self.address = address
        self.rules = rules
        self.open: set[_Key] = set()
        self.news: list[tuple[_Key, bool]] | None = None
        """Events that arrived while connections are listed: opened or closed."""

    def hear(self, key: _Key, is_open: bool) -> bool:
        """Follow an event; returns whether it changes anything."""
        if self.news is not None:
            self.news.append((key, is_open))
        if is_open:
            self.open.add(key)
        elif key in self.open:
            self.open.discard(key)
        else:
            return False  # an attempt that was not answered, or the rest of a closed connection
        return True

    def list(self, found: set[_Key]) -> bool:
        """Have ``found`` open, apart from what events changed meanwhile; returns whether that changes anything."""
        before, self.open = self.open, found
        news, self.news = self.news or (), None
        for key, is_open in news:
            self.hear(key, is_open)
        return self.open != before

    @property
    def outbound(self) -> int:
        """How many of them the instance has begun."""
        return sum(source == self.address for source, *_ in self.open)


class Activity:
    """What keeps instances awake. ``run`` in a nursery."""

    def __init__(
        self, connections: Connections, *, changed: Callable[[str], object], now: Callable[[], datetime]
    ) -> None:
        self._connections = connections
        self._changed = changed
        self._now = now
        self._by_address: dict[str, _Watched] = {}
        self._addresses: dict[str, str] = {}
        self._sessions: Counter[str] = Counter()
        self._last: dict[str, datetime] = {}
        self._own: dict[tuple[str, int], float] = {}
        self._wanted = trio.Event()
        self._unlisted: set[str] = set()
        """Addresses that were not listed since they are watched."""
        self._listing = trio.Lock()
        self.observed = False
        """Whether connections are being observed."""

    # Which instances

    def watch(self, instance_id: str, address: str, rules: StandbyRules) -> None:
        """Follow the connections of an instance that may enter standby."""
        known = self._by_address.get(address)
        if known is not None and known.instance_id == instance_id and known.rules == rules:
            return
        self.unwatch(instance_id)
        self._by_address[address] = _Watched(instance_id, address, rules)
        self._addresses[instance_id] = address
        self._unlisted.add(address)
        self._wanted.set()

    def unwatch(self, instance_id: str) -> None:
        address = self._addresses.pop(instance_id, None)
        if address is not None:
            del self._by_address[address]
            self._unlisted.discard(address)

    def forget(self, instance_id: str) -> None:
        self.unwatch(instance_id)
        self._last.pop(instance_id, None)

    # What they do

    def open_connections(self, instance_id: str) -> tuple[int, int]:
        """How many lead to the instance, and how many it has begun."""
        watched = self._by_address.get(self._addresses.get(instance_id, ""))
        if watched is None:
            return 0, 0
        outbound = watched.outbound
        return len(watched.open) - outbound, outbound

    def sessions(self, instance_id: str) -> int:
        return self._sessions[instance_id]

    def last(self, instance_id: str) -> datetime | None:
        """When a connection or session was last opened or closed."""
        return self._last.get(instance_id)

    def touch(self, instance_id: str) -> None:
        """Something has used the instance just now."""
        self._last[instance_id] = self._now()
        self._changed(instance_id)

    @asynccontextmanager
    async def session(self, instance_id: str) -> AsyncIterator[None]:
        """Within the block the instance is in use."""
        self._sessions[instance_id] += 1
        self.touch(instance_id)
        try:
            yield
        finally:
            self._sessions[instance_id] -= 1
            if not self._sessions[instance_id]:
                del self._sessions[instance_id]
            self.touch(instance_id)

    def own(self, address: str, port: int) -> None:
        """A health check is about to connect to ``address`` from local ``port``."""
        now = trio.current_time()
        if len(self._own) >= MAX_OWN:
            self._own = {key: until for key, until in self._own.items() if until > now}
        self._own[address, port] = now + KEEP_OWN

    async def relist(self, instance_id: str) -> None:
        """Bring the connections of one instance up to date with the kernel's list. Raises HypemanError."""
        async with self._listing:
            if (watched := self._by_address.get(self._addresses.get(instance_id, ""))) is not None:
                await self._list_one(watched)

    async def has_open(self, address: str, rules: StandbyRules) -> bool:
        """Whether the kernel's list has an open connection to ``address`` that counts: the guest may owe it an answer.
        Raises HypemanError."""
        watched = _Watched("", address, rules)
        return any(each.open and self._key(watched, each) is not None for each in await self._connections.list(address))

    async def run(self) -> None:
        """Follow events, until cancelled."""
        await self._wanted.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._list_new_ones)
            await self._follow()

    # Inside

    async def _follow(self) -> None:
        while True:
            try:
                self._connections.listen()
                await self._relist_all()
                self._set_observed(True)
                while (events := await self._connections.wait_events()) is not None:
                    self._take(events)
                log.info("the kernel dropped events of connections: listing them again")
            except (HypemanError, OSError) as error:
                self._set_observed(False)
                log.error("connections cannot be observed, so no instance enters standby by itself: %s", error)
            await trio.sleep(RELIST)

    async def _list_new_ones(self) -> None:
        """List the connections of instances that came to be watched. They have some that no event will tell of: those
        that were open while they were in standby."""
        while True:
            self._wanted = trio.Event()
            try:
                if self.observed and len(self._unlisted) > MOST_LISTED:
                    await self._relist_all()
                while self.observed and self._unlisted:
                    async with self._listing:
                        if (watched := self._by_address.get(self._unlisted.pop())) is not None:
                            await self._list_one(watched)
            except (HypemanError, OSError) as error:  # it is tried again before one of them enters standby
                log.warning("connections of instances that have just come up are not counted yet: %s", error)
            await self._wanted.wait()

    async def _list_one(self, watched: _Watched) -> None:
        async def both_ends() -> list[Connection]:
            return [
                *await self._connections.list(watched.address),
                *await self._connections.list(client=watched.address),
            ]

        await self._list([watched], both_ends)

    async def _relist_all(self) -> None:
        async with self._listing:
            await self._list(list(self._by_address.values()), self._connections.list)

    async def _list(self, those: Sequence[_Watched], read: Callable[[], Awaitable[Sequence[Connection]]]) -> None:
        """Have ``those`` open what ``read`` finds, with the events that arrive meanwhile applied to it."""
        for watched in those:
            self._unlisted.discard(watched.address)
            watched.news = []
        opened: dict[str, set[_Key]] = {}
        try:
            for each in await read():
                for watched, key in self._ends(each) if each.open else ():
                    opened.setdefault(watched.address, set()).add(key)
        except BaseException:
            for watched in those:
                watched.news = None
            raise
        for watched in those:
            if watched.list(opened.get(watched.address, set())):
                self.touch(watched.instance_id)

    def _set_observed(self, observed: bool) -> None:
        if self.observed is not observed:
            self.observed = observed
            for instance_id in self._addresses:
                self._changed(instance_id)

    def _take(self, events: Sequence[Connection]) -> None:
        touched: set[str] = set()
        for event in events:
            for watched, key in self._ends(event):
                if watched.hear(key, event.open):
                    touched.add(watched.instance_id)
        for instance_id in touched:
            self.touch(instance_id)

    def _ends(self, connection: Connection) -> Iterator[tuple[_Watched, _Key]]:
        """The instances for which a connection counts: the one that answers it, and the one that has begun it."""
        for address in {connection.server, connection.source}:
            watched = self._by_address.get(address)
            if watched is not None and (key := self._key(watched, connection)) is not None:
                yield watched, key

    def _key(self, watched: _Watched, connection: Connection) -> _Key | None:
        """None if the connection does not count."""
        if connection.udp and not watched.rules.count_udp:
            return None
        own = None if connection.udp else self._own.get((connection.server, connection.source_port))
        if own is not None and own > trio.current_time():
            return None
        begun = connection.source == watched.address
        if begun and connection.wanted_port in watched.rules.ignored_ports:
            return None
        if not begun and watched.rules.ignores(IPv4Address(connection.source), connection.port):
            return None
        return connection.source, connection.source_port, connection.server, connection.port, connection.udp
