from __future__ import annotations

from datetime import timedelta

import pytest
import trio
import trio.testing

from hypeman.instances import service
from hypeman.paths import Paths
from hypeman.store import Store
from tests.policies.keeping import BEGIN, ClockedLab, FakeConnections, Threads


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


@pytest.fixture
def lab(
    clock: trio.testing.MockClock, threads: Threads, store: Store, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> ClockedLab:
    monkeypatch.setattr(service, "LOG_INTERVAL", 1e6)
    made = ClockedLab(store, paths)
    made.clock, made.threads, made.connections = clock, threads, FakeConnections()
    made.now = lambda: BEGIN + timedelta(seconds=clock.current_time() + made.offset)
    return made


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads()
    monkeypatch.setattr(trio.to_thread, "run_sync", made.run_sync)
    return made
