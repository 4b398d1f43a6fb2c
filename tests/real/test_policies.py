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


async def test_health(appliance: Appliance) -> None:
    """Checks by HTTP, TCP and exec; one that fails has the instance started again; in standby it is not woken."""
    http = {"type": "http", "http": {"port": 80, "path": "/ready"}, "interval": "500ms"}
    web = ["sh", "-c", "mkdir -p /www; touch /www/ready; exec httpd -f -p 80 -h /www"]
    await appliance.create(
        "web", cmd=web, health_check=http, restart_policy={"policy": "always", "backoff": "1s"}
    )  # fmt: skip

    async def becomes(status: str) -> Any:
        with trio.fail_after(PATIENCE):
            while (found := await appliance.get("/instances/web"))["health_status"]["status"] != status:
                await trio.sleep(0.1)
        return found

    async def check(**policy: Any) -> None:
        answer = await appliance.ask("PATCH", "/instances/web", json={"health_check": policy})
        assert answer.is_success, answer.text

    assert (await becomes("healthy"))["health_status"]["last_error"] is None
    await check(type="tcp", tcp={"port": 80}, interval="500ms")
    await becomes("healthy")
    command = {"command": ["sh", "-c", "echo gone; test -e ready"], "working_dir": "/www"}
    await check(type="exec", exec=command, interval="500ms", timeout="10s", start_period="0s")
    await becomes("healthy")

    await appliance.post("/instances/web/standby")
    assert (await becomes("unknown"))["state"] == "Standby"
    await trio.sleep(2)
    assert (await appliance.get("/instances/web"))["state"] == "Standby"
    await appliance.post("/instances/web/restore")
    await becomes("healthy")

    assert (await appliance.exec("web", "rm", "/www/ready"))[0] == 0
    found = await becomes("unhealthy")
    assert found["health_status"]["last_error"] == "exit code 1: gone"
    restarted_once = await restarted(appliance, "web", attempts=1)
    assert restarted_once["restart_status"]["last_reason"] == "health_check_failed"
    await becomes("healthy")


async def test_schedule(appliance: Appliance) -> None:
    """The server that comes back makes up for the run that was missed; what it made can be restored."""
    await appliance.create("one")
    assert (await appliance.exec("one", "sh", "-c", "echo kept > /note"))[0] == 0
    wanted = {"interval": "1m", "retention": {"max_count": 1}, "name_prefix": "often"}
    answer = await appliance.ask("PUT", "/instances/one/snapshot-schedule", json=wanted)
    assert answer.is_success, answer.text
    appliance.kill()
    await trio.sleep(61)
    await appliance.start()
    with trio.fail_after(PATIENCE):
        while (made := (await appliance.get("/instances/one/snapshot-schedule"))["last_snapshot_id"]) is None:
            await trio.sleep(0.2)
    snapshot = await appliance.get(f"/snapshots/{made}")
    assert snapshot["kind"] == "Standby" and snapshot["name"].startswith("often-")
    assert (await appliance.get("/instances/one"))["state"] == "Running"
    await appliance.delete("/instances/one/snapshot-schedule")
    fork = await appliance.post(f"/snapshots/{made}/fork", {"name": "two"})
    assert fork["state"] == "Running"
    assert await appliance.exec("two", "cat", "/note") == (0, "kept\n")


KEPT_OPEN = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 80))
print("open", flush=True)
connection.recv(1)
"""


async def test_auto_standby(appliance: Appliance) -> None:
    """A connection, a session and a hold keep an instance running; without any it enters standby by itself."""
    policy = {"enabled": True, "idle_timeout": "4s"}
    check = {"type": "tcp", "tcp": {"port": 80}, "interval": "1s"}
    web = ["sh", "-c", "mkdir -p /www; exec httpd -f -p 80 -h /www"]
    made = await appliance.create("web", cmd=web, auto_standby=policy, health_check=check)

    async def becomes(status: str) -> Any:
        with trio.fail_after(PATIENCE):
            while (found := await appliance.get("/instances/web/auto-standby/status"))["status"] != status:
                await trio.sleep(0.1)
        return found

    with trio.fail_after(PATIENCE):
        while (await appliance.get("/instances/web"))["health_status"]["status"] != "healthy":
            await trio.sleep(0.1)
    with appliance.namespace.serving(KEPT_OPEN, made["network"]["ip"]):
        assert (await becomes("active"))["active_inbound_connections"] == 1
        appliance.kill()
        await appliance.start()
        assert (await becomes("active"))["active_inbound_connections"] == 1, "opened before this server listened"
        await trio.sleep(5)
        assert (await appliance.get("/instances/web"))["state"] == "Running"
    found = await becomes("idle_countdown")
    assert found["last_inbound_activity_at"] and found["next_standby_at"] and found["supported"]
    await appliance.post("/instances/web/auto-standby/hold")
    await becomes("ineligible")
    assert (await appliance.wait("web", "Standby"))["health_status"]["status"] == "unknown"
    refused = await appliance.ask("POST", "/instances/web/auto-standby/hold")
    assert refused.status_code == 409 and refused.json()["code"] == "instance_in_standby"
    await appliance.post("/instances/web/restore")
    code, text = await appliance.exec("web", "sleep", "6")
    assert code == 0, text
    assert (await appliance.get("/instances/web"))["state"] == "Running"
    await appliance.wait("web", "Standby")
