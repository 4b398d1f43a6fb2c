"""When schedules run and what they keep, on a clock that may be set; and carried out on instances in memory."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.abc import Clock

from hypeman.errors import InvalidRequest, NotFound
from hypeman.hypervisor.interface import VmmBroken
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    SetSnapshotScheduleRequest,
    Snapshot,
    SnapshotKind,
    SnapshotRetention,
)
from hypeman.instances.model.types import InstanceState
from hypeman.policies.schedule import Made, Schedule, decide, expired, set_schedule
from tests.instances.fake_world import request
from tests.policies.keeping import BEGIN, ClockedLab, Kept, keeping

RUNNING = InstanceState.RUNNING


def wanted(interval: str = "1h", *, count: int | None = 3, age: str | None = None, **more: Any) -> Any:
    retention = SnapshotRetention(max_count=count, max_age=age)
    return SetSnapshotScheduleRequest(interval=interval, retention=retention, **more)


def schedule(**changes: Any) -> Schedule:
    return set_schedule(None, wanted(**changes), new_id="s", now=BEGIN)


def at(hours: float) -> datetime:
    return BEGIN + timedelta(hours=hours)


@pytest.mark.parametrize(
    "refused",
    [
        wanted("59s"),
        wanted("soon"),
        wanted("200000h"),
        wanted(count=None),
        wanted(age="0s"),
        wanted(name_prefix="x" * 48),
        wanted(name_prefix="Nightly"),
        wanted(metadata={"": "x"}),
    ],
)
def test_refusals(refused: SetSnapshotScheduleRequest) -> None:
    with pytest.raises(InvalidRequest):
        set_schedule(None, refused, new_id="s", now=BEGIN)


def test_another_interval_restarts_the_cadence_and_nothing_else_does() -> None:
    before = schedule()
    same = set_schedule(before, wanted("60m", count=9, name_prefix="n"), new_id="other", now=at(0.5))
    assert (same.id, same.next_run_at, same.created_at, same.updated_at) == ("s", at(1), BEGIN, at(0.5))
    assert set_schedule(before, wanted("2h"), new_id="other", now=at(0.5)).next_run_at == at(2.5)


def test_it_runs_in_its_cadence() -> None:
    early = decide(schedule(), RUNNING, at(0.9))
    assert early.run is None and early.look_at == at(1)
    late = decide(schedule(), RUNNING, at(1.2))
    assert late.run is SnapshotKind.STANDBY and late.schedule.next_run_at == at(2)
    assert decide(schedule(), InstanceState.STOPPED, at(1)).run is SnapshotKind.STOPPED
    missed = decide(schedule(), InstanceState.STANDBY, at(50.5))
    assert missed.run is SnapshotKind.STANDBY and missed.schedule.next_run_at == at(51)


def test_a_passing_state_is_waited_for() -> None:
    due = decide(schedule(), InstanceState.INITIALIZING, at(1))
    assert due.run is None and due.look_at == at(1) + timedelta(seconds=60) and due.schedule.next_run_at == at(1)


_times = st.floats(-100, 100).map(at)


@given(st.lists(_times, max_size=30))
def test_whatever_the_clock_does(times: list[datetime]) -> None:
    """It never waits longer than an interval, never runs twice without the clock having moved on past the next run."""
    kept, ran = schedule(), None
    for now in times:
        due = decide(kept, RUNNING, now)
        assert now < due.look_at <= now + timedelta(hours=1)
        assert decide(due.schedule, RUNNING, now).run is None
        if due.run is not None:
            assert now >= kept.next_run_at and due.schedule.last_run_at == now
            ran = now
        kept = due.schedule
    assert kept.last_run_at == ran


_made = st.lists(st.builds(Made, st.uuids().map(str), _times), max_size=12)


@given(_made, st.none() | st.integers(0, 5), st.sampled_from((None, "1h", "30h")), _times)
def test_retention(made: list[Made], count: int | None, age: str | None, now: datetime) -> None:
    """What is kept is the newest ones; none that is young enough and few enough is deleted, and never the newest."""
    if count is None and age is None:
        age = "1h"
    kept = schedule(count=count, age=age)
    gone = expired(kept, made, now)
    left = [one for one in made if one.id not in gone]
    assert len(gone) == len(set(gone)) and set(gone) <= {one.id for one in made}
    if made:
        assert max(made, key=lambda one: (one.created_at, one.id)) in left
    if count:
        assert len(left) <= count
    for one in made:
        old = bool(kept.max_age) and now - one.created_at > timedelta(seconds=kept.max_age)
        rank = sum((other.created_at, other.id) > (one.created_at, one.id) for other in made)
        assert (one.id in gone) is (rank > 0 and (old or bool(count and rank >= count)))


# Carried out


async def snapshots(kept: Kept) -> list[Snapshot]:
    return list(await kept.snapshots.list(source_instance_id=None, kind=None, name=None, tags={}))


async def make(kept: Kept) -> None:
    await kept.instances.create(request("one"))
    await kept.until_state(RUNNING)


async def test_it_deletes_only_what_it_made(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        mine = await kept.snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY, name="nightly-1"))
        shown = await kept.policies.set_schedule(
            "one", wanted("1m", count=2, name_prefix="nightly", metadata={"by": "schedule"})
        )
        assert shown.next_run_at == lab.now() + timedelta(minutes=1)
        await kept.sleep(5 * 60 + 1)
        found = await snapshots(kept)
        assert len(found) == 3 and mine.id in {one.id for one in found}
        made = [one for one in found if one.id != mine.id]
        assert {one.name for one in made} == {"nightly-20300101-000400", "nightly-20300101-000500"}
        assert all(one.tags == {"by": "schedule"} for one in made)
        shown = await kept.policies.get_schedule("one")
        assert shown.last_error is None and shown.last_snapshot_id == max(made, key=lambda one: one.created_at).id

        await kept.policies.delete_schedule("one")
        with pytest.raises(NotFound):
            await kept.policies.get_schedule("one")
        await kept.policies.set_schedule("one", wanted("1m", count=1))
        await kept.sleep(3 * 60 + 1)
        assert len(await snapshots(kept)) == 4, "those of the schedule before are not of this one"


async def test_a_failure_is_reported_and_deletes_nothing(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.policies.set_schedule("one", wanted("1m", count=1))
        await kept.sleep(61)
        [first] = await snapshots(kept)
        lab.driver.fail("capture", VmmBroken("no room"))
        await kept.sleep(60)
        shown = await kept.policies.get_schedule("one")
        assert shown.last_error == "no room" and shown.last_snapshot_id == first.id
        assert [snapshot.id for snapshot in await snapshots(kept)] == [first.id]
        await kept.sleep(60)
        shown = await kept.policies.get_schedule("one")
        assert shown.last_error is None
        assert [snapshot.id for snapshot in await snapshots(kept)] == [shown.last_snapshot_id]
        await kept.policies.delete_schedule("one")
        assert kept.events("schedule_set", "scheduled_snapshot_failed", "schedule_deleted") == [
            ("schedule_set", {"interval": "1m"}),
            ("scheduled_snapshot_failed", {"interval": "1m", "error": "no room"}),
            ("schedule_deleted", {}),
        ]


async def test_runs_missed_by_the_server_are_made_up_by_one(lab: ClockedLab, clock: Any) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        due = (await kept.policies.set_schedule("one", wanted("1m", count=9))).next_run_at
    clock.jump(600.5)
    async with keeping(lab) as kept:
        await kept.sleep(1)
        assert len(await snapshots(kept)) == 1
        assert (await kept.policies.get_schedule("one")).next_run_at == due + timedelta(minutes=10)


async def test_a_clock_that_is_set_back(lab: ClockedLab, clock: Clock) -> None:
    """Names that are taken, snapshots from the future: it runs every minute all the same."""
    async with keeping(lab) as kept:
        await make(kept)
        await kept.policies.set_schedule("one", wanted("1m", count=5))
        await kept.sleep(121)
        lab.offset = -120
        await kept.sleep(180)
        assert len(await snapshots(kept)) == 4, "the first one up to an interval late"
        assert (await kept.policies.get_schedule("one")).last_error is None


def test_rows_of_older_servers_can_be_read() -> None:
    assert msgspec.json.decode(msgspec.json.encode(schedule()), type=Schedule) == schedule()
