"""Policies of instances, with real guests: restarts, health, schedules."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]

CRASHES = ["sh", "-c", "[ -e /end ] && exec sleep 100000; touch /end; exit 3"]
"""Fails once, then runs."""


async def restarted(appliance: Appliance, name: str, *, attempts: int) -> Any:
    """The instance, when it runs after as many restarts. ``wait`` returns as soon as it is stopped."""
    with trio.fail_after(PATIENCE):
        while True:
            found = await appliance.get(f"/instances/{name}")
            if found["state"] == "Running" and found["restart_status"]["attempts"] == attempts:
                return found
            await trio.sleep(0.2)


async def test_restarts(appliance: Appliance) -> None:
    """A crash, a VMM that dies while no server looks, and a stop by hand."""
    policy = {"policy": "on_failure", "backoff": "1s", "max_attempts": 3}
    await appliance.create("loops", wait="", cmd=CRASHES, restart_policy=policy)
    await appliance.create("ends", cmd=["sh", "-c", "sleep 2; exit 0"], wait="", restart_policy=policy)
    found = await restarted(appliance, "loops", attempts=1)
    ended = await appliance.wait("ends", "Stopped")
    assert ended["exit_code"] == 0 and ended["restart_status"]["attempts"] == 0
    assert found["restart_status"]["last_attempt_at"] is not None

    appliance.kill()
    for pid in appliance.vmms():
        os.kill(pid, signal.SIGKILL)
    await appliance.start()
    await restarted(appliance, "loops", attempts=2)
    assert (await appliance.get("/instances/ends"))["state"] == "Stopped"

    stopped = await appliance.post("/instances/loops/stop")
    assert stopped["state"] == "Stopped"
    appliance.kill()
    await appliance.start()
    await trio.sleep(2)
    still = await appliance.get("/instances/loops")
    assert still["state"] == "Stopped" and still["restart_status"]["blocked_reason"] == "manual_stop"
    for name in ("loops", "ends"):
        await appliance.delete(f"/instances/{name}")
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()
