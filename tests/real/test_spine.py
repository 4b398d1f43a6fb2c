"""The whole path on real parts: an image becomes a VM, is used, survives its server, ends."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance
from tests.real.kind import few

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_a_life(appliance: Appliance) -> None:
    """Create, read, exec, stop, start with another command, exit code, delete; nothing is left."""
    made = await appliance.create("one", tags={"team": "a"}, cmd=["sh", "-c", "echo hello; exec sleep 1000"])
    assert made["state"] == "Running" and made["network"]["ip"] == "10.100.0.2"
    assert made["id"] == (await appliance.get(f"/instances/{made['id'][:6]}"))["id"]
    with trio.fail_after(PATIENCE):  # it runs, but may not have printed yet
        while 'data: "hello"' not in (await appliance.ask("GET", "/instances/one/logs")).text:
            await trio.sleep(0.05)
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

    used = (await appliance.get("/usage?instance=one"))["total"]  # of both boots, though it is gone
    assert used["cpu_seconds"] >= stats["cpu_seconds"] and used["memory_gb_hours"] > 0 and used["disk_gb_hours"] > 0
    traces = await appliance.get("/traces?instance=one&limit=100")
    create = next(trace for trace in traces if trace["name"] == "POST /instances")
    assert {"queued", "LaunchVmm", "guest boot"} <= {span["name"] for span in create["spans"]}


async def test_a_tree_there_and_back(appliance: Appliance, tmp_path: Path) -> None:
    """Modes, times, symlinks and holes survive ``cp`` both ways; a name may begin with a dash."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "-f").write_text("F")
    (tree / "link").symlink_to("sub/sparse")
    with open(tree / "sub" / "sparse", "wb") as file:
        file.truncate(4 << 20)
    (tree / "-f").chmod(0o640)
    os.utime(tree / "-f", (1_000_000, 1_000_000))
    os.utime(tree / "sub", (2_000_000, 2_000_000))

    def seen(root: Path) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(root))] = (oct(status.st_mode), int(status.st_mtime), content)
        found.pop("link", None)  # its own times are not compared
        return found

    await appliance.create("one")
    assert (await appliance.cli("cp", "-q", "-a", str(tree), "one:/srv/in"))[0] == 0
    assert await appliance.exec("one", "readlink", "/srv/in/link") == (0, "sub/sparse\n")
    assert (await appliance.cli("cp", "-q", "-a", "one:/srv/in", str(tmp_path / "back")))[0] == 0
    assert seen(tmp_path / "back") == seen(tree)
    assert os.readlink(tmp_path / "back" / "link") == "sub/sparse"
    assert (tmp_path / "back" / "sub" / "sparse").stat().st_blocks == 0


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


async def test_an_end_without_a_server_is_found(appliance: Appliance) -> None:
    """The guest wrote its exit code where the next server finds it."""
    await appliance.create("one", cmd=["sh", "-c", "until [ -e /end ]; do sleep 0.1; done; exit 5"])
    assert (await appliance.exec("one", "sh", "-c", "(sleep 1; touch /end) >/dev/null 2>&1 &"))[0] == 0
    appliance.kill()
    with trio.fail_after(PATIENCE):
        while appliance.vmms():
            await trio.sleep(0.1)
    await appliance.start()
    ended = await appliance.wait("one", "Stopped")
    assert ended["exit_code"] == 5
    assert not appliance.namespace.links()


async def test_many_at_once(appliance: Appliance) -> None:
    """Ten instances created, used and deleted together."""

    async def live(number: int) -> None:
        name = f"vm{number}"
        await appliance.create(name)
        assert await appliance.exec(name, "cat", "/etc/hostname") == (0, f"{name}\n")
        await appliance.delete(f"/instances/{name}")

    async with trio.open_nursery() as nursery:
        for number in range(few(10)):
            nursery.start_soon(live, number)
    assert await appliance.get("/instances") == []
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_a_program_that_is_missing_is_reported(appliance: Appliance) -> None:
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
    assert resources["memory"]["allocated"] == 0
    assert not resources["disk_breakdown"].get("overlays_bytes")
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_many_at_once_and_a_kill_in_between(appliance: Appliance, tmp_path: Path) -> None:
    """Each used by exec and cp; the server is killed in the middle; then all are adopted and go on."""
    tick = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.5; done"
    names = [f"vm{number}" for number in range(few(20))]

    async def make(name: str) -> None:
        await appliance.create(name, cmd=["sh", "-c", tick])

    async def use(name: str) -> None:
        (tmp_path / name).write_text(f"for {name}\n" * 1000)
        assert await appliance.cli("cp", "-q", str(tmp_path / name), f"{name}:/tmp/file") == (0, "")
        assert await appliance.exec(name, "sh", "-c", "wc -l < /tmp/file; hostname") == (0, f"1000\n{name}\n")
        assert await appliance.cli("cp", "-q", f"{name}:/tmp/file", str(tmp_path / f"{name}.back")) == (0, "")
        assert (tmp_path / f"{name}.back").read_text() == (tmp_path / name).read_text()

    async def all_of(act: Callable[[str], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(act, name)

    await all_of(make)
    await all_of(use)
    before = appliance.vmms()
    appliance.kill()
    assert appliance.vmms() == before
    await appliance.start()
    assert {i["state"] for i in await appliance.get("/instances")} == {"Running"}
    await all_of(use)
    seen = (await appliance.ask("GET", "/instances/vm2/logs?tail=1")).text
    with trio.fail_after(PATIENCE):
        while (await appliance.ask("GET", "/instances/vm2/logs?tail=1")).text == seen:
            await trio.sleep(0.2)

    async def delete(name: str) -> None:
        await appliance.delete(f"/instances/{name}")

    await all_of(delete)
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()
