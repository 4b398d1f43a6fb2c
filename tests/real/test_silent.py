"""A guest that stops answering is an instance like any other; one that halts ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, ROOT, Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]

STOP_THE_KERNEL = "echo 0 > /proc/sys/kernel/panic; (sleep 0.5; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &"
"""A panic that does not reset: the processor spins, the devices are there, nothing answers."""


async def make_silent(appliance: Appliance, name: str) -> None:
    """Create it, stop its kernel, and wait until the server has noticed without being asked."""
    await appliance.create(name)
    assert (await appliance.exec(name, "sh", "-c", STOP_THE_KERNEL))[0] == 0
    with trio.fail_after(PATIENCE):
        while "guest_silent_since" not in await appliance.get(f"/instances/{name}"):
            await trio.sleep(0.5)


async def test_a_silent_guest_is_shown_refuses_and_can_be_stopped_and_deleted(
    appliance: Appliance, directory: Path
) -> None:
    await appliance.post("/volumes", {"name": "data", "size_gb": 1})
    await make_silent(appliance, "one")
    for method, path in (
        ("POST", "/instances/one/standby"),
        ("POST", "/instances/one/snapshots"),
        ("GET", "/instances/one/stat?path=/"),
        ("POST", "/instances/one/volumes/data"),
    ):
        body = {"snapshots": {"kind": "Standby"}, "data": {"mount_path": "/data"}}.get(path.rpartition("/")[2])
        refused = await appliance.ask(method, path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (504, "guest_timeout"), refused.text
        assert (await appliance.get("/instances/one"))["state"] == "Running"
    note = directory / "note"
    note.write_text("a note")
    for command in (
        ("exec", "-T", "one", "--", "true"),
        ("cp", "one:/etc/passwd", str(directory / "passwd")),
        ("cp", str(note), "one:/tmp/note"),
    ):
        code, said = await appliance.cli(*command)
        assert code != 0 and "guest" in said, f"{command}: {said}"
    assert (await appliance.post("/instances/one/stop"))["state"] == "Stopped"
    await appliance.post("/instances/one/start")
    await appliance.wait("one", "Running")
    assert "guest_silent_since" not in await appliance.get("/instances/one")
    await appliance.delete("/instances/one")
    await make_silent(appliance, "two")
    await appliance.delete("/instances/two")
    await appliance.delete("/volumes/data")
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_a_delete_overtakes_a_standby_that_waits_for_the_guest(appliance: Appliance) -> None:
    """The guest halts, and before that is noticed it is put in standby, and deleted."""
    await appliance.create("one")
    assert (await appliance.exec("one", "sh", "-c", STOP_THE_KERNEL))[0] == 0
    await trio.sleep(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(appliance.ask, "POST", "/instances/one/standby")
        await trio.sleep(0.5)
        await appliance.delete("/instances/one")
    assert not appliance.vmms() and not appliance.files() and not appliance.namespace.links()


async def test_halt_in_a_guest_ends_its_vm(appliance: Appliance) -> None:
    """Ours powers off; a distribution's stops its processors permanently, and the server ends its VM."""
    await appliance.create("one")
    assert (await appliance.exec("one", "sh", "-c", "(sleep 0.5; halt -f) >/dev/null 2>&1 &"))[0] == 0
    ended = await appliance.wait("one", "Stopped")
    powers_off = (ROOT / "build/guest/release").read_text().strip().endswith("-hypeman")
    assert ended["exit_message"] == ("the guest powered off" if powers_off else "the guest halted")
    await appliance.delete("/instances/one")
    assert not appliance.vmms() and not appliance.files()
