"""A host from its backup: real disks, read by real guests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.real.appliance import ROOT, Appliance, running_appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def backup(verb: str, file: Path, appliance: Appliance) -> str:
    argv = [sys.executable, "-m", "hypeman", "backup", verb, str(file)]
    environment = {**os.environ, "DATA_DIR": str(appliance.data), "RUN_DIR": str(appliance.socket.parent)}
    result = await trio.run_process(
        argv, env=environment, cwd=ROOT, capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    output = result.stdout.decode()
    assert result.returncode == 0, output
    return output


async def test_a_new_host_continues_from_the_backup(directory: Path) -> None:
    """A stopped instance, one in standby and a volume; a third one runs through it all and stays behind."""
    file = directory / "host.tar.zst"
    for name in ("old", "new"):
        (directory / name).mkdir()
    async with running_appliance(directory / "old") as old:
        volume = await old.post("/volumes", {"name": "data", "size_gb": 1})
        mount = {"volume_id": volume["id"], "mount_path": "/data"}
        await old.create("stopped", volumes=[mount])
        assert (await old.exec("stopped", "sh", "-c", "echo disk > /note; echo volume > /data/note; sync"))[0] == 0
        await old.post("/instances/stopped/stop")
        await old.create("asleep")
        assert (await old.exec("asleep", "sh", "-c", "echo memory > /tmp/note"))[0] == 0
        await old.post("/instances/asleep/standby")
        await old.create("awake")
        assert "left out, since they have a VM: awake" in await backup("create", file, old)
        assert (await old.exec("awake", "echo", "on"))[1] == "on\n"

    new = Appliance(directory / "new")
    try:
        await backup("restore", file, new)
        await new.start()
        assert {one["name"] for one in await new.get("/instances")} == {"stopped", "asleep"}
        await new.post("/instances/asleep/restore")
        await new.wait("asleep", "Running")
        assert await new.exec("asleep", "cat", "/tmp/note") == (0, "memory\n")
        await new.post("/instances/stopped/start", {})
        await new.wait("stopped", "Running")
        assert await new.exec("stopped", "cat", "/note", "/data/note") == (0, "disk\nvolume\n")
        await new.create("awake")
    finally:
        new.close()
