"""One scan for all who ask within a second."""

from __future__ import annotations

import pytest
import trio

from hypeman.host.recent import Recent


class Scans:
    def __init__(self) -> None:
        self.begun = 0
        self.fails: Exception | None = None

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        await trio.sleep(0.3)
        if self.fails is not None:
            raise self.fails
        return number


async def test_a_second_is_served_from_one_scan(autojump_clock: trio.testing.MockClock) -> None:
    scans = Scans()
    recent = Recent(scans)
    seen = []
    for _ in range(20):
        seen.append(await recent.get())
        await trio.sleep(0.2)
    assert scans.begun < 6
    assert seen == sorted(seen)
    await trio.sleep(5)
    assert await recent.get() == scans.begun, "an old result is not shown"
    before = scans.begun
    assert await recent.get_new() == before + 1
    assert await recent.get() == before + 1


async def test_waiters_share_a_scan_and_outlive_who_began_it(autojump_clock: trio.testing.MockClock) -> None:
    scans = Scans()
    recent = Recent(scans)
    results: list[int] = []

    async def ask() -> None:
        results.append(await recent.get())

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.1):
            async with trio.open_nursery() as impatient:
                impatient.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(10):
                    nursery.start_soon(ask)
    assert results == [2] * 10
    assert scans.begun == 2


async def test_a_failure_is_not_kept(autojump_clock: trio.testing.MockClock) -> None:
    scans = Scans()
    recent = Recent(scans)
    scans.fails = OSError("no")
    with pytest.raises(OSError, match="no"):
        await recent.get()
    scans.fails = None
    assert await recent.get() == 2
