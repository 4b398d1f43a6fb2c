"""The watchdog: when it is asked for, and how often it is fed."""

from __future__ import annotations

import itertools

import pytest
import trio
import trio.testing

from hypeman.host.watchdog import feed_watchdog, watchdog_interval


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_interval(environ: dict[str, str], interval: float | None) -> None:
    assert watchdog_interval(environ, pid=7) == interval


async def test_is_fed_well_before_it_barks(autojump_clock: trio.testing.MockClock) -> None:
    words: list[float] = []
    with trio.move_on_after(100):
        await feed_watchdog(lambda word: words.append(trio.current_time()), 30.0)
    gaps = [later - sooner for sooner, later in itertools.pairwise(words)]
    assert len(words) >= 7
    assert max(gaps) <= 15


async def test_without_a_watchdog_it_returns() -> None:
    await feed_watchdog(lambda word: pytest.fail(f"said {word}"), None)
