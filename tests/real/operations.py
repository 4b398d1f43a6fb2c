"""The operations that tests break off in the middle, and what must hold afterwards however they were broken off.

The guest has a note on its disk, so that one who lost his disk, or got another's, is found out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Set
from typing import Any, NamedTuple

import httpx
import trio

from tests.real.appliance import IMAGE, PATIENCE, Appliance
from tests.real.kind import TAKES_DISKS

Act = Callable[[Appliance], Awaitable[httpx.Response]]

SIZES: dict[str, Any] = {"image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "16MB"}
NOTE = ["sh", "-c", "echo mine > /note; sync; exec sleep 1000000"]
ZSTD = {"enabled": True, "algorithm": "zstd"}


class Operation(NamedTuple):
    """Of instance ``one``."""

    prepare: Callable[[Appliance], Awaitable[object]]
    act: Act
    states: Set[str]
    """Of ``one``, old and new; after the VMM was killed also Stopped."""


# What is there before


async def nothing(appliance: Appliance) -> None:
    pass


async def running(appliance: Appliance) -> None:
    await appliance.create("one", cmd=NOTE, **SIZES)
    await wait_for_note(appliance, "one")


async def stopped(appliance: Appliance) -> None:
    await running(appliance)
    await appliance.post("/instances/one/stop")


async def standby(appliance: Appliance) -> None:
    await running(appliance)
    await appliance.post("/instances/one/standby")


async def compressed(appliance: Appliance) -> None:
    await running(appliance)
    await appliance.post("/instances/one/standby", {"compression": ZSTD})
    await wait_packed(appliance)


async def with_volume(appliance: Appliance) -> None:
    await appliance.post("/volumes", {"name": "data", "size_gb": 1})
    await running(appliance)


async def attached(appliance: Appliance) -> None:
    await with_volume(appliance)
    await appliance.post("/instances/one/volumes/data", {"mount_path": "/data"})


# What is done


def ask(method: str, path: str, body: object = None) -> Act:
    async def asked(appliance: Appliance) -> httpx.Response:
        return await appliance.ask(method, path, json=body)

    return asked


async def snapshot(appliance: Appliance) -> httpx.Response:
    """With all that follows of it."""
    body = {"kind": "Standby", "name": "s", "compression": ZSTD}
    answer = await appliance.ask("POST", "/instances/one/snapshots", json=body)
    if answer.is_success:
        await wait_packed(appliance)
    return answer


async def with_pool(appliance: Appliance) -> None:
    await running(appliance)
    made = await appliance.post("/instances/one/snapshots", {"kind": "Standby", "name": "s"})
    await appliance.ask("PUT", f"/snapshots/{made['id']}/pool", json={"size": 1})
    await wait_pooled(appliance)


async def claim(appliance: Appliance) -> httpx.Response:
    """With the fill that follows it."""
    (made,) = await appliance.get("/snapshots")
    answer = await appliance.ask("POST", f"/snapshots/{made['id']}/fork", json={"name": "two"})
    if answer.is_success:
        await wait_pooled(appliance, failed=True)
    return answer


OPERATIONS = {
    "create": Operation(
        nothing,
        ask("POST", "/instances", {"name": "one", "cmd": NOTE, **SIZES}),
        {"gone", "Created", "Initializing", "Running"},
    ),
    "start": Operation(stopped, ask("POST", "/instances/one/start", {}), {"Stopped", "Initializing", "Running"}),
    "stop": Operation(running, ask("POST", "/instances/one/stop"), {"Running", "Stopped"}),
    "delete": Operation(running, ask("DELETE", "/instances/one"), {"Running", "gone"}),
    "standby": Operation(running, ask("POST", "/instances/one/standby"), {"Running", "Standby"}),
    "restore": Operation(standby, ask("POST", "/instances/one/restore"), {"Standby", "Running"}),
    "unpacking": Operation(compressed, ask("POST", "/instances/one/restore"), {"Standby", "Running"}),
    "fork": Operation(running, ask("POST", "/instances/one/fork", {"name": "two", "from_running": True}), {"Running"}),
    "snapshot": Operation(running, snapshot, {"Running"}),
    "claim": Operation(with_pool, claim, {"Running"}),
}
if TAKES_DISKS:
    OPERATIONS["attach"] = Operation(
        with_volume, ask("POST", "/instances/one/volumes/data", {"mount_path": "/data"}), {"Running"}
    )
    OPERATIONS["detach"] = Operation(attached, ask("DELETE", "/instances/one/volumes/data"), {"Running"})


# What holds


async def wait_packed(appliance: Appliance) -> None:
    """Compressed, or failed to be. Asks the server each time, so that its end is noticed."""
    captures = appliance.data / "captures"
    with trio.fail_after(PATIENCE):
        while any(captures.glob("*/memory")):
            snapshots = await appliance.get("/snapshots")
            if any(each.get("compression_state") == "error" for each in snapshots):
                return
            await trio.sleep(0.1)


async def wait_pooled(appliance: Appliance, *, failed: bool = False) -> None:
    """Every pool is full, or with ``failed`` says why not: a hostile VMM can spoil the capture it needs."""
    with trio.fail_after(PATIENCE):
        for each in await appliance.get("/snapshots"):
            while (pool := await appliance.get(f"/snapshots/{each['id']}/pool"))["ready"] < pool["size"]:
                if failed and pool["error"]:
                    return
                await trio.sleep(0.1)


async def end_pools(appliance: Appliance) -> None:
    """So that every VM that is left is an instance's."""
    for each in await appliance.get("/snapshots"):
        await appliance.delete(f"/snapshots/{each['id']}/pool")


