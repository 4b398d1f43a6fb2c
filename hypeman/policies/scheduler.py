"""Carries out schedule.py: makes the snapshots that are due, and deletes those that the schedule no longer keeps.

A schedule deletes only snapshots that carry its id, which is written with them, in the same transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime

import msgspec
import trio

from hypeman.errors import Conflict, HypemanError, InvalidState, NotFound
from hypeman.ids import new_id
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    SetSnapshotScheduleRequest,
    Snapshot,
    SnapshotKind,
    SnapshotSchedule,
)
from hypeman.instances.rows import SNAPSHOTS
from hypeman.instances.snapshots import Snapshots
from hypeman.policies import rows
from hypeman.policies.controller import Context, note
from hypeman.policies.schedule import (
    Due,
    Made,
    Schedule,
    decide,
    expired,
    render_schedule,
    set_schedule,
    snapshot_name,
)
from hypeman.store import Txn
from hypeman.telemetry import metrics

_Change = Callable[[Schedule | None], Schedule | None]

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Scheduled snapshots in progress; they write whole memories and disks."""


class Scheduler:
    """The snapshot schedules of all instances."""

    def __init__(self, context: Context, snapshots: Snapshots) -> None:
        self._context = context
        self._snapshots = snapshots
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._schedules: dict[str, Schedule] = {}
        self._busy: set[str] = set()

    def load(self, schedules: Mapping[str, Schedule]) -> None:
        self._schedules = dict(schedules)

    def forget(self, instance_id: str) -> None:
        self._schedules.pop(instance_id, None)

    # The API

    def get(self, record: InstanceRecord) -> SnapshotSchedule:
        """Raises NotFound if the instance has no schedule."""
        schedule = self._schedules.get(record.id)
        if schedule is None:
            raise NotFound(f"instance {record.name!r} has no snapshot schedule")
        return render_schedule(schedule, record.id)

    async def set(self, record: InstanceRecord, request: SetSnapshotScheduleRequest) -> SnapshotSchedule:
        """Raises InvalidRequest."""
        await self._save(
            record,
            lambda before: set_schedule(before, request, new_id=new_id(), now=self._now()),
            action="schedule_set",
        )
        self._context.again(record.id)
        return self.get(record)

    async def delete(self, record: InstanceRecord) -> None:
        """The snapshots that it made stay. Raises NotFound."""
        self.get(record)

        def remove(txn: Txn) -> None:
            txn.delete(rows.SCHEDULES, record.id)
            note(txn, record, "schedule_deleted", {})

        await self._context.store.write(remove)
        self.forget(record.id)

    # The loop

    def look(self, record: InstanceRecord, now: datetime) -> datetime | None:
        """Begin what is due for an instance; returns when to look again."""
        schedule = self._schedules.get(record.id)
        if schedule is None or record.id in self._busy:
            return None
        due = decide(schedule, record.state, now)
        if due.run is not None or due.schedule != schedule:
            self._busy.add(record.id)
            self._context.spawn(self._carry_out, record, due)
        return due.look_at

    async def _carry_out(self, record: InstanceRecord, due: Due) -> None:
        try:
            schedule = due.schedule
            kept = await self._save(
                record,
                lambda now: (
                    msgspec.structs.replace(now, next_run_at=schedule.next_run_at, last_run_at=schedule.last_run_at)
                    if now is not None and now.id == schedule.id
                    else None
                ),
            )
            if kept is not None and due.run is not None:
                async with self._limiter:
                    await self._run(record, kept, due.run)
        except HypemanError as error:
            log.warning("snapshot schedule of instance %s: %s", record.id, error)
            await trio.sleep(1)
        finally:
            self._busy.discard(record.id)
            self._context.again(record.id)

    async def _run(self, record: InstanceRecord, schedule: Schedule, kind: SnapshotKind) -> None:
        made, error = None, None
        try:
            made = await self._snapshot(record, schedule, kind)
        except NotFound:
            return  # the instance was deleted
        except HypemanError as refused:
            error = refused.message
            log.warning("scheduled snapshot of instance %s failed: %s", record.id, error)
            self._context.journal(record.id, f"scheduled snapshot failed: {error}")
        metrics.scheduled_snapshots.labels("success" if error is None else "error").inc()

        def result(now: Schedule | None) -> Schedule | None:
            if now is None or now.id != schedule.id:
                return None
            last = made.id if made is not None else now.last_snapshot_id
            return msgspec.structs.replace(now, last_snapshot_id=last, last_error=error)

        action = "" if error is None else "scheduled_snapshot_failed"
        kept = await self._save(record, result, action=action, error=error)
        if made is not None and kept is not None:
            await self._prune(record, kept)

    async def _snapshot(self, record: InstanceRecord, schedule: Schedule, kind: SnapshotKind) -> Snapshot:
        name = snapshot_name(schedule, self._now())
        request = CreateSnapshotRequest(kind=kind, name=name, tags=schedule.metadata)
        self._context.journal(record.id, f"scheduled snapshot {name}")
        try:
            return await self._snapshots.create(record.id, request, schedule=schedule.id)
        except InvalidState:
            raise
        except Conflict:  # the name is taken: the clock was set back
            return await self._snapshots.create(
                record.id, msgspec.structs.replace(request, name=None), schedule=schedule.id
            )

    async def _prune(self, record: InstanceRecord, schedule: Schedule) -> None:
        def read(txn: Txn) -> list[Made]:
            return [
                Made(row.id, row.created_at)
                for _, row in txn.scan(SNAPSHOTS)
                if row.source.id == record.id and row.schedule == schedule.id
            ]

        for snapshot in expired(schedule, self._context.store.read(read), self._now()):
            try:
                await self._snapshots.delete(snapshot)
                self._context.journal(record.id, f"scheduled snapshot {snapshot} is no longer kept")
            except NotFound:
                continue
            except HypemanError as error:  # it is being read by a fork; the next run tries again
                log.warning("scheduled snapshot %s is kept for now: %s", snapshot, error)

    async def _save(
        self, record: InstanceRecord, change: _Change, *, action: str = "", error: str | None = None
    ) -> Schedule | None:
        """Replace the schedule by ``change`` of it, unless that is None; returns it. ``action``: its event, if any."""
        schedule = change(self._schedules.get(record.id))
        if schedule is not None:
            kept = self._schedules[record.id] = schedule

            def write(txn: Txn) -> None:
                rows.put(txn, rows.SCHEDULES, record.id, kept)
                if action:
                    note(txn, record, action, {"interval": kept.interval, "error": error})

            await self._context.store.write(write)
        return schedule

    def _now(self) -> datetime:
        return self._context.now()
