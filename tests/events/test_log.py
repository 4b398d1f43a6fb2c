"""The event log on a real store: written with the change, bounded, read from a cursor, never reused."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hypeman import events
from hypeman.actor import Actor, acting
from hypeman.errors import StoreError
from hypeman.events import log, service
from hypeman.events.service import Events
from hypeman.events.types import CursorGone, Event, EventFilter, EventObject, Kind
from hypeman.store import Store, Table, Txn

ALL = EventFilter()
THINGS: Table[str] = Table("things", str)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store.open(tmp_path / "store")
    async with store.serving():
        yield store
    store.close()


async def add(store: Store, *names: str, kind: Kind = Kind.VOLUME, action: str = "created") -> None:
    for name in names:
        await store.write(partial(events.record, kind=kind, action=action, id=name))


def ids(found: object) -> list[str]:
    assert isinstance(found, list | tuple)
    return [event.object.id for event in found]


async def test_an_event_is_written_with_its_change_or_not_at_all(store: Store) -> None:
    def change(txn: Txn) -> None:
        txn.put(THINGS, "a", "a")
        events.record(txn, Kind.VOLUME, "created", "a")

    def refused(txn: Txn) -> None:
        change(txn)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await store.write(refused)
    assert store.read(lambda txn: (txn.exists(THINGS, "a"), log.head(txn).last)) == (False, 0)
    await store.write(change)
    assert store.read(lambda txn: (txn.exists(THINGS, "a"), log.head(txn).last)) == (True, 1)


async def test_the_actor_is_that_of_the_write(store: Store) -> None:
    """Also when writes of several callers share a commit."""

    async def write_as(name: str) -> None:
        with acting(Actor(name, address="192.0.2.1")):
            await add(store, name)

    async with trio.open_nursery() as nursery:
        for name in ("alice", "bob"):
            nursery.start_soon(write_as, name)
    await add(store, "nobody")
    found = store.read(lambda txn: log.read_after(txn, 0, 10))
    actors = {event.object.id: event.actor.subject if event.actor else None for event in found}
    assert actors == {"alice": "alice", "bob": "bob", "nobody": None}


async def test_cursors_continue_after_a_restart_and_are_never_reused(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        store = Store.open(tmp_path / "store")
        async with store.serving():
            written = await store.write(lambda txn: events.record(txn, Kind.IMAGE, "ready", "x"))
            assert written == expected
            await store.write(lambda txn: log.drop_older(txn, datetime.now(UTC) + timedelta(hours=1)))
        store.close()


KILLED = """
import sys, trio
from pathlib import Path
from hypeman import events
from hypeman.events import Kind
from hypeman.store import Store, Table
THINGS = Table("things", str)

async def main():
    store = Store.open(Path(sys.argv[1]))
    async with store.serving():
        for number in range(100_000):
            def change(txn):
                txn.put(THINGS, f"{number:06}", "x")
                events.record(txn, Kind.VOLUME, "created", f"{number:06}")
            await store.write(change)
            print(number, flush=True)