async def wait_for_note(appliance: Appliance, name: str, where: str = "") -> None:
    """The guest can be used and has its disk; its channel may just be being opened again."""
    path = f"/instances/{name}/stat?path=/note"
    with trio.move_on_after(PATIENCE):
        while True:
            answer = await appliance.ask("GET", path)
            if answer.is_success and answer.json()["exists"]:
                return
            await trio.sleep(0.1)
    raise AssertionError(f"{name}: {answer.text}: {where}")


async def wait_at_rest(appliance: Appliance, states: Set[str], where: str) -> dict[str, str]:
    """States by name, once that of ``one`` is among ``states`` and none is in transition."""
    with trio.move_on_after(PATIENCE):
        while True:
            found = {i["name"]: i["state"] for i in await appliance.get("/instances")}
            moving = {"Created", "Initializing", "Shutdown", "Unknown"} - states
            if found.get("one", "gone") in states and not moving & set(found.values()):
                return found
            await trio.sleep(0.1)
    raise AssertionError(f"{await appliance.get('/instances')}: {where}")


async def check_whole(appliance: Appliance, where: str) -> None:
    """Everything that exists has an owner and works: what runs answers, what is in standby can be
    woken, what stopped can be started, and of each snapshot a fork can be made."""
    await end_pools(appliance)
    await check_owned(appliance, where)
    snapshots = await appliance.get("/snapshots")
    for instance in await appliance.get("/instances"):
        name, state = instance["name"], instance["state"]
        verb = {"Standby": "restore", "Stopped": "start"}.get(state)
        if verb is not None:
            answer = await appliance.ask("POST", f"/instances/{name}/{verb}", json={})
            assert answer.is_success, f"{name} cannot {verb}: {answer.text}: {where}"
        await appliance.wait(name, "Running")
        await wait_for_note(appliance, name, where)
        await check_volumes(appliance, instance, where)
    for number, each in enumerate(snapshots):
        answer = await appliance.ask("POST", f"/snapshots/{each['id']}/fork", json={"name": f"of-snapshot-{number}"})
        assert answer.is_success, f"{answer.text}: {where}"
        await wait_for_note(appliance, f"of-snapshot-{number}", where)


async def check_volumes(appliance: Appliance, instance: dict[str, Any], where: str) -> None:
    """A volume is mounted where the instance has it, and nowhere else; both sides say the same."""
    for volume in await appliance.get("/volumes"):
        holders = [each["instance_id"] for each in volume.get("attachments") or ()]
        mine = [each["volume_id"] for each in instance.get("volumes") or ()]
        assert (instance["id"] in holders) == (volume["id"] in mine), f"{volume}, {instance}: {where}"
        mounted, output = await appliance.exec(instance["name"], "grep", " /data ", "/proc/mounts")
        assert (mounted == 0) == bool(mine), f"{output}, {mine}: {where}"


async def check_owned(appliance: Appliance, where: str) -> None:
    with trio.move_on_after(PATIENCE):  # what the server still ends, and hears the end of, in the background
        while True:
            instances = await appliance.get("/instances")
            alive = {i["id"] for i in instances if i["state"] not in ("Stopped", "Standby")}
            running = {run.rpartition("/")[2] for run in appliance.vmms().values()}
            if running == alive and len(appliance.namespace.links()) == len(alive):
                break
            await trio.sleep(0.1)
    assert running == alive, where
    assert len(appliance.namespace.links()) == len(alive), f"{appliance.namespace.links()}: {where}"
    for kind in ("instances", "captures", "volumes"):
        for directory in appliance.data.glob(f"{kind}/*"):
            with contextlib.suppress(FileNotFoundError):
                assert directory.stat().st_mode & 0o001, f"no VMM's user can pass {directory}: {where}"
    known = {i["id"] for i in instances}
    snapshots = {s["id"] for s in await appliance.get("/snapshots")}
    volumes = {v["id"] for v in await appliance.get("/volumes")}
    owners = {"instances": known, "vm": alive, "snapshots": snapshots, "volumes": volumes}
    for name in appliance.files():
        kind, *rest = name.split("/")
        if kind == "captures":
            assert snapshots or any(i["has_snapshot"] or i["state"] == "Running" for i in instances), f"{name}: {where}"
        else:
            assert kind in owners and rest and rest[0] in owners[kind], f"{name} lies about: {where}"


async def clean_up(appliance: Appliance) -> None:
    """Delete everything; then nothing is left."""
    for kind in ("instances", "snapshots", "volumes"):
        for each in await appliance.get(f"/{kind}"):
            await appliance.delete(f"/{kind}/{each['id']}")
    assert not appliance.vmms() and not appliance.namespace.links()
    assert not appliance.files(), appliance.files()
    resources = await appliance.get("/resources")
    assert not resources["allocations"] and resources["memory"]["allocated"] == 0
    breakdown = resources["disk_breakdown"]  # images and their layers stay
    assert not any(breakdown.get(key) for key in ("volumes_bytes", "overlays_bytes")), breakdown


def check_clear(answer: httpx.Response, where: str) -> None:
    """What went wrong is said in words that help."""
    if not answer.is_success:
        error = answer.json()
        assert answer.status_code in (404, 409, 500, 507) and error["code"], f"{error}: {where}"
        assert len(error["message"]) > 10 and "Traceback" not in error["message"], f"{error}: {where}"
