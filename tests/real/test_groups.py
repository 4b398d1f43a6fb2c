"""Groups of guests, with real ones: who reaches whom."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import trio

from tests.real.appliance import Appliance, running_appliance
from tests.real.kind import PATIENCE

pytestmark = [pytest.mark.real, pytest.mark.slow]

GROUPS = {"proxy": ("front",), "app": ("front", "back"), "db": ("back",), "plain": ()}
REACH = {("proxy", "app"), ("app", "proxy"), ("app", "db"), ("db", "app")}
PORT = 80
SERVE = ("nc", "-ll", "-p", str(PORT), "-e", "echo", "here")
ASK = "for to in {}; do nc -w 5 $to {} </dev/null >/tmp/said 2>&1; grep -q here /tmp/said && echo $to; done; true"


async def test_who_reaches_whom(directory: Path) -> None:
    async with running_appliance(directory, NETWORK__GUEST_TO_GUEST="true") as appliance:
        made = {
            name: await appliance.create(name, cmd=list(SERVE), network={"groups": list(groups)})
            for name, groups in GROUPS.items()
        }
        names = {one["network"]["ip"]: name for name, one in made.items()}
        for name in GROUPS:
            with trio.fail_after(PATIENCE):
                while not await _answering(appliance, name, ["127.0.0.1"]):
                    await trio.sleep(0.2)
        found = {(name, names[to]) for name in GROUPS for to in await _answering(appliance, name, list(names))}
        assert found & set(permutations(GROUPS, 2)) == REACH


async def _answering(appliance: Appliance, guest: str, addresses: list[str]) -> list[str]:
    """Those of ``addresses`` that answer a program in ``guest``."""
    code, output = await appliance.exec(guest, "sh", "-c", f"mkdir -p /tmp; {ASK.format(' '.join(addresses), PORT)}")
    assert code == 0, output
    return output.split()
