"""Wakes by requests of every kind from everywhere, with kills in between: none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.appliance import check_host, short_directory
from tests.real.wakes import WAYS, Wakes, cabled

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("wakes")


async def test_wakes(directory: Path) -> None:
    """Real packets, rules and TAPs; the VMs are namespaces."""
    async with cabled(directory, 3) as (appliance, targets, key):
        tally = await Wakes(appliance, targets, key, wanted=len(WAYS)).run()
        assert not tally.lost and not tally.resent, f"{tally.lost}\n{appliance.log_tail()}"
        assert set(tally.answered) == set(WAYS)
        tally = await Wakes(appliance, targets, key, wanted=24, kills_every=8).run()
        assert not tally.lost, f"{tally.lost}\n{appliance.log_tail()}"
        assert tally.kills["server"] and tally.kills["VMM"]
