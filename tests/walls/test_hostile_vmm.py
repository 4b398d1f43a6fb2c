"""A VMM that was taken over, at every moment of every operation: it harms only itself.

The server takes ``hostile.c`` for QEMU: the real one under emulation, with a guest that works, and with a thread inside
that attacks everything it can reach. ``harried.py`` lets each moment of each operation meet a whole round of attacks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance, check_host, short_directory
from tests.real.operations import NOTE, OPERATIONS, SIZES, ZSTD, wait_for_note, wait_packed
from tests.walls.hostile_vmm import FAR, Entry, build, differences, picture

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPARED = ("store", "tmp", "blobs")
"""Not looked at: what the server itself writes all the time."""
SPOILED = {**SIZES, "size": "130MB"}
"""A VMM with so much memory also answers for QEMU with malformed data, and floods."""
NONSENSE_FROM = 400
"""The round of attacks in which that begins, so that it has a guest by then."""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("walls")


@pytest.fixture
async def appliance(directory: Path) -> AsyncIterator[Appliance]:
    async with harried(directory) as started:
        yield started


@asynccontextmanager
async def harried(directory: Path) -> AsyncIterator[Appliance]:
    appliance = Appliance(directory, HYPERVISOR__QEMU_BINARY=str(build(directory)), REQUEST_TIMEOUT="600")
    appliance.module = ("tests.walls.harried", str(directory / "moments"))
    try:
        await appliance.start_with_image()
        yield appliance
    finally:
        appliance.close()


class Host:
    """What is not the attacker's: other instances, images, and files of root's."""

    def __init__(self, appliance: Appliance, spared: Path | None = None) -> None:
        """``spared``: a directory that the attacker's own files are in."""
        self._appliance = appliance
        self._spared = spared
        secrets = appliance.directory / "secrets"
        secrets.mkdir(mode=0o755)
        for name, mode in (("private", 0o600), ("public", 0o644), ("everybody's", 0o666)):
            (secrets / name).write_text("root's own")
            (secrets / name).chmod(mode)
        self._places = [secrets, Path("/etc/passwd"), Path("/etc/shadow"), Path("/etc/hosts")]
        self._before: dict[str, Entry] | None = None
        self._before = self._picture()

    def _picture(self) -> dict[str, Entry]:
        data = [path for path in self._appliance.data.iterdir() if path.name not in SPARED and path != self._spared]
        return picture(*filter(Path.exists, (*self._places, *data)), read=self._before)

    def check(self, where: str) -> None:
        """Nothing that was there has changed, and nothing came to be there that is not an instance's."""
        assert self._before is not None
        now = self._picture()
        assert differences(_settled(self._before), _settled(now)) == [], where
        new = sorted(now.keys() - self._before.keys())
        for path in new:
            entry = now[path]
            assert path.startswith(f"{self._appliance.data}/"), f"{path} is new: {where}"
            assert entry.kind in (0o4, 0o10), f"{path} is neither a directory nor a regular file: {where}"
            assert entry.links <= 1, f"{path} has other names: {where}"
            assert entry.kind == 0o10 or entry.uid == 0, f"root does not own {path}: {where}"


def _settled(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without the times and sizes of directories: what is in them is compared, and attackers of course have files."""
    return {path: entry._replace(changed=0) if entry.kind == 0o4 else entry for path, entry in entries.items()}


async def rounds(appliance: Appliance, name: str) -> int:
    """The attacks of this instance's VMM so far."""
    instance = (await appliance.get(f"/instances/{name}"))["id"]
    return int((appliance.data / "instances" / instance / "boot.raw").stat().st_atime) - FAR


async def test_every_operation_meets_attacks_at_every_moment(appliance: Appliance, directory: Path) -> None:
    victim = (await appliance.create("victim", cmd=NOTE, **SIZES))["id"]
    await wait_for_note(appliance, "victim")
    await appliance.post("/instances/victim/standby", {"compression": ZSTD})
    await wait_packed(appliance)
    await appliance.post("/volumes", {"name": "others", "size_gb": 1})
    host = Host(appliance)
    for name, operation in OPERATIONS.items():
        await operation.prepare(appliance)
        moments = directory / "moments"
        moments.write_text("")
        answer = await operation.act(appliance)
        assert answer.is_success, f"{name}: {answer.text}\n{appliance.log_tail()}"
        met = [line for line in moments.read_text().splitlines() if not line.startswith("0 ")]
        print(f"{name}: {len(met)} of {len(moments.read_text().splitlines())} moments met a VMM that attacks")
        assert met or name in ("create", "start", "restore", "unpacking"), f"{name} met no attack"
        host.check(name)
        for instance in await appliance.get("/instances"):
            if instance["name"] != "victim":
                await appliance.delete(f"/instances/{instance['id']}")
        for kind in ("snapshots", "volumes"):
            for each in await appliance.get(f"/{kind}"):
                if each["name"] != "others":
                    await appliance.delete(f"/{kind}/{each['id']}")
        assert {path.split("/")[1] for path in appliance.files() if path.startswith("instances/")} == {victim}
        assert not appliance.vmms()
        host.check(f"after {name}")
    await appliance.post("/instances/victim/restore")
    await wait_for_note(appliance, "victim")


async def test_a_vmm_that_sends_malformed_answers_and_floods(appliance: Appliance) -> None:
    """Now it does not spare itself: every request may fail, but ends, and all that is left is to delete it."""
    await appliance.create("victim", cmd=NOTE, **SIZES)
    await wait_for_note(appliance, "victim")
    await appliance.post("/instances/victim/standby", {"compression": ZSTD})
    await wait_packed(appliance)
    await appliance.post("/volumes", {"name": "data", "size_gb": 1})
    host = Host(appliance, spared=appliance.data / "volumes")
    for method, path, body in (
        ("GET", "/instances/one/stat?path=/", None),
        ("POST", "/instances/one/volumes/data", {"mount_path": "/data"}),
        ("POST", "/instances/one/snapshots", {"kind": "Standby", "name": "s"}),
        ("POST", "/instances/one/fork", {"name": "two", "from_running": True}),
        ("POST", "/instances/one/standby", None),
        ("POST", "/instances/one/stop", None),
    ):
        await appliance.post("/instances", {"name": "one", "cmd": NOTE, **SPOILED})
        with trio.move_on_after(PATIENCE):
            while (await appliance.get("/instances/one"))["state"] in ("Created", "Initializing"):
                await trio.sleep(0.1)
            while 0 <= await rounds(appliance, "one") < NONSENSE_FROM:
                await trio.sleep(0.1)
        answer = await appliance.ask(method, path, json=body)
        assert answer.is_success or answer.json()["code"], f"{path}: {answer.text}"
        print(f"{method} {path}: {answer.status_code} {answer.text[:120]}")
        assert (await appliance.ask("GET", "/health")).status_code == 200
        host.check(path)
        for instance in await appliance.get("/instances"):
            if instance["name"] != "victim":
                await appliance.delete(f"/instances/{instance['id']}")
        for each in await appliance.get("/snapshots"):
            await appliance.delete(f"/snapshots/{each['id']}")
        assert not appliance.vmms()
        host.check(f"after {path}")
    await appliance.post("/instances/victim/restore")
    await wait_for_note(appliance, "victim")
