"""Fixtures that several areas share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, settings

from hypeman.paths import Paths
from hypeman.store import Store

# On a busy machine an example may take any time; what is slow is seen in benchmarks.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


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
