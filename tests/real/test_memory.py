"""Standby, restore, fork and snapshots of real guests: what runs keeps running; what belongs to others is untouched."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance
from tests.real.kind import OTHER, SLOWNESS, STATE_FILE, TAKES_DISKS, few
from tests.real.operations import wait_packed
from tests.real.world import ADDRESS, appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

COUNTER = ["sh", "-c", "i=0; while true; do i=$((i+1)); echo $i >> /file; sleep 0.1; done"]
BEGUN = "until [ -s /file ]; do sleep 0.1; done"
"""Waits for the counter: an instance is Running, and can enter standby, before its program has written anything."""

ECHO = f"""
import socket
server = socket.create_server(({ADDRESS!r}, 7))
print("ready")
while True:
    peer, _ = server.accept()
    while data := peer.recv(100):
        peer.sendall(data)
"""


async def counted(appliance: Appliance, name: str) -> int:
    code, text = await appliance.exec(name, "sh", "-c", f"{BEGUN}; tail -n 1 /file")
    assert code == 0, text
    return int(text)


async def check_no_gap(appliance: Appliance, name: str) -> None:
    """Every number the program wrote is in its file, once: nothing ran twice, nothing was lost."""
    code, text = await appliance.exec(name, "sh", "-c", f"{BEGUN}; cat /file")
    assert code == 0
    numbers = [int(line) for line in text.split()]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_program_continues_after_standby(appliance: Appliance) -> None:
    await appliance.create("one", cmd=COUNTER)
    before = await counted(appliance, "one")
    asleep = await appliance.post("/instances/one/standby")
    assert asleep["state"] == "Standby" and asleep["has_snapshot"]
    assert not appliance.vmms() and not appliance.namespace.links()
    assert (await appliance.get("/resources"))["memory"]["allocated"] == 0
    await trio.sleep(1)
    awake = await appliance.post("/instances/one/restore")
    assert awake["state"] == "Running"
    (used,) = (await appliance.get("/stats"))["instances"]
    vmm, guest = (datetime.fromisoformat(each) for each in (used["vmm_started_at"], awake["started_at"]))
    assert vmm > guest, "its counters began at zero, with the VMM that continues the guest"
    assert await counted(appliance, "one") >= before
    await check_no_gap(appliance, "one")
    code, clock = await appliance.exec("one", "date", "+%s")
    assert code == 0 and abs(int(clock) - time.time()) < 10 * SLOWNESS
    assert not list((appliance.data / "captures").iterdir())


async def test_many_standbys_of_one(appliance: Appliance) -> None:
    """As often as STANDBY_CYCLES says (100 once per release): the program goes on, and nothing piles up."""
    cycles = int(os.environ.get("STANDBY_CYCLES", "5"))
    await appliance.create("one", cmd=COUNTER)
    await appliance.post("/instances/one/standby")
    asleep, open_files = appliance.files(), appliance.open_files()
    for number in range(cycles):
        await appliance.post("/instances/one/restore")
        before = await counted(appliance, "one")
        await appliance.post("/instances/one/standby")
        captures = {path for path in asleep ^ appliance.files() if not path.startswith("captures/")}
        assert not captures, f"{captures} after {number + 1} cycles"
        assert len(appliance.files()) == len(asleep) and not appliance.vmms()
    with trio.move_on_after(PATIENCE):  # those of the last requests and of the last VMM may just be being closed
        while appliance.open_files() > open_files + 2:
            await trio.sleep(0.1)
    assert appliance.open_files() <= open_files + 2, "descriptors of the server pile up"
    await appliance.post("/instances/one/restore")
    assert await counted(appliance, "one") > before > 0
    await check_no_gap(appliance, "one")
    code, clock = await appliance.exec("one", "date", "+%s")
    assert code == 0 and abs(int(clock) - time.time()) < 10 * SLOWNESS
    print(f"{cycles} cycles, counter at {before}")


async def test_a_connection_survives_standby(directory: Path) -> None:
    """The peer still waits, so what is said after the restore arrives on the same connection."""
    talk = f"mkfifo /in; (while true; do sleep 1000; done) > /in & nc {ADDRESS} 7 < /in > /out"
    async with appliance_in_world(directory) as (appliance, world):
        with world.serving(ECHO):
            await appliance.create("one", cmd=["sh", "-c", talk])
            assert (await appliance.exec("one", "sh", "-c", "until [ -p /in ]; do sleep 0.1; done; echo before > /in"))[
                0
            ] == 0
            await wait_for_text(appliance, "one", "/out", "before")
            await appliance.post("/instances/one/standby")
            await appliance.post("/instances/one/restore")
            assert (await appliance.exec("one", "sh", "-c", "echo after > /in"))[0] == 0
            await wait_for_text(appliance, "one", "/out", "after")


async def wait_for_text(appliance: Appliance, name: str, path: str, text: str) -> None:
    with trio.fail_after(PATIENCE):
        while text not in (await appliance.exec(name, "cat", path))[1]:
            await trio.sleep(0.1)


async def test_a_fork_continues_with_its_own_identity(appliance: Appliance) -> None:
    """Both go on from the same moment; neither sees what the other writes."""
    await appliance.create("one", cmd=COUNTER)
    before = await counted(appliance, "one")
    await appliance.post("/instances/one/fork", {"name": "two", "from_running": True})
    assert await appliance.exec("two", "cat", "/etc/hostname") == (0, "two\n")
    assert await appliance.exec("two", "sh", "-c", "echo mine > /mine") == (0, "")
    assert (await appliance.exec("one", "cat", "/mine"))[0] != 0
    for name in ("one", "two"):
        assert await counted(appliance, name) >= before
        await check_no_gap(appliance, name)
    one, two = [await appliance.get(f"/instances/{name}") for name in ("one", "two")]
    assert one["network"]["ip"] != two["network"]["ip"] and one["network"]["mac"] != two["network"]["mac"]
    for instance in (one, two):
        code, text = await appliance.exec(instance["name"], "ip", "address")
        assert code == 0 and instance["network"]["ip"] in text and instance["network"]["mac"] in text


async def test_many_forks_of_one_snapshot(appliance: Appliance) -> None:
    """At once, each with its own identity, and none able to see another's later writes."""
    await appliance.create("source", cmd=COUNTER)
    made = await appliance.post("/instances/source/snapshots", {"kind": "Standby", "name": "base"})
    await appliance.delete("/instances/source")
    seen: dict[str, str] = {}

    async def fork(number: int) -> None:
        name = f"fork{number}"
        instance = await appliance.post(f"/snapshots/{made['id']}/fork", {"name": name})
        assert instance["state"] == "Running"
        code, _ = await appliance.exec(name, "sh", "-c", f"echo {name} > /who")
        assert code == 0
        seen[name] = instance["network"]["ip"]

    async with trio.open_nursery() as nursery:
        for number in range(few(20)):
            nursery.start_soon(fork, number)
    assert len(set(seen.values())) == few(20)
    states = {each["name"]: each["state"] for each in await appliance.get("/instances")}
    assert set(states.values()) == {"Running"}, f"{states}\n{appliance.log_tail()}"
    for name in seen:
        assert await appliance.exec(name, "cat", "/who", "/etc/hostname") == (0, f"{name}\n{name}\n")
    await appliance.delete(f"/snapshots/{made['id']}")
    assert await appliance.exec("fork2", "cat", "/who") == (0, "fork2\n")
    for name in seen:
        await appliance.delete(f"/instances/{name}")
    assert not appliance.vmms() and not appliance.files()


