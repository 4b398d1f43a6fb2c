"""The whole path on real parts: an image becomes a VM, is used, survives its server, ends."""

from __future__ import annotations

import pytest
import trio

from tests.real.appliance import Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_a_life(appliance: Appliance) -> None:
    """Create, read, exec, stop, start with another command, exit code, delete; nothing is left."""
    made = await appliance.create("one", tags={"team": "a"}, cmd=["sh", "-c", "echo hello; exec sleep 1000"])
    assert made["state"] == "Running" and made["network"]["ip"] == "10.100.0.2"
    assert made["id"] == (await appliance.get(f"/instances/{made['id'][:6]}"))["id"]
    logs = await appliance.ask("GET", "/instances/one/logs")
    assert 'data: "hello"' in logs.text
    assert await appliance.exec("one", "sh", "-c", "echo out; exit 3") == (3, "out\n")
    assert (await appliance.get("/instances/one/stat?path=/bin/busybox"))["is_file"]
    stats = await appliance.get("/instances/one/stats")
    assert stats["memory_rss_bytes"] > 0 and stats["cpu_seconds"] > 0

    stopped = await appliance.post("/instances/one/stop")
    assert stopped["state"] == "Stopped" and stopped["exit_code"] == 143
    refused = await appliance.ask("POST", "/instances/one/stop")
    assert refused.status_code == 409 and refused.json()["code"] == "invalid_state"

    await appliance.post("/instances/one/start", {"cmd": ["sh", "-c", "exit 7"]})
    ended = await appliance.wait("one", "Stopped")
    assert ended["exit_code"] == 7 and ended["exit_message"] == "exited with code 7"
    assert [i["name"] for i in await appliance.get("/instances?tags[team]=a&state=Stopped")] == ["one"]
    await appliance.delete("/instances/one")
    assert await appliance.get("/instances") == []
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_a_server_that_is_killed_finds_its_vms_again(appliance: Appliance) -> None:
    await appliance.create("one")
    assert (await appliance.exec("one", "sh", "-c", "echo kept > /note"))[0] == 0
    before = appliance.vmms()
    appliance.kill()
    assert appliance.vmms() == before
    await appliance.start()
    assert (await appliance.get("/instances/one"))["state"] == "Running"
    assert await appliance.exec("one", "cat", "/note") == (0, "kept\n")
    assert appliance.stop() == 0
    assert appliance.vmms() == before
    await appliance.start()
    await appliance.delete("/instances/one")
    assert not appliance.vmms() and not appliance.files()


async def test_an_end_while_nobody_looked_is_found(appliance: Appliance) -> None:
    """The guest wrote its exit code where the next server finds it."""
    await appliance.create("one", cmd=["sh", "-c", "until [ -e /end ]; do sleep 0.1; done; exit 5"])
    assert (await appliance.exec("one", "sh", "-c", "(sleep 1; touch /end) >/dev/null 2>&1 &"))[0] == 0
    appliance.kill()
    with trio.fail_after(60):
        while appliance.vmms():
            await trio.sleep(0.1)
    await appliance.start()
    ended = await appliance.wait("one", "Stopped")
    assert ended["exit_code"] == 5
    assert not appliance.namespace.links()


async def test_ten_at_once(appliance: Appliance) -> None:
    """Ten instances created, used and deleted together."""

    async def live(number: int) -> None:
        name = f"vm{number}"
        await appliance.create(name)
        assert await appliance.exec(name, "cat", "/etc/hostname") == (0, f"{name}\n")
        await appliance.delete(f"/instances/{name}")

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(live, number)
    assert await appliance.get("/instances") == []
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_a_program_that_is_not_there_is_told(appliance: Appliance) -> None:
    await appliance.create("one", wait="", entrypoint=["/no/such/program"])
    ended = await appliance.wait("one", "Stopped")
    assert ended["exit_code"] == 127 and "/no/such/program" in ended["exit_message"]


async def test_errors_leave_nothing(appliance: Appliance) -> None:
    await appliance.create("one", wait="")
    clash = await appliance.ask("POST", "/instances", json={"name": "one", "image": "localhost/busybox:test"})
    assert clash.status_code == 409 and clash.json()["code"] == "name_conflict"
    too_large = await appliance.ask(
        "POST", "/instances", json={"name": "two", "image": "localhost/busybox:test", "size": "31GB"}
    )
    assert too_large.status_code == 409 and too_large.json()["code"] == "insufficient_resources"
    await appliance.delete("/instances/one")
    resources = await appliance.get("/resources")
    assert resources["memory"]["allocated"] == resources["disk"]["allocated"] == 0
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()
