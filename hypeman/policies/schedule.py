"""Snapshot schedules: when the next snapshot is due, and which of its own a schedule deletes. Pure.

Runs keep their cadence: the next one is a whole number of intervals after the one that was due. Those missed while the
server was down are made up for by one run. The time of the next run is stored before a run begins, so that a crash
costs one snapshot and is not repeated. A clock that is set back delays a run by at most one interval.

Retention is applied after a successful run, so a schedule that cannot run deletes nothing, and never the newest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec
from msgspec import UNSET

from hypeman.errors import InvalidRequest
from hypeman.ids import Tags, check_name, check_tags
from hypeman.instances.model.snapshot_types import (
    SetSnapshotScheduleRequest,
    SnapshotKind,
    SnapshotRetention,
    SnapshotSchedule,
)
from hypeman.instances.model.types import InstanceState
from hypeman.units import parse_duration

MIN_INTERVAL = 60.0
MAX_INTERVAL = 10 * 366 * 86400.0
"""Seconds."""
MAX_PREFIX = 47
"""Characters; with the time of the run a name has at most 63."""
DEFAULT_PREFIX = "scheduled"
RETRY = 60.0
"""Seconds until an instance in a passing state is looked at again."""

KINDS = {
    InstanceState.RUNNING: SnapshotKind.STANDBY,
    InstanceState.STANDBY: SnapshotKind.STANDBY,
    InstanceState.STOPPED: SnapshotKind.STOPPED,
}
"""What is captured in which state; an instance in another state is waited for."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a schedule. Times as the client wrote them, and in seconds."""

    id: str
    """Marks the snapshots that it made; a schedule that is deleted and set again is another one."""
    interval: str
    seconds: float
    retention: SnapshotRetention
    max_age: float = 0.0
    """Seconds; 0: no limit."""
    name_prefix: str | None = None
    metadata: Tags = {}
    created_at: datetime
    updated_at: datetime
    next_run_at: datetime
    last_run_at: datetime | None = None
    last_snapshot_id: str | None = None
    last_error: str | None = None


def set_schedule(
    before: Schedule | None, request: SetSnapshotScheduleRequest, *, new_id: str, now: datetime
) -> Schedule:
    """``before`` changed by ``request``, or a new schedule. Raises InvalidRequest."""
    seconds = parse_duration(request.interval)
    if not MIN_INTERVAL <= seconds <= MAX_INTERVAL:
        raise InvalidRequest(f"interval must be at least 1m and at most {MAX_INTERVAL / 3600:.0f}h")
    retention = request.retention
    if retention.max_count is None and retention.max_age is None:
        raise InvalidRequest("retention requires max_count or max_age")
    max_age = parse_duration(retention.max_age) if retention.max_age is not None else 0.0
    if retention.max_age is not None and max_age <= 0:
        raise InvalidRequest("retention.max_age must be greater than 0")
    if request.name_prefix:
        check_name(request.name_prefix, what="name_prefix", max_length=MAX_PREFIX)
    same = before is not None and before.seconds == seconds
    return Schedule(
        id=before.id if before is not None else new_id,
        interval=request.interval,
        seconds=seconds,
        retention=retention,
        max_age=max_age,
        name_prefix=request.name_prefix or None,
        metadata=check_tags(request.metadata),
        created_at=before.created_at if before is not None else now,
        updated_at=now,
        next_run_at=before.next_run_at if before is not None and same else now + timedelta(seconds=seconds),
        last_run_at=before.last_run_at if before is not None else None,
        last_snapshot_id=before.last_snapshot_id if before is not None else None,
        last_error=before.last_error if before is not None else None,
    )


class Due(msgspec.Struct, frozen=True):
    """What is to be done about a schedule now."""

    schedule: Schedule
    """To be stored, before a run."""
    run: SnapshotKind | None
    look_at: datetime


def decide(schedule: Schedule, state: InstanceState, now: datetime) -> Due:
    """Whether a snapshot of an instance in ``state`` is due."""
    interval = timedelta(seconds=schedule.seconds)
    if schedule.next_run_at > now + interval:  # the clock was set back
        schedule = msgspec.structs.replace(schedule, next_run_at=now + interval)
    if now < schedule.next_run_at:
        return Due(schedule, None, schedule.next_run_at)
    kind = KINDS.get(state)
    if kind is None:
        return Due(schedule, None, now + timedelta(seconds=RETRY))
    missed = math.floor((now - schedule.next_run_at) / interval) + 1
    following = schedule.next_run_at + missed * interval
    return Due(msgspec.structs.replace(schedule, next_run_at=following, last_run_at=now), kind, following)


def snapshot_name(schedule: Schedule, now: datetime) -> str:
    return f"{schedule.name_prefix or DEFAULT_PREFIX}-{now:%Y%m%d-%H%M%S}"


class Made(msgspec.Struct, frozen=True):
    """A snapshot that the schedule made."""

    id: str
    created_at: datetime


def expired(schedule: Schedule, made: Iterable[Made], now: datetime) -> list[str]:
    """The ids of its snapshots that ``schedule`` no longer keeps, oldest first."""
    by_age = sorted(made, key=lambda one: (one.created_at, one.id))
    newest = by_age[-1:]
    count = schedule.retention.max_count or 0
    too_many = by_age[:-count] if count else []
    oldest = now - timedelta(seconds=schedule.max_age) if schedule.max_age else None
    return [
        one.id
        for one in by_age
        if one not in newest and (one in too_many or (oldest is not None and one.created_at < oldest))
    ]


def render_schedule(schedule: Schedule, instance_id: str) -> SnapshotSchedule:
    return SnapshotSchedule(
        instance_id=instance_id,
        interval=schedule.interval,
        retention=schedule.retention,
        next_run_at=schedule.next_run_at,
        created_at=schedule.created_at,
        updated_at=schedule.updated_at,
        name_prefix=schedule.name_prefix,
        metadata=schedule.metadata or UNSET,
        last_run_at=schedule.last_run_at,
        last_snapshot_id=schedule.last_snapshot_id,
        last_error=schedule.last_error,
    )