async def test_a_stopped_snapshot_comes_back_on_another_kind(appliance: Appliance) -> None:
    """And on its own again. One of a running guest stays with its kind."""
    own = (await appliance.create("one"))["hypervisor"]
    assert (await appliance.exec("one", "sh", "-c", "echo old > /note; sync"))[0] == 0
    awake = await appliance.post("/instances/one/snapshots", {"kind": "Standby", "name": "awake"})
    elsewhere = {"target_hypervisor": OTHER, "target_state": "Running"}
    refused = await appliance.ask("POST", f"/snapshots/{awake['id']}/fork", json={"name": "two", **elsewhere})
    assert refused.status_code == 400 and "target_hypervisor" in refused.json()["message"], refused.text
    await appliance.post("/instances/one/stop")
    off = await appliance.post("/instances/one/snapshots", {"kind": "Stopped", "name": "off"})
    on_mac = {"name": "two", "target_hypervisor": "vz"}
    nowhere = await appliance.ask("POST", f"/snapshots/{off['id']}/fork", json=on_mac)
    assert nowhere.status_code == 501 and "macOS" in nowhere.json()["message"], nowhere.text
    await appliance.post(f"/instances/one/snapshots/{off['id']}/restore", elsewhere)
    await appliance.post(f"/snapshots/{off['id']}/fork", {"name": "two", "target_state": "Running"})
    await appliance.post(f"/snapshots/{off['id']}/fork", {"name": "three", **elsewhere})
    for name, kind in (("one", OTHER), ("two", own), ("three", OTHER)):
        await appliance.wait(name, "Running")
        assert (await appliance.get(f"/instances/{name}"))["hypervisor"] == kind
        assert await appliance.exec(name, "cat", "/note") == (0, "old\n")


