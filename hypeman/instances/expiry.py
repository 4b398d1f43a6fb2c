"""Deletes expired instances.

A failed deletion is retried after a pause and does not block the deletion of others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime

import trio

from hypeman.errors import NotFound
from hypeman.instances.model.record import InstanceRecord

PAUSE = 60.0
"""Seconds until a failed deletion of an expired instance is retried."""

_LONGEST_SLEEP = 3600.0
"""Longest sleep in seconds, since the clock may be set meanwhile."""

log = logging.getLogger(__name__)


class Reaper:
    """Deletes instances when they expire. ``run`` in a nursery."""

    def __init__(
        self,
        records: Callable[[], Iterator[InstanceRecord]],
        delete: Callable[[str], Awaitable[None]],
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._records = records
        self._delete = delete
        self._now = now
        self._changed = trio.Event()
        self._deleting: set[str] = set()

    def look(self) -> None:
        """Re-evaluate expiry times: an instance is new or its expiry time has changed."""
        self._changed.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                now = self._now()
                times = {record.id: record.expires_at for record in self._records() if record.expires_at is not None}
                for instance_id, time in times.items():
                    if time <= now and instance_id not in self._deleting:
                        self._deleting.add(instance_id)
                        nursery.start_soon(self._reap, instance_id)
                later = [(time - now).total_seconds() for time in times.values() if time > now]
                with trio.move_on_after(min([*later, _LONGEST_SLEEP])):
                    await self._changed.wait()

    async def _reap(self, instance_id: str) -> None:
        try:
            await self._delete(instance_id)
        except Exception as error:  # on any error the reaper retries later
            if not isinstance(error, NotFound):
                log.warning("expired instance %s cannot be deleted: %s", instance_id, error)
                await trio.sleep(PAUSE)
        self._deleting.discard(instance_id)
        self.look()
