"""Wakes by requests of every kind from everywhere, with kills in between: none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance, check_host, short_directory
from tests.real.wakes import WAYS, Target, Wakes, WebSocket, cabled, check_agreement

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("wakes")


async def test_wakes(directory: Path) -> None:
    """Real packets, rules and TAPs; the VMs are namespaces."""
    async with cabled(directory, 3) as (appliance, targets, key):
        await check_activity(appliance, targets[0])
        tally = await Wakes(appliance, targets, key, wanted=len(WAYS)).run()
        assert not tally.lost and not tally.resent, f"{tally.lost}\n{appliance.log_tail()}"
        assert set(tally.answered) == set(WAYS)
        tally = await Wakes(appliance, targets, key, wanted=24, kills_every=8).run()
        assert not tally.lost, f"{tally.lost}\n{appliance.log_tail()}"
        assert tally.kills["server"] and tally.kills["VMM"]
        await check_agreement(appliance)


async def check_activity(appliance: Appliance, target: Target) -> None:
    """A connection from anywhere is activity of the instance that answers it, and of the one that has begun it."""
    for place, peer in target.places.items():
        begun = 1 if place == "neighbour" else 0
        channel = await WebSocket.open(peer)
        await until_active(appliance, target.name, inbound=1, outbound=0)
        await until_active(appliance, "neighbour", inbound=0, outbound=begun)
        assert await channel.ask("hello") == "hello"
        await channel.aclose()
        await until_active(appliance, target.name, inbound=0, outbound=0)
        await until_active(appliance, "neighbour", inbound=0, outbound=0)


async def until_active(appliance: Appliance, name: str, *, inbound: int, outbound: int) -> None:
    found: tuple[int, int] | None = None
    with trio.move_on_after(PATIENCE):
        while found != (inbound, outbound):
            status = await appliance.get(f"/instances/{name}/auto-standby/status")
            found = status["active_inbound_connections"], status["active_outbound_connections"]
            await trio.sleep(0.05)
    assert found == (inbound, outbound), name
