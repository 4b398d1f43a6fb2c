"""Housekeeping: a failure is logged and the next call is made; a fault of the program is raised."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hypeman.errors import StoreError
from hypeman.host.periodic import repeat


async def test_goes_on_after_failures(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    begin, calls = trio.current_time(), list[float]()

    async def work() -> None:
        calls.append(trio.current_time() - begin)
        if len(calls) == 1:
            raise StoreError("the disk is full")
        if len(calls) == 2:
            raise OSError("no such device")

    with trio.move_on_after(35):
        await repeat(work, interval=10, what="tidying")
    assert calls == [0, 10, 20, 30]
    assert [record.message for record in caplog.records] == [
        "tidying failed, tried again in 10 s: the disk is full",
        "tidying failed, tried again in 10 s: no such device",
    ]


async def test_a_fault_is_raised() -> None:
    async def work() -> None:
        raise KeyError("x")

    with trio.fail_after(5), pytest.raises(KeyError):
        await repeat(work, interval=10, what="tidying")
