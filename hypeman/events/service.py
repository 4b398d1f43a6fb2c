"""Reads the log for any number of readers, and drops old events.

A reader has a cursor and nothing else: it reads the log in batches when it is ready for more, so that a slow
one costs the others nothing. New events wake all readers through one ``trio.Event``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice

import trio

from hypeman.events import log
from hypeman.events.types import Event, EventFilter
from hypeman.host.periodic import repeat
from hypeman.store import Store

BATCH = 256
"""Events read at a time: about a millisecond."""
HEARTBEAT = 15.0
"""Seconds without an event after which a follower gets an empty batch."""
TRIM_INTERVAL = 600.0

_log = logging.getLogger(__name__)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Events:
    """The event log of one store. ``run`` in a nursery."""

    def __init__(
        self, store: Store, *, max_count: int, max_age: timedelta, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._store = store
        self._max_count = max_count
        self._max_age = max_age
        self._now = now
        self._last = 0
        self._more = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wake readers after each commit with events, and drop old events, until cancelled."""
        await self._store.write(lambda txn: log.limit_count(txn, self._max_count))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(repeat, self._trim, interval=TRIM_INTERVAL, what="dropping of old events"))
            task_status.started()
            while True:
                committed = self._store.committed
                last = self.last
                if last != self._last:
                    self._last = last
                    self._more.set()
                    self._more = trio.Event()
                await committed.wait()

    @property
    def last(self) -> int:
        """Cursor of the newest event; 0 if there never was one."""
        return self._store.read(log.head).last

    def cursor_before(self, time: datetime) -> int:
        """The cursor after which the events since ``time`` follow."""
        return self._store.read(lambda txn: log.cursor_before(txn, time))

    def check_cursor(self, cursor: int) -> None:
        """Raise CursorGone if events after ``cursor`` are no longer in the log, or ``cursor`` never was."""
        self._store.read(lambda txn: log.check_cursor(txn, cursor))

    async def list(self, cursor: int, wanted: EventFilter, limit: int) -> Sequence[Event]:
        """The first ``limit`` retained events after ``cursor`` that are ``wanted``. Raises CursorGone."""
        self.check_cursor(cursor)
        found = deque[Event]()
        last = self.last  # later events would only prolong it
        while cursor < last and len(found) < limit:
            batch = self._read(cursor)
            if not batch:
                break
            cursor = batch[-1].cursor
            found.extend(event for event in batch if event.cursor <= last and wanted.fits(event))
            await trio.lowlevel.checkpoint()
        return tuple(islice(found, limit))

    def follow(self, cursor: int, wanted: EventFilter) -> Follower:
        """Every wanted event after ``cursor``, those to come included. Raises CursorGone."""
        self.check_cursor(cursor)
        return Follower(self, cursor, wanted)

    async def wait_beyond(self, cursor: int) -> None:
        """Wait until there is an event after ``cursor``."""
        while self.last <= cursor:
            await self._more.wait()

    def read_on(self, cursor: int) -> Sequence[Event]:
        """The next batch after ``cursor``. Raises CursorGone if some of it was dropped before it was read."""
        self.check_cursor(cursor)
        return self._read(cursor)

    def _read(self, cursor: int) -> Sequence[Event]:
        return self._store.read(lambda txn: log.read_after(txn, cursor, BATCH))

    async def _trim(self) -> None:
        await self._store.write(partial(log.drop_older, time=self._now() - self._max_age))


class Follower:
    """Batches of wanted events, without end; an empty batch after HEARTBEAT seconds without one.

    ``cursor`` is how far the log was read. Raises CursorGone if the reader was so slow that events were dropped
    before it read them.
    """

    def __init__(self, events: Events, cursor: int, wanted: EventFilter) -> None:
        self._events = events
        self._wanted = wanted
        self.cursor = cursor

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Sequence[Event]:
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(HEARTBEAT):
            while True:
                batch = self._events.read_on(self.cursor)
                if batch:
                    self.cursor = batch[-1].cursor
                    if found := [event for event in batch if self._wanted.fits(event)]:
                        return found
                    await trio.lowlevel.checkpoint()
                else:
                    await self._events.wait_beyond(self.cursor)
        return []

    async def aclose(self) -> None:
        """There is nothing to close."""
