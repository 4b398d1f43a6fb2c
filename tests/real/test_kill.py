"""SIGKILL of the server at every moment of every operation, then a restart: the world is whole again.

For each operation the moments are visited one after another until one run of it is not hit; of each
operation as many as KILL_POINTS says (default 3, spread from a random one on; ``all`` for all, which
takes some 15 minutes). The same moments are all visited, with a VMM in memory, by
tests/instances/test_lifecycle.py.

After each kill a new server starts, and then holds: the instance is in a state that the operation may
leave, no process, TAP, file, lease or reservation is without an owner, and the instance can be deleted.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.real.appliance import IMAGE, Appliance, check_host, short_directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

_STRIDE = 4
"""Moments from one visited to the next where not all are."""

Act = Callable[[Appliance], Awaitable[object]]

SIZES = {"image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "64MB"}


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("kill")


@pytest.fixture
async def armed(directory: Path) -> AsyncIterator[Appliance]:
    """An appliance with the image in it, whose server is not running."""
    appliance = Appliance(directory)
    try:
        await appliance.start()
        await appliance.import_busybox()
        appliance.stop()
        yield appliance
    finally:
        appliance.close()


async def create(appliance: Appliance) -> None:
    await appliance.post("/instances", {"name": "one", **SIZES})


async def running(appliance: Appliance) -> None:
    await appliance.create("one")


async def stopped(appliance: Appliance) -> None:
    await appliance.create("one")
    await appliance.post("/instances/one/stop")


async def standby(appliance: Appliance) -> None:
    await running(appliance)
    await appliance.post("/instances/one/standby")


async def nothing(appliance: Appliance) -> None:
    pass


def act(method: str, path: str, body: object = None) -> Act:
    async def asked(appliance: Appliance) -> None:
        if method == "DELETE":
            await appliance.delete(path)
        else:
            await appliance.post(path, body)

    return asked


CASES: dict[str, tuple[Act, Act, set[str]]] = {
    "create": (nothing, create, {"gone", "Initializing", "Running"}),
    "start": (stopped, act("POST", "/instances/one/start", {}), {"Stopped", "Initializing", "Running"}),
    "stop": (running, act("POST", "/instances/one/stop"), {"Running", "Stopped"}),
    "delete": (running, act("DELETE", "/instances/one"), {"Running", "gone"}),
    "standby": (running, act("POST", "/instances/one/standby"), {"Running", "Standby"}),
    "restore": (standby, act("POST", "/instances/one/restore"), {"Standby", "Running"}),
    "fork": (
        running,
        act("POST", "/instances/one/fork", {"name": "two", "from_running": True}),
        {"Running"},
    ),
    "snapshot": (running, act("POST", "/instances/one/snapshots", {"kind": "Standby", "name": "s"}), {"Running"}),
}


@pytest.mark.parametrize("operation", CASES)
async def test_killed_at_every_moment(
    armed: Appliance, directory: Path, operation: str, record_property: Callable[[str, object], None]
) -> None:
    prepare, asked, allowed = CASES[operation]
    bomb = directory / "bomb"
    visited: list[str] = []
    every = os.environ.get("KILL_POINTS", "3")
    first = 0 if every == "all" else random.randrange(_STRIDE)
    for moment in itertools.count(first, 1 if every == "all" else _STRIDE):
        if every != "all" and len(visited) == int(every):
            break
        await armed.start(killable=str(bomb))
        await prepare(armed)
        bomb.write_text(str(moment))
        hit = await _until_killed(armed, asked)
        bomb.unlink()
        if not hit:
            await _clean_up(armed)
            armed.stop()
            break
        visited.append((directory / "bomb.where").read_text())
        await armed.start()
        where = f"killed {visited[-1]} (moment {moment}) of {operation}\n{armed.log_tail()}"
        states = {i["name"]: i["state"] for i in await armed.get("/instances")}
        assert states.get("one", "gone") in allowed, f"{states}: {where}"
        assert "Unknown" not in states.values(), f"{states}: {where}"
        if states.get("one") == "Running":
            await _check_answers(armed, where)
        await _check_owned(armed, where)
        await _clean_up(armed)
        armed.stop()
        armed.log.write_text("")
    assert len(visited) > 1, f"only {visited} were visited"
    print(f"\n{operation}: killed at {len(visited)} moments, {', '.join(visited)}")
    record_property("kill_points", len(visited))


async def _check_answers(appliance: Appliance, where: str) -> None:
    """The guest that runs can be used; its channel may just be being opened again."""
    said = ""
    with trio.move_on_after(60) as limit:
        while (answer := await appliance.exec("one", "true"))[0] != 0:
            said = answer[1]
            await trio.sleep(0.2)
    assert not limit.cancelled_caught, f"{said}: {where}"


async def _until_killed(appliance: Appliance, asked: Act) -> bool:
    try:
        await asked(appliance)
    except (httpx.TransportError, OSError):
        return await appliance.wait_killed()
    # The answer came before the last moments, which may still be under way.
    return await appliance.wait_killed()


async def _check_owned(appliance: Appliance, where: str) -> None:
    """Everything that lies about belongs to an instance that is there."""
    instances = await appliance.get("/instances")
    alive = {i["id"] for i in instances if i["state"] not in ("Stopped", "Standby")}
    known = {i["id"] for i in instances}
    with trio.move_on_after(5):  # what the server still ends in the background
        while {run.rpartition("/")[2] for run in appliance.vmms().values()} != alive:
            await trio.sleep(0.1)
    assert {run.rpartition("/")[2] for run in appliance.vmms().values()} == alive, where
    assert len(appliance.namespace.links()) == len(alive), f"{appliance.namespace.links()}: {where}"
    snapshots = {s["id"] for s in await appliance.get("/snapshots")}
    for name in appliance.files():
        kind, *rest = name.split("/")
        owner = rest[0] if rest else ""
        match kind:
            case "instances":
                assert owner in known, f"{name}: {where}"
            case "vm":
                assert owner in alive, f"{name}: {where}"
            case "snapshots":
                assert owner in snapshots, f"{name}: {where}"
            case "captures":
                held = [i for i in instances if i["state"] == "Standby"] or snapshots
                assert held, f"{name}: {where}"
            case _:
                raise AssertionError(f"{name} lies about: {where}")


async def _clean_up(appliance: Appliance) -> None:
    for instance in await appliance.get("/instances"):
        await appliance.delete(f"/instances/{instance['id']}")
    for snapshot in await appliance.get("/snapshots"):
        await appliance.delete(f"/snapshots/{snapshot['id']}")
    assert not appliance.vmms() and not appliance.namespace.links()
    assert not appliance.files(), appliance.files()
    resources = await appliance.get("/resources")
    assert not resources["allocations"] and resources["memory"]["allocated"] == resources["disk"]["allocated"] == 0
