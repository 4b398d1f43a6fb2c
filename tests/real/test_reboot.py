"""A reboot of the host under ten instances of all restart policies, in all states of rest.

The guests are namespaces (cabled.py). What a reboot takes away is taken away: the server, the VMMs, the engine, the run
directory, links, rules and routes; the next server reads another boot id.
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance, check_host, short_directory
from tests.real.wakes import cabled

pytestmark = [pytest.mark.real, pytest.mark.slow]

POLICIES = {"vm0": "always", "vm1": "on_failure", "vm2": "never", "vm3": "always", "vm4": "never", "vm5": "on_failure",
            "vm6": "always", "vm7": "on_failure", "vm8": "never"}  # fmt: skip
"""And ``neighbour``, without one."""
STOPPED, ASLEEP = ("vm3", "vm7", "vm8"), ("vm4", "vm5", "vm6")
AFTER = {**dict.fromkeys(("vm0", "vm1"), "Running"), **dict.fromkeys(ASLEEP, "Standby"),
         **dict.fromkeys((*STOPPED, "vm2", "neighbour"), "Stopped")}  # fmt: skip


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("reboot")


async def test_a_reboot(directory: Path) -> None:
    async with cabled(directory, len(POLICIES)) as (appliance, targets, _):
        for name, policy in POLICIES.items():
            await appliance.ask("PATCH", f"/instances/{name}", json={"restart_policy": {"policy": policy}})
        for name in STOPPED:
            await appliance.post(f"/instances/{name}/stop")
        for name in ASLEEP:
            await appliance.post(f"/instances/{name}/standby")
        reboot(appliance)
        await appliance.start()
        with trio.fail_after(PATIENCE):
            while (states := await states_of(appliance)) != AFTER:
                await trio.sleep(0.2)
        assert states == AFTER
        told = (await appliance.get("/instances/vm2"))["exit_message"]
        assert told == "the host rebooted while the VM ran"
        for target in targets:
            if AFTER[target.name] != "Stopped":
                with trio.fail_after(PATIENCE):
                    assert await target.places["world"].datagram("hello") == ("hello", 0), target.name
        await appliance.wait("vm4", "Running")


async def states_of(appliance: Appliance) -> dict[str, str]:
    return {each["name"]: each["state"] for each in await appliance.get("/instances")}


def reboot(appliance: Appliance) -> None:
    appliance.kill()
    for pid in (*appliance.vmms(), *appliance.engines()):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(appliance.socket.parent)
    for link in appliance.namespace.links():
        if link.startswith("hm"):
            appliance.namespace.run("ip", "link", "del", link)
    appliance.namespace.run("nft", "flush", "ruleset")
    boot_id = appliance.directory / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    appliance.boot_id = boot_id