async def test_back_to_a_snapshot(appliance: Appliance) -> None:
    await appliance.create("one")
    assert (await appliance.exec("one", "sh", "-c", "echo old > /note; sync"))[0] == 0
    made = await appliance.post("/instances/one/snapshots", {"kind": "Standby", "name": "s"})
    assert (await appliance.exec("one", "sh", "-c", "echo new > /note; sync"))[0] == 0
    await appliance.post("/instances/one/stop")
    back = await appliance.post(f"/instances/one/snapshots/{made['id']}/restore", {})
    assert back["state"] == "Running"
    assert await appliance.exec("one", "cat", "/note") == (0, "old\n")


@pytest.mark.parametrize("algorithm", ["zstd", "lz4"])
async def test_compressed_standby(appliance: Appliance, algorithm: str) -> None:
    await appliance.create("one", cmd=COUNTER)
    await appliance.post("/instances/one/standby", {"compression": {"enabled": True, "algorithm": algorithm}})
    captures = appliance.data / "captures"
    with trio.fail_after(PATIENCE):
        while not list(captures.glob("*/memory.*")) or list(captures.glob("*/memory")):
            await trio.sleep(0.05)
    await appliance.post("/instances/one/restore")
    await check_no_gap(appliance, "one")


@pytest.mark.parametrize("damage", ["truncated memory", "truncated state", "flipped state", "no record"])
async def test_a_torn_capture_is_refused(appliance: Appliance, damage: str) -> None:
    await appliance.create("one")
    await appliance.post("/instances/one/standby")
    (capture,) = (appliance.data / "captures").iterdir()
    match damage:
        case "truncated memory":
            with open(capture / "memory", "r+b") as file:
                file.truncate(1 << 20)
        case "truncated state":
            with open(capture / STATE_FILE, "r+b") as file:
                file.truncate(1000)
        case "flipped state":
            content = bytearray((capture / STATE_FILE).read_bytes())
            content[len(content) // 2] ^= 1
            (capture / STATE_FILE).write_bytes(content)
        case "no record":
            (capture / "capture.json").unlink()
    refused = await appliance.ask("POST", "/instances/one/restore")
    assert refused.status_code == 500 and "capture" in json.loads(refused.content)["message"]
    assert (await appliance.get("/instances/one"))["state"] == "Standby"
    assert not appliance.vmms() and not appliance.namespace.links()
    await appliance.delete("/instances/one")


async def test_a_volume_is_given_to_a_stopped_instance(appliance: Appliance) -> None:
    """Every VMM has it at the next start; one that takes no disks at run time says so before anything happens."""
    await appliance.post("/volumes", {"name": "data", "size_gb": 1})
    await appliance.create("one")
    if not TAKES_DISKS:
        refused = await appliance.ask("POST", "/instances/one/volumes/data", json={"mount_path": "/data"})
        assert refused.status_code == 501 and "stop it first" in refused.json()["message"]
        assert not (await appliance.get("/instances/one")).get("volumes")
    await appliance.post("/instances/one/stop")
    await appliance.post("/instances/one/volumes/data", {"mount_path": "/data"})
    await appliance.post("/instances/one/start", {})
    await appliance.wait("one", "Running")
    assert await appliance.exec("one", "sh", "-c", "echo kept > /data/file; sync") == (0, "")
    await appliance.post("/instances/one/standby")
    await appliance.post("/instances/one/restore")
    assert await appliance.exec("one", "cat", "/data/file") == (0, "kept\n")
    await appliance.post("/instances/one/stop")
    await appliance.delete("/instances/one/volumes/data")
    await appliance.delete("/volumes/data")


@pytest.mark.skipif(not TAKES_DISKS, reason="this hypervisor has no hot-plug of disks")
async def test_volumes_come_and_go_while_the_guest_runs(appliance: Appliance) -> None:
    volume = await appliance.post("/volumes", {"name": "data", "size_gb": 1})
    await appliance.create("one")
    await appliance.create("two")
    attached = await appliance.post(f"/instances/one/volumes/{volume['id']}", {"mount_path": "/data"})
    assert attached["volumes"][0]["mount_path"] == "/data"
    assert (
        await appliance.exec(
            "one", "sh", "-c", "echo kept > /data/file; (cd /data; exec tail -f /etc/passwd) > /dev/null 2>&1 &"
        )
    )[0] == 0
    other = await appliance.ask("POST", f"/instances/two/volumes/{volume['id']}", json={"mount_path": "/data"})
    assert other.status_code == 409
    busy = await appliance.ask("DELETE", f"/instances/one/volumes/{volume['id']}")
    assert busy.status_code == 409 and "tail" in busy.json()["message"], busy.text
    assert await appliance.exec("one", "cat", "/data/file") == (0, "kept\n")
    assert (await appliance.exec("one", "killall", "tail"))[0] in (0, 137, 143)
    detached = await appliance.ask("DELETE", f"/instances/one/volumes/{volume['id']}")
    assert detached.status_code == 200, detached.text
    await appliance.post(f"/instances/two/volumes/{volume['id']}", {"mount_path": "/data", "readonly": True})
    assert await appliance.exec("two", "cat", "/data/file") == (0, "kept\n")
    assert (await appliance.exec("two", "sh", "-c", "echo x > /data/file"))[0] != 0
    in_use = await appliance.ask("DELETE", f"/volumes/{volume['id']}")
    assert in_use.status_code == 409
    await appliance.delete("/instances/two")
    await appliance.delete(f"/volumes/{volume['id']}")


async def test_an_instance_ends_when_its_time_is_over(appliance: Appliance) -> None:
    await appliance.create("one", ttl="1s", wait="")
    with trio.fail_after(PATIENCE):
        while await appliance.get("/instances"):
            await trio.sleep(0.1)
    assert not appliance.vmms() and not appliance.files()


async def test_memory_grows_to_what_was_promised(appliance: Appliance) -> None:
    """And stays so in a standby, however the plugged memory is saved."""
    await appliance.create("one", size="128MB", hotplug_size="256MB")
    with trio.fail_after(PATIENCE):
        while await _memory_of(appliance, "one") < 300 << 20:
            await trio.sleep(0.2)
    await appliance.post("/instances/one/standby", {"compression": {"enabled": True, "algorithm": "zstd"}})
    await wait_packed(appliance)
    await appliance.post("/instances/one/restore")
    assert await _memory_of(appliance, "one") > 300 << 20


async def _memory_of(appliance: Appliance, name: str, what: str = "MemTotal") -> int:
    code, text = await appliance.exec(name, "grep", what, "/proc/meminfo")
    assert code == 0, text
    return int(text.split()[1]) << 10


async def test_a_guest_lends_memory_that_it_does_not_need(appliance: Appliance) -> None:
    """What a program used once is the host's again; a standby ends the loan."""
    await appliance.create("one", size="1GB")
    code, text = await appliance.exec("one", "sh", "-c", "head -c 300000000 /dev/zero | tail -c 300000000 | wc -c")
    assert (code, text.strip()) == (0, "300000000")
    free = await _memory_of(appliance, "one", "MemFree")
    lent = await appliance.post("/resources/memory/reclaim", {"reclaim_bytes": 512 << 20, "reason": "a test"})
    [action] = lent["actions"]
    assert (action["status"], action["applied_reclaim_bytes"]) == ("applied", 512 << 20), lent
    with trio.fail_after(PATIENCE):
        while (await appliance.get("/instances/one/stats"))["memory_rss_bytes"] > 300 << 20:
            await trio.sleep(0.2)
        while await _memory_of(appliance, "one", "MemFree") > free - (448 << 20):
            await trio.sleep(0.2)
    await appliance.post("/instances/one/standby")
    assert (await appliance.post("/resources/memory/reclaim", {"reclaim_bytes": 1 << 20}))["actions"] == []
    await appliance.post("/instances/one/restore")
    with trio.fail_after(PATIENCE):
        while await _memory_of(appliance, "one", "MemFree") < free - (64 << 20):
            await trio.sleep(0.2)
