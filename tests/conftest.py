"""Fixtures that several areas share."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import trio
from hypothesis import HealthCheck, settings

from hypeman.paths import Paths
from hypeman.store import Store

# On a busy machine an example may take any time; what is slow is seen in benchmarks.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


SECONDS_FOR_A_TEST = 300
SECONDS_FOR_A_LARGE_TEST = 3600
"""For tests marked real, slow, metal or fleet."""


class TookTooLong(BaseException):
    """Not an Exception, so that a test's own handlers do not catch it."""


def pytest_configure() -> None:
    # A suite that runs in the background of a shell has SIGINT ignored, and what it starts inherits that: programs
    # that tests interrupt would never end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises TookTooLong in the main thread after ``seconds``.

    One guard for all tests instead of a limit at each wait: a limit that is forgotten is not noticed until something
    hangs. It is generous, since it must never fail a test on a loaded host; a signal, since a wait can be anywhere:
    in Trio, in a subprocess, in a socket of the standard library.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"{what} did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    large = any(item.get_closest_marker(name) for name in ("real", "slow", "metal", "fleet"))
    with time_limit(SECONDS_FOR_A_LARGE_TEST if large else SECONDS_FOR_A_TEST, item.nodeid):
        return (yield)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data", tmp_path / "run")


@pytest.fixture
async def store(paths: Paths) -> AsyncIterator[Store]:
    """An open store whose writer runs."""
    opened = Store.open(paths.store)
    async with trio.open_nursery() as nursery:
        await nursery.start(opened.run)
        yield opened
        nursery.cancel_scope.cancel()
    opened.close()
