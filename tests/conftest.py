"""Fixtures that several areas share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from hypeman.paths import Paths
from hypeman.store import Store


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
