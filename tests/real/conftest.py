from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.real.appliance import Appliance, check_host, running_appliance, short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()  # here and not in an async fixture, whose skip would lose its reason
    yield from short_directory("real")


@pytest.fixture
async def appliance(directory: Path) -> AsyncIterator[Appliance]:
    """A started server with the busybox image ready."""
    async with running_appliance(directory) as started:
        yield started