trio.run(main)
"""


def test_a_kill_neither_loses_nor_invents_an_event(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    reported = -1
    for line in process.stdout:
        reported = int(line)
        if reported == 20:
            process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    store = Store.open(tmp_path / "store")
    things, found = store.read(lambda txn: (list(txn.keys(THINGS)), log.read_after(txn, 0, 100_000)))
    store.close()
    assert reported >= 20
    assert things == ids(found)
    assert len(things) > reported
    assert [event.cursor for event in found] == list(range(1, len(found) + 1))


async def test_the_oldest_are_dropped_by_number(store: Store) -> None:
    await store.write(lambda txn: log.limit_count(txn, 3))
    await add(store, *"abcde")
    assert ids(store.read(lambda txn: log.read_after(txn, 0, 10))) == ["c", "d", "e"]
    assert len(store.read(lambda txn: list(txn.keys(log.EVENTS)))) == 3
    await store.write(lambda txn: log.limit_count(txn, 1))
    assert ids(store.read(lambda txn: log.read_after(txn, 0, 10))) == ["e"]


async def test_the_oldest_are_dropped_by_age(store: Store, autojump_clock: trio.testing.MockClock) -> None:
    days = [0]
    log_service = Events(
        store, max_count=100, max_age=timedelta(days=1), now=lambda: datetime.now(UTC) + timedelta(days=days[0])
    )
    await add(store, "a", "b")
    async with trio.open_nursery() as nursery:
        await nursery.start(log_service.run)
        await add(store, "c")
        assert ids(await log_service.list(0, ALL, 10)) == ["a", "b", "c"]
        days[0] = 2
        while await log_service.list(0, ALL, 10):
            await trio.sleep(service.TRIM_INTERVAL)
        nursery.cancel_scope.cancel()
    assert log_service.last == 3


async def test_dropping_on_a_full_disk_ends_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))

    def refuse(txn: object, time: datetime) -> None:
        raise StoreError("the store could not be written: No space left on device")

    monkeypatch.setattr(log, "drop_older", refuse)
    with trio.move_on_after(0.5) as scope:
        await log_service.run()
    assert scope.cancelled_caught
    assert "No space left on device" in caplog.text


async def test_a_cursor_that_the_log_does_not_reach_is_refused(store: Store) -> None:
    await store.write(lambda txn: log.limit_count(txn, 3))
    await add(store, *"abcde")
    log_service = Events(store, max_count=3, max_age=timedelta(days=1))
    for cursor, wanted in ((0, ["c", "d", "e"]), (2, ["c", "d", "e"]), (4, ["e"]), (5, [])):
        assert ids(await log_service.list(cursor, ALL, 10)) == wanted
    for cursor in (1, 6):
        with pytest.raises(CursorGone):
            await log_service.list(cursor, ALL, 10)
        with pytest.raises(CursorGone):
            log_service.follow(cursor, ALL)


async def test_a_time_is_a_cursor_too(store: Store) -> None:
    await add(store, *"abc")
    times = [event.time for event in store.read(lambda txn: log.read_after(txn, 0, 10))]
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))
    assert [log_service.cursor_before(time) for time in times] == [0, 1, 2]
    assert log_service.cursor_before(times[2] + timedelta(seconds=1)) == 3
    assert log_service.cursor_before(times[0] - timedelta(days=1)) == 0


async def test_the_list_is_limited_and_filtered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BATCH", 2)
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))
    await add(store, *"abcd")
    await add(store, "i", kind=Kind.IMAGE, action="ready")
    await add(store, "e")
    assert ids(await log_service.list(0, ALL, 3)) == ["a", "b", "c"]
    assert ids(await log_service.list(0, EventFilter(types=("image",)), 3)) == ["i"]
    assert ids(await log_service.list(1, EventFilter(kinds=frozenset({Kind.VOLUME})), 10)) == ["b", "c", "d", "e"]


async def test_followers_get_every_event_once_and_in_order(store: Store) -> None:
    log_service = Events(store, max_count=10_000, max_age=timedelta(days=1))
    seen: list[list[str]] = [[], []]

    async def follow(cursor: int, into: list[str]) -> None:
        async for batch in log_service.follow(cursor, ALL):
            into += ids(batch)

    await add(store, "before")
    async with trio.open_nursery() as nursery:
        await nursery.start(log_service.run)
        nursery.start_soon(follow, 0, seen[0])
        nursery.start_soon(follow, 1, seen[1])
        wanted = [f"{number}" for number in range(300)]
        async with trio.open_nursery() as writers:
            for name in wanted:
                writers.start_soon(add, store, name)
        with trio.fail_after(20):
            while len(seen[1]) < 300:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert sorted(seen[1]) == sorted(wanted)
    assert seen[0] == ["before", *seen[1]]
    assert seen[1] == ids(store.read(lambda txn: log.read_after(txn, 1, 1000)))


async def test_an_idle_follower_gets_a_heartbeat(store: Store, autojump_clock: trio.testing.MockClock) -> None:
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))
    follower = log_service.follow(0, EventFilter(types=("image",)))
    async with trio.open_nursery() as nursery:
        await nursery.start(log_service.run)
        await add(store, "a", "b")
        assert await follower.__anext__() == []
        nursery.cancel_scope.cancel()
    assert follower.cursor == 2, "it moves on even where nothing matches"


async def test_a_follower_that_is_too_slow_gets_an_error(store: Store) -> None:
    """And holds nothing up: the writer does not know that it exists."""
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))
    await store.write(lambda txn: log.limit_count(txn, 3))
    await add(store, "a", "b")
    follower = log_service.follow(1, ALL)
    await add(store, *"cdefgh")
    with pytest.raises(CursorGone):
        await follower.__anext__()


def test_filters() -> None:
    now = datetime.now(UTC)
    about = EventObject(Kind.INSTANCE, "web", "the-web")
    web = Event(cursor=1, time=now, type="instance.created", object=about, tags={"team": "a", "env": "b"})
    about = EventObject(Kind.SNAPSHOT, "snap")
    capture = Event(cursor=2, time=now, type="snapshot.created", object=about, instance_id="web")
    image = Event(cursor=3, time=now, type="image.created", object=EventObject(Kind.IMAGE, "web"))
    for wanted, fitting in (
        (EventFilter(), [web, capture, image]),
        (EventFilter(types=("instance", "image.created")), [web, image]),
        (EventFilter(types=("instance.deleted",)), []),
        (EventFilter(kinds=frozenset({Kind.IMAGE})), [image]),
        (EventFilter(kinds=frozenset()), []),
        (EventFilter(instance="web"), [web, capture]),
        (EventFilter(instance="the-web"), [web]),
        (EventFilter(tags={"team": "a"}), [web]),
        (EventFilter(tags={"team": "a", "env": "c"}), []),
    ):
        assert [one for one in (web, capture, image) if wanted.fits(one)] == fitting, wanted


async def test_nothing_wakes_a_follower_but_events(store: Store) -> None:
    log_service = Events(store, max_count=100, max_age=timedelta(days=1))
    got: list[object] = []

    async def follow() -> None:
        async for batch in log_service.follow(0, ALL):
            got.append(batch)

    async with trio.open_nursery() as nursery:
        await nursery.start(log_service.run)
        nursery.start_soon(follow)
        await store.write(lambda txn: txn.put(THINGS, "a", "a"))
        await wait_all_tasks_blocked()
        assert got == []
        nursery.cancel_scope.cancel()
